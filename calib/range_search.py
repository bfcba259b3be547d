"""Ranges by least weighted squared error, searched over both ends at once and vectorized over rows or channels."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmqexport.quant_types import CENTERED_ZERO_POINT, MAX_BITS

# Fractions of the observed extreme that an end may shrink to; denser near 1, where most optima of 6 and 8 bits lie.
_COARSE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64, 0.56, 0.48, 0.4, 0.32, 0.24, 0.16, 0.08)
_FINE = (0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1)
_QUICK = (0.93, 0.86, 0.79, 0.72, 0.64, 0.56, 0.48, 0.4, 0.3, 0.2)
# Values searched at once: an operation on so few runs in the calling thread and in its processor's cache.
_CACHED = 32768
# Of longer rows, the coarse grid sees only so many values; the fine one sees all.
_LONG = 4096
# Where the scale is fitted to the codes afterwards, rows longer than the first are searched by the quick candidates and
# then the fine ones, which see only as many columns as the second and the third.
_SHORT, _QUICK_COLUMNS, _FITTED_COLUMNS = 512, 2048, 4096
# A shifted 8-bit tensor costs an addition on both sides of the operator; it must pay for it.
_SHIFT_MUST_GAIN = 0.8

# Beyond ranges of least squared error: what they clip is clipped at every step, and in every layer, the same way. Where
# trajectories of the bundled model end it counts for fifteen times its own error, what is rounded for one and a half.
_WIDER = 1.1
_MOST_GAIN = 2.0

#: mse: the range of least weighted squared error; unbiased: activations of up to 7 bits get somewhat wider ranges, and
#: values get back the length that clipping and rounding take (`length_gain`); minmax: everything that was observed.
RangeMethod = Literal["mse", "unbiased", "minmax"]


@dataclass(frozen=True)
class RangeResult:
    """scale float32 [rows], zero_point int64 [rows], error float64 [rows] (weighted mean of squared error)."""

    scale: Tensor
    zero_point: Tensor
    error: Tensor


def quantization_error(values: Tensor, weights: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Weighted mean squared error of every row. values, weights [rows, n]; scale, zero_point [rows]. Returns [rows]."""
    return _errors(values, weights, scale.unsqueeze(0), zero_point.unsqueeze(0), bits)[0]


