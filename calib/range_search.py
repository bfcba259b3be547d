"""Ranges by least weighted squared error, searched over both ends at once and vectorized over rows or channels."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmqexport.quant_types import CENTERED_ZERO_POINT, MAX_BITS

# Fractions of the observed extreme that an end may shrink to; denser near 1, where most optima of 6 and 8 bits lie.
_COARSE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64, 0.56, 0.48, 0.4, 0.32, 0.24, 0.16, 0.08)
_FINE = (0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1)
# A shifted 8-bit tensor costs an addition on both sides of the operator; it must pay for it.
_SHIFT_MUST_GAIN = 0.8

#: mse: the range of least weighted squared error; minmax: everything that was observed.
RangeMethod = Literal["mse", "minmax"]


@dataclass(frozen=True)
class RangeResult:
    """scale float32 [rows], zero_point int64 [rows], error float64 [rows] (weighted mean of squared error)."""

    scale: Tensor
    zero_point: Tensor
    error: Tensor


def quantization_error(values: Tensor, weights: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Weighted mean squared error of every row. values, weights [rows, n]; scale, zero_point [rows]. Returns [rows]."""
    lo = -zero_point.to(values.dtype).unsqueeze(1)
    hi = lo + (2**bits - 1)
    step = scale.unsqueeze(1)
    codes = torch.round(values / step).clamp_(lo, hi)
    error = codes.mul_(step).sub_(values).square_().mul_(weights)
    return error.sum(dim=1, dtype=torch.float64) / weights.sum(dim=1, dtype=torch.float64).clamp_min(1e-30)


def search_asymmetric(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    """Best (scale, zero_point) of each row. values, weights float32 [rows, n]; low, high [rows] observed extremes.

    The range always holds zero, so that zero has a code. One-sided tensors keep their zero end and search the other.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    best = _evaluate(values, weights, low, high, bits)
    ends = (low.clone(), high.clone())
    for grid in (_COARSE, _FINE):
        base_low, base_high = ends[0].clone(), ends[1].clone()
        lows = grid if bool((low < 0).any()) else (1.0,)
        highs = grid if bool((high > 0).any()) else (1.0,)
        for shrink_low in lows:
            for shrink_high in highs:
                candidate_low, candidate_high = base_low * shrink_low, base_high * shrink_high
                found = _evaluate(values, weights, candidate_low, candidate_high, bits)
                better = found.error < best.error
                best = _choose(better, found, best)
                ends = (torch.where(better, candidate_low, ends[0]), torch.where(better, candidate_high, ends[1]))
    return best


def search_centered(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    """Best symmetric scale of each row, zero_point fixed at half the codes. Arguments as in `search_asymmetric`."""
    zero = torch.full(low.shape, 2 ** (bits - 1), dtype=torch.int64)
    extreme = torch.maximum(-low, high).clamp_min(1e-12)
    largest = 2 ** (bits - 1) - 1
    best: RangeResult | None = None
    # Shrink 1 keeps both ends (values on an integer grid stay as they are); a slightly smaller scale uses the code that
    # the negative end has more. Denser near 1, where 8-bit optima lie.
    near, far = torch.linspace(1.0, 0.9, 41).tolist(), torch.linspace(0.89, 0.08, 54).tolist()
    for shrink in near + far:
        scale = (extreme * shrink / largest).to(torch.float32)
        found = RangeResult(scale, zero, quantization_error(values, weights, scale, zero, bits))
        best = found if best is None else _choose(found.error < best.error, found, best)
    assert best is not None
    return best


def search_activation(
    values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int, search: RangeMethod = "mse"
) -> RangeResult:
    """Best quantizer of an activation with all rows in one form (centered or shifted at 8 bits)."""
    if search == "minmax":
        return span_activation(values, weights, low, high, bits)
    if bits < MAX_BITS:
        return search_asymmetric(values, weights, low, high, bits)
    centered = search_centered(values, weights, low, high, bits)
    shifted = search_asymmetric(values, weights, low, high, bits)
    gain = float(shifted.error.sum()) / max(float(centered.error.sum()), 1e-30)
    return shifted if gain < _SHIFT_MUST_GAIN else centered


def span_activation(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    """Min-max: the whole observed range of every row, nothing clipped. Arguments as in `search_activation`.

    The baseline that every paper starts from; 8 bits are centered, the form that costs a graph nothing.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    return (_span_centered if bits == MAX_BITS else _evaluate)(values, weights, low, high, bits)


def search_weight(weight: Tensor, importance: Tensor | None, bits: int, search: RangeMethod = "mse") -> RangeResult:
    """Per-channel quantizer: best (`mse`) or whole range (`minmax`).

    weight [out, k]; importance [k] weighs the error of each input (mean of x²).
    """
    values = weight.to(torch.float32)
    weights = torch.ones_like(values) if importance is None else importance.to(torch.float32).expand_as(values)
    low, high = values.amin(dim=1), values.amax(dim=1)
    if search == "minmax":
        return span_activation(values, weights, low, high, bits)
    if bits == MAX_BITS:
        result = search_centered(values, weights, low, high, bits)
        assert int(result.zero_point[0]) == CENTERED_ZERO_POINT
        return result
    return search_asymmetric(values, weights, low, high, bits)


def _evaluate(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    levels = 2**bits - 1
    # A dead tensor (all zero) still needs a positive scale.
    scale = ((high - low) / levels).clamp_min(1e-12).to(torch.float32)
    zero_point = torch.round(-low / scale).clamp(0, levels).to(torch.int64)
    return RangeResult(scale, zero_point, quantization_error(values, weights, scale, zero_point, bits))


def _span_centered(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    zero = torch.full(low.shape, 2 ** (bits - 1), dtype=torch.int64)
    extreme = torch.maximum(-low, high).clamp_min(1e-12)
    scale = (extreme / (2 ** (bits - 1) - 1)).to(torch.float32)
    return RangeResult(scale, zero, quantization_error(values, weights, scale, zero, bits))


def _choose(better: Tensor, left: RangeResult, right: RangeResult) -> RangeResult:
    return RangeResult(
        torch.where(better, left.scale, right.scale),
        torch.where(better, left.zero_point, right.zero_point),
        torch.where(better, left.error, right.error),
    )
