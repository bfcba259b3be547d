"""Second-order rounding: better than nearest in what it minimises, exact where nothing is to be gained."""

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.range_search import search_weight
from calib.second_order import fit_least_squares, round_second_order


def correlated(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width // 4, generator=generator) @ torch.randn(
        width // 4, width, generator=generator
    ) + 0.1 * torch.randn(count, width, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("width", [16, 160], ids=["one block", "two blocks"])
def test_output_error_is_smaller_than_with_nearest_rounding(bits: int, width: int) -> None:
    inputs = correlated(2000, width, seed=bits)
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(7))
    moment = inputs.T @ inputs
    codes, qparams = round_second_order(weight, [moment], bits)
    scale = torch.from_numpy(qparams.scale.copy()).unsqueeze(1)
    found = search_weight(weight, moment.diagonal() / moment.diagonal().mean(), bits)
    assert np.array_equal(found.scale.numpy(), qparams.scale)
    zero = found.zero_point.unsqueeze(1).float()
    nearest = torch.round(weight / scale).clamp(-zero, 2**bits - 1 - zero)

    def error(chosen: Tensor) -> float:
        return float((inputs @ (chosen * scale - weight).T).square().mean())

    assert error(codes) < 0.7 * error(nearest)
    assert bool((codes >= -zero).all() and (codes <= 2**bits - 1 - zero).all())
    assert torch.equal(codes, codes.round())


def test_independent_inputs_round_to_nearest() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
    codes, qparams = round_second_order(weight, [100 * torch.eye(12)], 4)
    scale, zero = torch.from_numpy(qparams.scale.copy()), torch.from_numpy(qparams.zero_point.copy()).float()
    expected = torch.round(weight / scale[:, None]).clamp(-zero[:, None], 15 - zero[:, None])
    assert torch.equal(codes, expected)


def test_refitting_lowers_the_output_error_of_noisy_inputs() -> None:
    inputs = correlated(4000, 32, seed=1)
    step = 2.0
    seen = torch.round(inputs / step) * step
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    fitted = fit_least_squares(weight, seen.T @ seen, inputs.T @ seen)
    target = inputs @ weight.T
    assert float((seen @ fitted.T - target).square().mean()) < 0.9 * float((seen @ weight.T - target).square().mean())


def test_exact_inputs_keep_the_weight() -> None:
    inputs = correlated(500, 16, seed=2)
    moment = inputs.T @ inputs
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(fit_least_squares(weight, moment, moment), weight, rtol=1e-3, atol=1e-3)
