"""Row bits are the best within their mean, and never above it."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.row_allocation import Table, allocate_rows, allocate_tables, offset_costs
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import ActivationQuant, IntArray, WeightQuant

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


@st.composite
def some_tables(draw: st.DrawFn) -> dict[str, Table]:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    widths = draw(st.sampled_from([(2, 3, 4), (2, 4), (3, 4, 5, 6)]))
    tables = {}
    for name in ("a", "b")[: draw(st.integers(1, 2))]:
        rows = draw(st.integers(1, 2))
        errors = {bits: random.uniform(0.5, 1.5, rows) * 4.0**-bits for bits in widths}
        together = {bits: float(random.uniform(0.1, 4.0) * values.sum()) for bits, values in errors.items()}
        before = random.choice(widths, rows).astype(np.int64)
        tables[name] = Table(errors, together, random.uniform(0.5, 3.0, rows), before)
    return tables


def error_of(tables: dict[str, Table], widths: Mapping[str, IntArray]) -> float:
    return sum(
        table.coherence * table.errors[int(bits)][row]
        for name, table in tables.items()
        for row, bits in enumerate(widths[name])
    )


def cost_of(tables: dict[str, Table], widths: Mapping[str, IntArray]) -> float:
    return sum(float((table.cost * widths[name]).sum()) for name, table in tables.items())


@given(some_tables(), st.sampled_from([0.0, 0.7]))
def test_tables_stay_within_their_cost_and_the_gap_is_true(tables: dict[str, Table], spare: float) -> None:
    found = allocate_tables(tables, spare)
    before = {name: table.before for name, table in tables.items()}
    limit = cost_of(tables, before) + spare
    assert cost_of(tables, found.widths) <= limit * (1 + 1e-9)
    left = error_of(tables, found.widths)
    assert found.predicted == pytest.approx(left / error_of(tables, before))
    assert found.predicted <= 1 + 1e-12
    if found.predicted < 1:
        rows = [(name, sorted(table.errors)) for name, table in tables.items() for _ in table.before]
        best = min(
            error_of(tables, widths)
            for choice in product(*(able for _, able in rows))
            if cost_of(tables, widths := _by_table(rows, choice)) <= limit * (1 + 1e-9)
        )
        assert best >= left * (1 - found.gap) - 1e-12


def _by_table(rows: list[tuple[str, list[int]]], choice: tuple[int, ...]) -> dict[str, IntArray]:
    names = dict.fromkeys(name for name, _ in rows)
    return {name: np.array([bits for (of, _), bits in zip(rows, choice, strict=True) if of == name]) for name in names}


def test_a_table_whose_errors_add_up_gets_more_bits() -> None:
    def table(together: float) -> Table:
        errors = {bits: np.full(4, 4.0**-bits) for bits in (2, 3, 4, 5, 6)}
        sums = {bits: together * float(values.sum()) for bits, values in errors.items()}
        return Table(errors, sums, np.ones(4), np.full(4, 4))

    assert table(0.0).coherence == 0.5
    assert table(9.0).coherence == 3
    found = allocate_tables({"alone": table(0.1), "adding up": table(16.0)})
    assert found.widths["adding up"].sum() > found.widths["alone"].sum()


def test_rows_that_no_step_reads_keep_their_bits() -> None:
    errors = {bits: np.array([1.0, 100.0, 1.0]) * 4.0**-bits for bits in (2, 3, 4, 5, 6, 7)}
    sums = {bits: float(values.sum()) for bits, values in errors.items()}
    found = allocate_tables({"tensor": Table(errors, sums, np.array([1.0, 1.0, 0.0]), np.array([4, 4, 4]))})
    assert found.widths["tensor"].tolist() == [2, 6, 4]


def test_widths_that_were_never_offered_may_be_left() -> None:
    errors = {bits: np.full(2, 4.0**-bits) for bits in (2, 4)}
    sums = {bits: float(values.sum()) for bits, values in errors.items()}
    found = allocate_tables({"tensor": Table(errors, sums, np.ones(2), np.array([3, 3]))})
    assert found.predicted is None
    assert sorted(found.widths["tensor"].tolist()) == [2, 4]
    # and where everything offered costs more than what there is, nothing changes
    narrow = allocate_tables({"tensor": Table({4: errors[4]}, {4: sums[4]}, np.ones(2), np.array([3, 3]))})
    assert narrow.widths["tensor"].tolist() == [3, 3]
