"""What a global distillation draws and punishes: steps by their share, guidance that is too short or too long."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.network_distill import GuidanceLength, _spread


def calls(sizes: list[int]) -> list[Tensor]:
    """Calls of each step, [calls, halves], entries numbered through."""
    bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    return [torch.arange(2 * a, 2 * b).reshape(-1, 2) for a, b in pairwise(bounds)]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_steps_are_drawn_by_their_share(sizes: list[int], count: int, iteration: int) -> None:
    table = calls(sizes)
    shares = torch.rand(len(sizes), generator=torch.Generator().manual_seed(iteration)) + 0.01
    shares = shares / shares.sum()
    drawn = _spread(table, shares, iteration, 2 * count, 0)
    assert drawn.shape == (count, 1, 2)
    assert torch.equal(drawn, _spread(table, shares, iteration, 2 * count, 0)), "a resumed run sees the same batches"
    for step, found in enumerate(table):
        rows = [row.tolist() for row in drawn[:, 0] if row.tolist() in found.tolist()]
        expected = float(shares[step]) * count
        assert abs(len(rows) - expected) < 1 + 1e-3, "stratified: off by less than one call in every batch"
        if len(rows) <= len(found):
            assert len({tuple(row) for row in rows}) == len(rows), "no call twice while there are others"


def test_over_many_batches_the_shares_are_kept() -> None:
    table, shares = calls([3, 3, 3]), torch.tensor([0.05, 0.15, 0.8])
    drawn = torch.cat([_spread(table, shares, iteration, 8, 1) for iteration in range(400)])
    counts = torch.bincount(drawn[:, 0, 0] // 6, minlength=3) / len(drawn)
    assert torch.allclose(counts, shares, atol=0.02)


def length_of(factor: float, guidance: float = 3.0, steps: int = 2) -> tuple[GuidanceLength, Tensor]:
    difference = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(factor, requires_grad=True)
    error = guidance * (scale - 1) * difference
    length = GuidanceLength(steps)
    step = torch.arange(8) % steps
    length.penalty(error, difference, step, torch.ones(8), guidance).backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    return length, scale.grad


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
def test_the_excess_length_is_what_it_is_called(factor: float) -> None:
    length, gradient = length_of(factor)
    assert length.mean.tolist() == pytest.approx([factor - 1] * 2, abs=1e-6)
    # The mean of its squares over steps is (factor - 1)², whose derivative is 2 (factor - 1).
    assert float(gradient) == pytest.approx(2 * (factor - 1), abs=1e-4)


def test_only_a_bias_is_punished() -> None:
    length = GuidanceLength(1)
    difference = torch.ones(2, 4)
    error = torch.stack([torch.full((4,), 0.9), torch.full((4,), -0.9)]).requires_grad_()
    length.penalty(error, difference, torch.zeros(2, dtype=torch.int64), torch.ones(2), 3.0)
    assert float(length.mean[0]) == pytest.approx(0.0, abs=1e-6), "one too long, one too short: right on average"


def test_equal_halves_are_no_division_by_zero() -> None:
    length = GuidanceLength(1)
    value = length.penalty(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2), 3.0)
    assert torch.isfinite(value)


def test_least_squares_shortens_what_it_cannot_predict_and_the_penalty_lengthens_it() -> None:
    generator = torch.Generator().manual_seed(1)

    def trained(weight: float) -> float:
        """Slope of a linear answer to a noisy view of the difference, after some steps."""
        slope = torch.ones((), requires_grad=True)
        optimizer, length = torch.optim.SGD([slope], lr=0.02), GuidanceLength(1)
        for _ in range(300):
            difference = torch.randn(16, 8, generator=generator)
            seen = difference + 0.7 * torch.randn(16, 8, generator=generator)
            error = 3.0 * (slope * seen - difference)
            step = torch.zeros(16, dtype=torch.int64)
            loss = error.square().mean() / 9
            loss = loss + weight * length.penalty(error, difference, step, torch.ones(16), 3.0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return float(slope.detach())

    assert trained(0.0) == pytest.approx(1 / 1.49, abs=0.08)
    assert trained(20.0) == pytest.approx(1.0, abs=0.08)
