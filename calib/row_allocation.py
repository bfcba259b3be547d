"""Activation bits a timestep row: more where an error shows in the picture, fewer elsewhere, the mean kept.

DMQ gives each timestep group its own allocation. A row's bits are nothing but the ends of its clip in the table, so
that they cost a deployed graph nothing. `allocate_rows` finds one offset a row for all layers: the error a step makes
in the picture is (its error of the predicted noise) × (what such an error does to the picture); both are measured.
`allocate_tables` finds the bits of every tensor in every row by what its rounding does to where trajectories end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from calib.freeze import RowBits
from calib.pareto import Point, lower_hull, pool
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import MAX_BITS, IntArray

FloatVector = npt.NDArray[np.float64]
_LEAST_COHERENT = 0.25  # errors that cancel over the rows are trusted to this far
_UNITS = 8  # of a bit, in which budgets are counted; what does not divide is rounded up


@dataclass(frozen=True)
class RowAllocation:
    """row_bits; predicted distortion of the pictures with it and with even rows (sums over steps)."""

    row_bits: RowBits
    predicted: float
    predicted_even: float


def offset_costs(plan: QuantPlan, macs: Mapping[str, int], offsets: Sequence[int]) -> dict[int, float]:
    """Offset → bits that it really adds to the mean over layers, weighted by multiply-accumulates (`macs` by layer).

    Rows stay between 2 and 7 bits: where a layer has 3, an offset of -2 saves only one. Only layers whose rows may
    differ count, as in `RowBits.widths`; without any, nothing is added.
    """
    share = np.full(plan.rows, 1 / plan.rows, dtype=np.float32)
    added = dict.fromkeys(offsets, 0.0)
    total = 0
    for layer in plan.layers:
        activation = layer.segments[0].activation
        if activation is None or activation.rows == 1 or activation.bits == MAX_BITS:
            continue
        total += macs[layer.name]
        for offset in offsets:
            widths = RowBits(np.full(plan.rows, offset, dtype=np.int64), share).widths(activation.bits, plan.rows)
            added[offset] += macs[layer.name] * float(widths[0] - activation.bits)
    return {offset: value / max(total, 1) for offset, value in added.items()}


def allocate_rows(
    errors: Mapping[int, FloatVector],
    weights: FloatVector,
    step_rows: Sequence[int],
    costs: Mapping[int, float] | None = None,
) -> RowAllocation:
    """Least Σ_s weights[s] · errors[offset of the row of s][s] with mean costs over steps of at most 0; exact.

    Squares are summed, as if steps erred independently. Summing amplitudes instead was tried: it takes two bits from
    the last step, and the pictures of the bundled model at W4A4 came out 0.9 dB worse.
    errors: offset → mean squared error of the predicted noise a step, float64 [steps]; weights: float64 [steps];
    step_rows: the table row of every sampling step; costs: bits that an offset adds (`offset_costs`), None: the offset
    itself; counted in eighths, rounded up. Dynamic programming over rows and the sum of costs. Raises CalibrationError
    when offset 0 was not measured.
    """
    if 0 not in errors:
        raise CalibrationError(f"row bits: offset 0 must be measured, got offsets {sorted(errors)}")
    units = {offset: ceil(_UNITS * (offset if costs is None else costs[offset]) - 1e-9) for offset in errors}
    rows = np.asarray(step_rows)
    present = np.unique(rows)
    # best[total] = (distortion, offsets so far); total: Σ over steps of the cost, in units.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in present:
        steps = np.flatnonzero(rows == row)
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, (distortion, chosen) in best.items():
            for offset in sorted(errors):
                sum_ = total + units[offset] * len(steps)
                cost = distortion + float((weights[steps] * errors[offset][steps]).sum())
                if sum_ not in reached or cost < reached[sum_][0]:
                    reached[sum_] = (cost, (*chosen, offset))
        best = reached
    predicted, chosen = min(value for total, value in best.items() if total <= 0)
    count = int(rows.max()) + 1
    offsets: IntArray = np.zeros(count, dtype=np.int64)
    offsets[present] = chosen
    share = (np.bincount(rows, minlength=count) / len(rows)).astype(np.float32)
    return RowAllocation(RowBits(offsets, share), predicted, float((weights * errors[0]).sum()))


@dataclass(frozen=True)
class Table:
    """One tensor, to `allocate_tables`. errors: bits → float64 [rows]; together: bits → the error of all rows at once;
    cost: what a bit costs in each row, float64 [rows], 0 where no step reads it; before: int64 [rows], its bits so far.
    """

    errors: Mapping[int, FloatVector]
    together: Mapping[int, float]
    cost: FloatVector
    before: IntArray

    @property
    def coherence(self) -> float:
        """What the tensor's errors count for beyond their sum over the rows: the geometric mean of 1 and of how much
        more (or less) they do together. Taking all of that, or none, was worse on trajectories that had no part in it.
        """
        alone = sum(float(row.sum()) for row in self.errors.values())
        both = sum(self.together.values())
        return float(max(both / max(alone, 1e-300), _LEAST_COHERENT) ** 0.5)


@dataclass(frozen=True)
class TableAllocation:
    """widths: tensor → bits of every row, int64 [rows]; predicted: the error left, as a share of what was before, None
    where that was never measured; gap: at most this share of it could be saved."""

    widths: Mapping[str, IntArray]
    predicted: float | None
    gap: float


def allocate_tables(tables: Mapping[str, Table], spare: float = 0.0) -> TableAllocation:
    """The bits of every tensor in every row that leave the least error at no more cost than before, or `spare` more.

    Rows that cost nothing keep their bits. What an error counts for is its tensor's `coherence`. Convex hulls of every
    tensor and row, their edges taken steepest first, those left that no longer fit (DMQ's slopes); the first of those
    bounds what any choice could save.
    """
    items = [(name, int(row)) for name, table in tables.items() for row in np.flatnonzero(table.cost > 0)]
    hulls: list[list[Point[int]]] = []
    limit, start, known = spare, 0.0, True
    for name, row in items:
        table = tables[name]
        unit, before = float(table.cost[row]), int(table.before[row])
        curve = {bits: table.coherence * float(values[row]) for bits, values in table.errors.items()}
        limit, start, known = limit + unit * before, start + curve.get(before, 0.0), known and before in curve
        hulls.append(lower_hull([Point(unit * bits, error, bits) for bits, error in curve.items()]))
    widths = {name: table.before.copy() for name, table in tables.items()}
    at = [0] * len(hulls)
    used, left = sum(hull[0].rate for hull in hulls), sum(hull[0].distortion for hull in hulls)
    bound: float | None = None
    for step in pool(hulls):
        if at[step.curve] != step.vertex - 1:
            continue
        here, there = hulls[step.curve][step.vertex - 1 : step.vertex + 1]
        if used + there.rate - here.rate > limit * (1 + 1e-12):
            bound = left - step.slope * (limit - used) if bound is None else bound
            continue
        used, left = used + there.rate - here.rate, left + there.distortion - here.distortion
        at[step.curve] = step.vertex
    if used > limit * (1 + 1e-9) or (known and left >= start):
        return TableAllocation(widths, 1.0, 0.0)  # what is offered costs more, or nothing better was found
    for (name, row), hull, vertex in zip(items, hulls, at, strict=True):
        widths[name][row] = hull[vertex].choice
    gap = 0.0 if bound is None else max(0.0, (left - bound) / max(left, 1e-300))
    return TableAllocation(widths, left / max(start, 1e-300) if known else None, gap)
