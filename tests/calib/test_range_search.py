"""The range search: never worse than min-max, zero always has a code, rows do not influence one another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.range_search import (
    RangeResult,
    length_gain,
    quantization_error,
    search_activation,
    search_asymmetric,
    search_centered,
    search_weight,
)

fixed = settings(deadline=None, derandomize=True, max_examples=12)
ALL_BITS = range(2, 9)


def random_rows(seed: int, rows: int = 5, count: int = 200) -> tuple[Tensor, Tensor]:
    """Rows of many shapes: shifted normal, one-sided, uniform, with an outlier, SiLU-like; and random weights."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((rows, count), generator=generator) * (torch.rand((rows, 1), generator=generator) * 5 + 0.01)
    values[0] += torch.rand(1, generator=generator) * 4 - 2
    if rows > 1:
        values[1] = values[1].abs()
    if rows > 2:
        values[2] = torch.rand(count, generator=generator)
    if rows > 3:
        values[3, 0] = 100.0
    if rows > 4:
        values[4] = torch.nn.functional.silu(values[4])
    return values, torch.rand((rows, count), generator=generator) + 0.01


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.amin(dim=1), values.amax(dim=1)


def min_max_error(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """What the plainest calibration makes: the whole range, zero in it, the zero_point rounded."""
    levels = 2**bits - 1
    low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
    scale = (high - low) / levels
    zero_point = torch.round(-low / scale).clamp(0, levels).to(torch.int64)
    return quantization_error(values, weights, scale, zero_point, bits)


@pytest.mark.parametrize("bits", ALL_BITS)
@given(seed=st.integers(0, 2**31))
@fixed
def test_asymmetric_is_never_worse_than_min_max(bits: int, seed: int) -> None:
    values, weights = random_rows(seed)
    found = search_asymmetric(values, weights, *extremes(values), bits)
    assert bool((found.error <= min_max_error(values, weights, bits)).all())
    check_result(found, bits, 5)
    again = quantization_error(values, weights, found.scale, found.zero_point, bits)
    torch.testing.assert_close(found.error, again, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@given(seed=st.integers(0, 2**31))
@fixed
def test_centered_is_never_worse_than_absmax(bits: int, seed: int) -> None:
    values, weights = random_rows(seed)
    found = search_centered(values, weights, *extremes(values), bits)
    check_result(found, bits, 5)
    assert bool((found.zero_point == 2 ** (bits - 1)).all())
    absmax = values.abs().amax(dim=1) / (2 ** (bits - 1) - 1)
    plain = quantization_error(values, weights, absmax, found.zero_point, bits)
    assert bool((found.error <= plain).all()), (found.error / plain).tolist()


def test_weights_that_lie_on_an_int8_grid_are_kept_as_they_are() -> None:
    """A model trained with int8 weights must come out of 8-bit calibration unharmed."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (4, 500), generator=generator)
    codes[:, 0] = 127
    scale = torch.tensor([[0.013], [1.0], [3.0e-4], [0.25]])
    found = search_weight(codes * scale, None, 8)
    assert bool((found.error <= 1e-10 * scale.flatten() ** 2).all()), found.error.tolist()


def check_result(found: RangeResult, bits: int, rows: int) -> None:
    assert found.scale.shape == found.zero_point.shape == found.error.shape == (rows,)
    assert found.scale.dtype == torch.float32
    assert found.zero_point.dtype == torch.int64
    assert bool((found.scale > 0).all())
    assert bool(torch.isfinite(found.scale).all())
    assert int(found.zero_point.min()) >= 0
    assert int(found.zero_point.max()) <= 2**bits - 1


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("search", [search_asymmetric, search_centered])
def test_rows_at_once_equal_rows_one_by_one(search: object, bits: int) -> None:
    assert callable(search)
    for seed in range(5):
        values, weights = random_rows(seed)
        values[2] = 0.0
        low, high = extremes(values)
        together = search(values, weights, low, high, bits)
        for row in range(5):
            part = slice(row, row + 1)
            alone = search(values[part], weights[part], low[part], high[part], bits)
            assert alone.scale[0] == together.scale[row]
            assert alone.zero_point[0] == together.zero_point[row]
            assert alone.error[0] == together.error[row]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_one_sided_rows_spend_every_code_on_their_side(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    values = torch.rand((2, 300), generator=generator) + 0.5
    values[1] *= -1
    found = search_asymmetric(values, torch.ones_like(values), *extremes(values), bits)
    assert found.zero_point.tolist() == [0, 2**bits - 1]
    # The mirror image of a row is quantized as its mirror image.
    values[1] = -values[0]
    found = search_asymmetric(values, torch.ones_like(values), *extremes(values), bits)
    assert found.scale[0] == found.scale[1]
    assert found.error[0] == found.error[1]


@pytest.mark.parametrize("bits", range(3, 9))
def test_symmetric_rows_get_a_zero_point_in_the_middle(bits: int) -> None:
    half = torch.randn((1, 400), generator=torch.Generator().manual_seed(bits)).abs()
    values = torch.cat([half, -half], dim=1)
    found = search_asymmetric(values, torch.ones_like(values), *extremes(values), bits)
    assert abs(int(found.zero_point) - (2**bits - 1) / 2) <= max(1.0, 0.15 * 2**bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("search", [search_asymmetric, search_centered, search_activation])
def test_dead_rows_get_a_usable_quantizer(search: object, bits: int) -> None:
    assert callable(search)
    values, weights = random_rows(1)
    values[0] = values[3] = 0.0
    found = search(values, weights, *extremes(values), bits)
    check_result(found, bits, 5)
    assert found.error[0] == found.error[3] == 0
    assert bool((found.error[[1, 2, 4]] > 0).all())


@given(st.integers(0, 2**31), st.integers(2, 7))
@fixed
def test_values_of_weight_zero_change_nothing(seed: int, bits: int) -> None:
    """Short rows are padded with weight 0."""
    values, weights = random_rows(seed)
    low, high = extremes(values)
    padded = torch.cat([values, torch.zeros(5, 31)], dim=1)
    padded_weights = torch.cat([weights, torch.zeros(5, 31)], dim=1)
    plain = search_asymmetric(values, weights, low, high, bits)
    with_padding = search_asymmetric(padded, padded_weights, low, high, bits)
    torch.testing.assert_close(with_padding.error, plain.error, rtol=1e-6, atol=0)


def test_8_bit_activations_are_shifted_only_where_it_pays() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn((3, 250), generator=generator)
    symmetric = torch.cat([half, -half], dim=1)
    silu = torch.nn.functional.silu(symmetric)
    ones = torch.ones_like(symmetric)
    assert search_activation(symmetric, ones, *extremes(symmetric), 8).zero_point.tolist() == [128] * 3
    shifted = search_activation(silu, ones, *extremes(silu), 8)
    assert bool((shifted.zero_point < 64).all())
    # All rows take one form: a table cannot shift in some rows only for free.
    mixed = torch.cat([symmetric * 0.01, silu[:1] * 100])
    zero_points = search_activation(mixed, torch.ones_like(mixed), *extremes(mixed), 8).zero_point
    assert zero_points[-1] != 128


@given(st.integers(0, 2**31), st.integers(2, 7))
@fixed
def test_importance_moves_the_error_to_where_it_does_not_matter(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((4, 64), generator=generator)
    importance = torch.rand(64, generator=generator) ** 4 + 1e-4
    weighted = search_weight(weight, importance, bits)
    plain = search_weight(weight, None, bits)
    expanded = importance.expand_as(weight)
    errors = [quantization_error(weight, expanded, item.scale, item.zero_point, bits) for item in (weighted, plain)]
    # The finer half of the grid starts from the coarser half's best: a weighted search may lose a little.
    assert float(errors[0].sum()) <= float(errors[1].sum()) * 1.05
    check_result(weighted, bits, 4)


def test_quantization_error_by_hand() -> None:
    values = torch.tensor([[0.0, 1.0, 2.4, 9.0], [-1.0, -0.5, 0.5, 1.5]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.0, 1.0]])
    # Row 0: codes 0 1 2 3, errors 0 0 0.4 6. Row 1: zero_point 1, codes -1 0 0 2 (ties to even), errors 0 .5 - .5.
    error = quantization_error(values, weights, torch.ones(2), torch.tensor([0, 1]), 2)
    torch.testing.assert_close(error, torch.tensor([(0.16 + 36) / 4, (2 * 0.25 + 0.25) / 4]).double())


@pytest.mark.parametrize("bits", ALL_BITS)
@given(seed=st.integers(0, 2**31))
@fixed
def test_minmax_clips_nothing_that_was_observed(bits: int, seed: int) -> None:
    values, weights = random_rows(seed)
    found = search_activation(values, weights, *extremes(values), bits, "minmax")
    check_result(found, bits, 5)
    scale, zero = found.scale.unsqueeze(1), found.zero_point.unsqueeze(1)
    codes = torch.round(values / scale) + zero
    # The zero point is rounded, so the far end may lie one code outside, never two.
    assert int(codes.min()) >= -1
    assert int(codes.max()) <= 2**bits
    searched = search_activation(values, weights, *extremes(values), bits)
    if bits < 8:
        assert bool((searched.error <= found.error).all())


@pytest.mark.parametrize("bits", range(2, 8))
@given(seed=st.integers(0, 2**31))
@fixed
def test_a_gain_gives_values_their_length_back(bits: int, seed: int) -> None:
    values, weights = random_rows(seed)
    found = search_activation(values, weights, *extremes(values), bits, "unbiased")
    gain = length_gain(values, weights, found.scale, found.zero_point, bits)
    low = -found.zero_point.unsqueeze(1)
    codes = torch.minimum(torch.maximum(torch.round(values / found.scale.unsqueeze(1)), low), low + 2**bits - 1)
    told = codes * (found.scale * gain).unsqueeze(1)
    along, power = (weights * values * told).sum(dim=1), (weights * values.square()).sum(dim=1)
    held = gain < 2  # the outlier of one row is clipped to almost nothing
    torch.testing.assert_close(along[held], power[held], rtol=1e-4, atol=0.0)
    assert bool(held[[0, 1, 2, 4]].all()) or bits < 4


def test_rows_that_say_nothing_have_no_gain() -> None:
    values = torch.tensor([[0.0, 0.0], [0.1, -0.1], [3.0, 0.0]])
    gain = length_gain(values, torch.ones(3, 2), torch.ones(3), torch.zeros(3, dtype=torch.int64), 2)
    assert gain.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bits", [4, 8])
def test_unbiased_ranges_clip_less_than_those_of_least_error_but_at_8_bits(bits: int) -> None:
    values, weights = random_rows(7)
    least = search_activation(values, weights, *extremes(values), bits)
    wider = search_activation(values, weights, *extremes(values), bits, "unbiased")
    assert torch.equal(wider.zero_point, least.zero_point)
    if bits == 8:
        assert torch.equal(wider.scale, least.scale)
    else:
        assert bool((wider.scale > least.scale).all())
        torch.testing.assert_close(
            wider.error, quantization_error(values, weights, wider.scale, wider.zero_point, bits)
        )


def test_minmax_weights_use_the_whole_range() -> None:
    weight = torch.tensor([[-3.0, 0.1, 1.0], [0.5, 2.0, 7.0]])
    found = search_weight(weight, None, 4, "minmax")
    torch.testing.assert_close(found.scale, torch.tensor([4.0 / 15, 7.0 / 15]))
    assert found.zero_point.tolist() == [11, 0]
