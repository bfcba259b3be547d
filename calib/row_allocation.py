"""Activation bits a timestep row: more where an error shows in the picture, fewer elsewhere, the mean kept.

DMQ gives each timestep group its own allocation. Here a group's bits are one offset for all layers, and a row's bits
are nothing but the ends of its clip in the table, so that they cost a deployed graph nothing. The error a step makes
in the picture is (its error of the predicted noise) × (what such an error does to the picture); both are measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calib.freeze import RowBits
from dmqexport.errors import CalibrationError
from dmqexport.quant_types import IntArray

FloatVector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowAllocation:
    """row_bits; predicted distortion of the pictures with it and with even rows (sums over steps)."""

    row_bits: RowBits
    predicted: float
    predicted_even: float


def allocate_rows(errors: Mapping[int, FloatVector], weights: FloatVector, step_rows: Sequence[int]) -> RowAllocation:
    """Least Σ_s weights[s] · errors[offset of the row of s][s] with a mean offset over steps of at most 0; exact.

    Squares are summed, as if steps erred independently. Summing amplitudes instead was tried: it takes two bits from
    the last step, and the pictures of the bundled model at W4A4 came out 0.9 dB worse.
    errors: offset → mean squared error of the predicted noise a step, float64 [steps]; weights: float64 [steps];
    step_rows: the table row of every sampling step. Dynamic programming over rows and the sum of offsets. Raises
    CalibrationError when offset 0 was not measured.
    """
    if 0 not in errors:
        raise CalibrationError(f"row bits: offset 0 must be measured, got offsets {sorted(errors)}")
    rows = np.asarray(step_rows)
    present = np.unique(rows)
    # best[total] = (distortion, offsets so far); total: Σ over steps of the offset.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in present:
        steps = np.flatnonzero(rows == row)
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, (distortion, chosen) in best.items():
            for offset in sorted(errors):
                sum_ = total + offset * len(steps)
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
