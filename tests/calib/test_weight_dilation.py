"""Dilation is exact, never narrows a column, and leaves every output channel's weight range as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.weight_dilation import LARGEST_FACTOR, dilation_factors, scaled_columns, scaling_table, weight_scale_ratio

fixed = settings(deadline=None, derandomize=True, max_examples=60)


def random_weight(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Columns of very different sizes, some dead, some one-sided; a dead output channel now and then."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    spread = [-1] + [1] * (len(shape) - 2)
    weight *= torch.exp(2 * torch.randn(shape[1], generator=generator)).reshape(spread)
    kind = torch.randint(5, (shape[1],), generator=generator).reshape(spread)
    weight = torch.where(kind == 0, weight.abs(), torch.where(kind == 1, torch.zeros_like(weight), weight))
    weight[torch.rand(shape[0], generator=generator) < 0.1] = 0
    return weight


shapes = st.sampled_from([(5, 7), (6, 4, 3, 3), (1, 3), (3, 1, 1, 1), (8, 16)])


@given(st.integers(0, 2**32 - 1), shapes, st.booleans(), st.floats(1.0, 64.0))
@fixed
def test_dilation_keeps_every_range_and_never_shrinks(
    seed: int, shape: tuple[int, ...], symmetric: bool, cap: float
) -> None:
    weight = random_weight(seed, shape)
    factor = dilation_factors([weight], symmetric=symmetric, cap=cap)
    assert factor.shape == (shape[1],)
    assert bool((factor >= 1).all())
    assert bool((factor <= cap * (1 + 1e-6)).all())
    dilated = scaled_columns(weight, factor).flatten(1)
    flat = weight.flatten(1)
    if symmetric:
        torch.testing.assert_close(dilated.abs().amax(dim=1), flat.abs().amax(dim=1), rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(dilated.amax(dim=1).clamp_min(0), flat.amax(dim=1).clamp_min(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(dilated.amin(dim=1).clamp_max(0), flat.amin(dim=1).clamp_max(0), rtol=1e-6, atol=0)
        assert weight_scale_ratio([weight], factor) == pytest.approx(1.0, abs=1e-5)
    # Nothing more is to be had: a hair more, and a range would grow (unless the cap holds it back).
    for channel in torch.nonzero(factor < cap * (1 - 1e-6)).flatten().tolist():
        more = factor.clone()
        more[channel] *= 1.01
        grown = scaled_columns(weight, more).flatten(1)
        if symmetric:
            assert bool((grown.abs().amax(dim=1) > flat.abs().amax(dim=1) * (1 + 1e-3)).any())
        else:
            wider = (grown.amax(dim=1) > flat.amax(dim=1).clamp_min(0) * (1 + 1e-3)) | (
                grown.amin(dim=1) < flat.amin(dim=1).clamp_max(0) * (1 + 1e-3)
            )
            assert bool(wider.any())


@given(st.integers(0, 2**32 - 1), shapes)
@fixed
def test_dilation_is_equations_12_to_14(seed: int, shape: tuple[int, ...]) -> None:
    """As the paper writes them, on weights beyond its epsilon and with both signs in every output channel."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight = torch.where(weight.abs() < 1e-3, torch.full_like(weight, 1e-3), weight)
    flat = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)
    high, low = flat.amax(dim=(1, 2)), flat.amin(dim=(1, 2))
    usable = (high > 0) & (low < 0)
    if not bool(usable.all()):
        return
    expected = []
    for channel in range(shape[1]):
        column = flat[:, channel]
        first = (high.unsqueeze(1) / column.clamp(min=1e-5)).min()
        second = (low.unsqueeze(1) / column.clamp(max=-1e-5)).min()
        expected.append(torch.minimum(first, second))
    torch.testing.assert_close(dilation_factors([weight], cap=1e9), torch.stack(expected), rtol=1e-5, atol=0)


def test_channels_that_hold_an_extreme_keep_one() -> None:
    """The paper's set A, and what is left of the others."""
    weight = torch.tensor([[4.0, -1.0, 0.5, -0.25], [1.0, 2.0, -2.0, 0.5]])
    # Row 0: [-1, 4]; row 1: [-2, 2]. Channel 3 may reach -1 in row 0 and 2 in row 1.
    torch.testing.assert_close(dilation_factors([weight]), torch.tensor([1.0, 1.0, 1.0, 4.0]))
    # Against max|W| alone, channel 1 no longer holds an extreme of row 0, but it does of row 1.
    torch.testing.assert_close(dilation_factors([weight], symmetric=True), torch.tensor([1.0, 1.0, 1.0, 4.0]))
    weight[1, 1] = 0.5
    torch.testing.assert_close(dilation_factors([weight], symmetric=True), torch.tensor([1.0, 4.0, 1.0, 4.0]))


def test_readers_of_one_tensor_share_the_smallest_factor() -> None:
    left, right = random_weight(1, (6, 9)), random_weight(2, (4, 9))
    both = dilation_factors([left, right])
    torch.testing.assert_close(both, torch.minimum(dilation_factors([left]), dilation_factors([right])))


def test_dead_columns_get_the_cap_and_dead_rows_ask_for_nothing() -> None:
    weight = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(dilation_factors([weight]), torch.tensor([1.0, LARGEST_FACTOR, 1.0]))
    assert bool((dilation_factors([torch.zeros(2, 3)]) == LARGEST_FACTOR).all())


def test_the_table_is_the_mean_over_all_tensors() -> None:
    scaling = {
        "method": "auto",
        "tensors": {
            "a#0": {"choice": "dilation", "applied": "merged", "grown": 0.5, "weight_scale": 1.02,
                    "activation_scale": 0.8, "clip_error": 0.5, "output_error": 0.7},
            "b#0": {"choice": "none", "applied": "none"},
        },
    }  # fmt: skip
    line = scaling_table(scaling)
    assert line == {
        "method": "auto", "tensors": 2, "folded": 0, "merged": 1, "grown": 0.25, "weight_scale": 1.01,
        "activation_scale": 0.9, "clip_error": 0.75, "output_error": 0.85,
    }  # fmt: skip
    assert scaling_table({})["grown"] == 0.0
    assert scaling_table({})["method"] == "none"
