"""Row bits are the best within their mean, and never above it."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.row_allocation import allocate_rows, offset_costs
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import ActivationQuant, WeightQuant

OFFSETS = (-1, 0, 1, 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_it_is_optimal_within_the_mean(step_rows: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    steps, weights = len(step_rows), random.uniform(0.1, 9.0, len(step_rows))
    # any curve, falling or not: the search must not rely on its shape
    errors = {offset: random.uniform(0.5, 1.5, steps) * 4.0**-offset for offset in OFFSETS}

    found = allocate_rows(errors, weights, step_rows)

    present = sorted(set(step_rows))
    best = min(
        sum(weights[s] * errors[choice[present.index(row)]][s] for s, row in enumerate(step_rows))
        for choice in product(OFFSETS, repeat=len(present))
        if sum(choice[present.index(row)] for row in step_rows) <= 0
    )
    offsets = found.row_bits.offsets
    assert sum(offsets[row] for row in step_rows) <= 0
    assert found.predicted == pytest.approx(best)
    reached = sum(weights[s] * errors[int(offsets[row])][s] for s, row in enumerate(step_rows))
    assert found.predicted == pytest.approx(reached)
    assert found.predicted <= found.predicted_even + 1e-9
    assert found.row_bits.share.sum() == pytest.approx(1, abs=1e-6)


def test_the_step_that_matters_gets_the_bits() -> None:
    errors = {offset: np.full(4, 4.0**-offset) for offset in (-1, 0, 1, 2, 3)}
    found = allocate_rows(errors, np.array([1.0, 1.0, 1.0, 100.0]), [0, 1, 2, 3])
    assert found.row_bits.offsets.tolist() == [-1, -1, -1, 3]


def test_the_offset_of_the_budget_must_be_measured() -> None:
    with pytest.raises(CalibrationError, match="offset 0"):
        allocate_rows({1: np.ones(2)}, np.ones(2), [0, 1])


def test_an_offset_that_cannot_be_taken_saves_nothing() -> None:
    # 2-bit rows cannot get narrower: without its real cost, the last step's three bits would look paid for.
    errors = {offset: np.full(4, 4.0 ** -max(offset, 0)) for offset in (-1, 0, 1, 2, 3)}
    weights = np.array([1.0, 1.0, 1.0, 100.0])
    assert allocate_rows(errors, weights, [0, 1, 2, 3]).row_bits.offsets[3] == 3
    real = {-1: 0.0, 0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}
    found = allocate_rows(errors, weights, [0, 1, 2, 3], real)
    assert sum(real[offset] for offset in found.row_bits.offsets.tolist()) <= 0
    assert found.predicted == found.predicted_even


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((4, 4), {-2: -2.0, -1: -1.0, 0: 0.0, 1: 1.0, 3: 3.0}),
        ((3, 3), {-2: -1.0, -1: -1.0, 0: 0.0, 1: 1.0, 3: 3.0}),
        ((2, 4), {-2: -1.5, -1: -0.75, 0: 0.0, 1: 1.0, 3: 3.0}),  # the second layer does three quarters of the work
        ((4, 8), {-2: -2.0, -1: -1.0, 0: 0.0, 1: 1.0, 3: 3.0}),  # 8-bit tensors do not vary and do not count
        ((8, 8), {-2: 0.0, -1: 0.0, 0: 0.0, 1: 0.0, 3: 0.0}),
    ],
)
def test_offsets_cost_what_they_really_add(widths: tuple[int, int], expected: dict[int, float]) -> None:
    weight = WeightQuant(4, np.ones(2, np.float32), np.full(2, 8))
    layers = tuple(
        LayerQuant(
            name, LayerOp.LINEAR, (Segment(0, 2, weight, ActivationQuant.from_rows(bits, [0.5, 0.25], [1, 1])),), 4
        )
        for name, bits in zip("ab", widths, strict=True)
    )
    plan = QuantPlan("model", "w4a4", np.array([0, 1]), 2, layers)
    assert offset_costs(plan, {"a": 1, "b": 3}, tuple(expected)) == expected
