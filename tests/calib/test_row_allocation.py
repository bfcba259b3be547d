"""Row bits are the best within their mean, and never above it."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.row_allocation import allocate_rows
from dmqexport.errors import CalibrationError

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
