"""Activation bits a timestep row: more where an error shows in the picture, fewer elsewhere, the mean kept.

DMQ gives each timestep group its own allocation. Here a group's bits are one offset for all layers, and a row's bits
are nothing but the ends of its clip in the table, so that they cost a deployed graph nothing. The error a step makes
in the picture is (its error of the predicted noise) × (what such an error does to the picture); both are measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from calib.freeze import RowBits
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import MAX_BITS, IntArray

FloatVector = npt.NDArray[np.float64]
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