def _errors(values: Tensor, weights: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """Weighted mean squared error of every row with each of several quantizers, float64 [candidates, rows].

    values, weights float32 [rows, n]; scales float32 and zero_points int64 [candidates, rows].
    """
    lows = -zero_points.to(values.dtype).unsqueeze(2)
    highs, steps = lows + (2**bits - 1), scales.unsqueeze(2)
    total = torch.zeros(scales.shape, dtype=torch.float64)
    columns = max(1, _CACHED // len(values))
    for part, part_weights in zip(values.split(columns, dim=1), weights.split(columns, dim=1), strict=True):  # type: ignore[no-untyped-call]
        sums, codes = torch.empty(scales.shape), torch.empty_like(part)
        for step, low, high, row_sums in zip(steps, lows, highs, sums, strict=True):
            torch.div(part, step, out=codes)
            torch.round(codes, out=codes)
            torch.maximum(codes, low, out=codes)  # clamp_ with tensors takes four times as long
            torch.minimum(codes, high, out=codes)
            torch.sum(codes.mul_(step).sub_(part).square_().mul_(part_weights), dim=1, out=row_sums)
        total += sums
    return total / weights.sum(dim=1, dtype=torch.float64).clamp_min(1e-30)


def search_asymmetric(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    """Best (scale, zero_point) of each row. values, weights float32 [rows, n]; low, high [rows] observed extremes.

    The range always holds zero, so that zero has a code. One-sided tensors keep their zero end and search the other.
    """
    return _by_rows(_search_asymmetric, values, weights, low, high, bits)


def search_centered(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    """Best symmetric scale of each row, zero_point fixed at half the codes. Arguments as in `search_asymmetric`."""
    return _by_rows(_search_centered, values, weights, low, high, bits)


def _by_rows(
    search: Callable[..., RangeResult],
    values: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
) -> RangeResult:
    """`search` of a few rows at a time: they stay in the processor's cache through hundreds of candidates, and memory
    is bounded. Rows do not know of each other, so the result is that of all at once."""
    size = max(1, _CACHED // max(1, values.shape[1]))
    parts = [part.split(size) for part in (values, weights, low, high)]  # type: ignore[no-untyped-call]  # torch's own
    threads = min(torch.get_num_threads(), len(parts[0]))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda part: search(*part, bits), zip(*parts, strict=True)))
    else:
        found = [search(*part, bits) for part in zip(*parts, strict=True)]
    return RangeResult(
        torch.cat([part.scale for part in found]),
        torch.cat([part.zero_point for part in found]),
        torch.cat([part.error for part in found]),
    )


def _search_asymmetric(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    ends = (low.clamp(max=0.0), high.clamp(min=0.0))
    columns = _spread(values.shape[1], _LONG)
    coarse = (values, weights) if columns is None else (values[:, columns].contiguous(), weights[:, columns])
    for grid, seen in ((_COARSE, coarse), (_FINE, (values, weights))):
        lows = grid if bool((low < 0).any()) else (1.0,)
        highs = grid if bool((high > 0).any()) else (1.0,)
        ends = _best_ends(*seen, ends, [(left, right) for left in lows for right in highs], bits)
    return _evaluate(values, weights, *ends, bits)


def _best_ends(
    values: Tensor,
    weights: Tensor,
    ends: tuple[Tensor, Tensor],
    shrinks: Sequence[tuple[float, float]],
    bits: int,
) -> tuple[Tensor, Tensor]:
    """The ends (low, high) [rows] of least error: as they are, or shrunk by one of the pairs of factors."""
    factors = torch.tensor([(1.0, 1.0), *shrinks])
    candidates = ends[0] * factors[:, :1], ends[1] * factors[:, 1:]
    best = _errors(values, weights, *_quantizers(*candidates, bits), bits).argmin(dim=0, keepdim=True)
    return candidates[0].gather(0, best)[0], candidates[1].gather(0, best)[0]


def _spread(length: int, most: int) -> Tensor | None:
    """Which columns of a very long row settle where its range about is; None where all of them do."""
    return None if length <= most else torch.arange(most) * length // most


def _search_centered(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    extreme = torch.maximum(-low, high).clamp_min(1e-12)
    # Shrink 1 keeps both ends (values on an integer grid stay as they are); a slightly smaller scale uses the code that
    # the negative end has more. Denser near 1, where 8-bit optima lie.
    shrink = torch.cat([torch.linspace(1.0, 0.9, 41), torch.linspace(0.89, 0.08, 54)]).unsqueeze(1)
    scales = (extreme * shrink / (2 ** (bits - 1) - 1)).to(torch.float32)
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int64)
    error, best = _errors(values, weights, scales, zeros, bits).min(dim=0)
    return RangeResult(scales.gather(0, best.unsqueeze(0))[0], zeros[0], error)


def quick_range(values: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale float32 [rows], zero_point int64 [rows]) of low error, one end of the range searched after the other.

    A tenth of the work of `search_asymmetric`: enough to rank channel factors, which is all it is for. Both [rows, n].
    """
    low, high = values.amin(dim=1), values.amax(dim=1)
    found = _by_rows(_search_quickly, values, weights, low, high, bits)
    return found.scale, found.zero_point


def _search_quickly(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    scale, zero_point = _quantizers(*_quick_ends(values, weights, low, high, bits), bits)
    return RangeResult(scale, zero_point, torch.zeros(len(scale), dtype=torch.float64))


def _quick_ends(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    ends = (low.clamp_max(0.0), high.clamp_min(0.0))
    ends = _best_ends(values, weights, ends, [(shrink, shrink) for shrink in _QUICK], bits)
    ends = _best_ends(values, weights, ends, [(shrink, 1.0) for shrink in _QUICK], bits)
    return _best_ends(values, weights, ends, [(1.0, shrink) for shrink in _QUICK], bits)


def search_fitted(weight: Tensor, importance: Tensor, bits: int) -> RangeResult:
    """`search_weight` for codes that a scale is fitted to afterwards: for long rows a third of its work, and as good.

    Errors are those of a sample of columns where there are many; extremes are those of all.
    """
    if weight.shape[1] <= _SHORT:
        return search_weight(weight, importance, bits)
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    columns = _spread(weight.shape[1], _FITTED_COLUMNS)
    if columns is not None:
        weight, importance = weight[:, columns], importance[columns]
    search = _search_centered if bits == MAX_BITS else _search_fitted
    return _by_rows(search, weight, importance.expand_as(weight), low, high, bits)


def _search_fitted(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    columns = _spread(values.shape[1], _QUICK_COLUMNS)
    some = (values, weights) if columns is None else (values[:, columns].contiguous(), weights[:, columns])
    ends = _quick_ends(*some, low, high, bits)
    ends = _best_ends(values, weights, ends, [(left, right) for left in _FINE for right in _FINE], bits)
    return _evaluate(values, weights, *ends, bits)


def search_activation(
    values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int, search: RangeMethod = "mse"
) -> RangeResult:
    """Best quantizer of an activation with all rows in one form (centered or shifted at 8 bits)."""
    if search == "minmax":
        return span_activation(values, weights, low, high, bits)
    if bits < MAX_BITS:
        found = search_asymmetric(values, weights, low, high, bits)
        if search == "mse":
            return found
        scale = found.scale * _WIDER
        return RangeResult(scale, found.zero_point, quantization_error(values, weights, scale, found.zero_point, bits))
    centered = search_centered(values, weights, low, high, bits)
    shifted = search_asymmetric(values, weights, low, high, bits)
    gain = float(shifted.error.sum()) / max(float(centered.error.sum()), 1e-30)
    return shifted if gain < _SHIFT_MUST_GAIN else centered


def length_gain(values: Tensor, weights: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """What the values of codes must be multiplied with, in every row, so that Σ x · value = Σ x²; float32 [rows].

    Clipping and rounding to the nearest leave x̂ = αx + noise with α < 1: of normal values 1 % is missing at 4 bits,
    15 % at 2. A sampler's steps add such an error up, where they forget noise. values, weights [rows, n];
    scale, zero_point [rows]. 1 where a row has nothing but zeros, or none of its codes says anything.
    """
    low = -zero_point.unsqueeze(1)
    codes = torch.minimum(torch.maximum(torch.round(values / scale.unsqueeze(1)), low), low + 2**bits - 1)
    along = (weights * values * codes * scale.unsqueeze(1)).sum(dim=1, dtype=torch.float64)
    power = (weights * values.square()).sum(dim=1, dtype=torch.float64)
    known = (along > 0) & (power > 0)
    gain = torch.where(known, power / along.clamp_min(1e-30), torch.ones_like(power))
    return gain.clamp(1 / _MOST_GAIN, _MOST_GAIN).to(torch.float32)


def search_unsigned(
    values: Tensor, weights: Tensor, high: Tensor, bits: int, search: RangeMethod = "mse"
) -> RangeResult:
    """Best scale of each row of a tensor that is never negative, such as probabilities; zero_point 0 in every row."""
    find = search_asymmetric if search == "mse" else _evaluate
    return find(values, weights, torch.zeros_like(high), high, bits)


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
    importance = torch.ones(values.shape[1]) if importance is None else importance.to(torch.float32)
    weights = importance.expand_as(values)
    low, high = values.amin(dim=1), values.amax(dim=1)
    if search == "minmax":
        return span_activation(values, weights, low, high, bits)
    if bits == MAX_BITS:
        result = search_centered(values, weights, low, high, bits)
        assert int(result.zero_point[0]) == CENTERED_ZERO_POINT
        return result
    return search_asymmetric(values, weights, low, high, bits)


def _quantizers(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale float32, zero_point int64) of ranges, same shape."""
    levels = 2**bits - 1
    # A dead tensor (all zero) still needs a positive scale.
    scale = ((high - low) / levels).clamp_min(1e-12).to(torch.float32)
    return scale, torch.round(-low / scale).clamp(0, levels).to(torch.int64)


def _evaluate(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    scale, zero_point = _quantizers(low, high, bits)
    return RangeResult(scale, zero_point, quantization_error(values, weights, scale, zero_point, bits))


def _span_centered(values: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int) -> RangeResult:
    zero = torch.full(low.shape, 2 ** (bits - 1), dtype=torch.int64)
    extreme = torch.maximum(-low, high).clamp_min(1e-12)
    scale = (extreme / (2 ** (bits - 1) - 1)).to(torch.float32)
    return RangeResult(scale, zero, quantization_error(values, weights, scale, zero, bits))
