"""Weight dilation: the largest per-channel factors that leave every output channel's weight range as it is.

Dividing channel k of an activation by s_k and multiplying column k of the weight by s_k changes nothing in float. As
long as no column grows past the extremes of its output channels, the weight's scales stay what they were and the
narrower activation is pure gain (DilateQuant, Eq. 12 to 14 and Algorithm 1). A column that holds an extreme of some
output channel is saturated (the paper's set A) and keeps a factor of one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

#: Dead columns could grow without end; a factor this large already takes their activation out of the range.
LARGEST_FACTOR = 64.0


def dilation_factors(weights: Sequence[Tensor], *, symmetric: bool = False, cap: float = LARGEST_FACTOR) -> Tensor:
    """Largest s [channels], 1 <= s <= `cap`, with which every weight times s stays within its own range.

    weights: float tensors [out, channels, ...] of all readers of one tensor, which share s. With W_max >= 0 >= W_min of
    each output channel (over its columns and kernel taps), s_k is the least of W_max / W where W is positive and of
    W_min / W where it is negative; `symmetric` takes max|W| for both, which is the range of a symmetric quantizer and
    frees more columns. A column of zeros gets `cap`.
    """
    used = torch.stack([_used_share(weight, symmetric) for weight in weights]).amax(dim=0)
    # Division before the clamp would be infinite for a dead column.
    return (1.0 / used.clamp_min(1.0 / cap)).clamp_min(1.0)


def _used_share(weight: Tensor, symmetric: bool) -> Tensor:
    """How much of its output channels' range every column uses at most, [channels] in 0 … 1."""
    flat = weight.detach().flatten(2) if weight.ndim > 2 else weight.detach().unsqueeze(2)
    high = flat.amax(dim=(1, 2)).clamp_min(0.0)
    low = flat.amin(dim=(1, 2)).clamp_max(0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    tiny = torch.finfo(flat.dtype).tiny  # 0 / 0 in an output channel without positive (or negative) weights is 0
    up = flat.amax(dim=2).clamp_min(0.0) / high.clamp_min(tiny).unsqueeze(1)
    down = flat.amin(dim=2).clamp_max(0.0) / low.clamp_max(-tiny).unsqueeze(1)
    return torch.maximum(up, down).amax(dim=0)


def scaled_columns(weight: Tensor, factor: Tensor) -> Tensor:
    """`weight` [out, channels, ...] with column k multiplied by factor[k]."""
    return weight * factor.to(weight.dtype).reshape(1, -1, *([1] * (weight.ndim - 2)))


@dataclass(frozen=True)
class ScalingEffect:
    """What factors did to one tensor and its readers (DilateQuant, Table 8); every ratio is after / before.

    grown: proportion of channels with s > 1. weight_scale: mean ratio of the readers' min-max weight scales (Δ'w/Δw).
    activation_scale: mean ratio of the activation scales of least squared error (Δ'x/Δx). clip_error: ratio of what
    clipping costs, in codes (E'clip/Eclip), 1 where nothing was clipped before. output_error: ratio of the readers'
    squared output error.
    """

    grown: float
    weight_scale: float
    activation_scale: float
    clip_error: float
    output_error: float

    def rounded(self) -> dict[str, float]:
        """As written to `quant_plan.json`."""
        return {name: round(float(value), 4) for name, value in asdict(self).items()}


def weight_scale_ratio(weights: Iterable[Tensor], factor: Tensor) -> float:
    """Mean over all output channels of (max - min) after / before multiplying the columns by `factor` (Eq. 3)."""
    ratios = []
    for weight in weights:
        before, after = _spread(weight), _spread(scaled_columns(weight, factor))
        ratios.append(torch.where(before > 0, after / before.clamp_min(1e-30), torch.ones_like(before)))
    return float(torch.cat(ratios).mean())


def _spread(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten(1)
    return flat.amax(dim=1).clamp_min(0.0) - flat.amin(dim=1).clamp_max(0.0)


def scaling_table(scaling: Mapping[str, Any]) -> dict[str, float | int | str]:
    """One line of DilateQuant's Table 8 from `QuantPlan.scaling`: the means over every tensor that was looked at.

    Tensors that were left alone count with ratios of one and nothing grown, as in the paper's averages over all layers.
    An empty mapping (no scaling) gives the line of a plan without any.
    """
    tensors = list(scaling.get("tensors", {}).values())
    line: dict[str, float | int | str] = {
        "method": str(scaling.get("method", "none")),
        "tensors": len(tensors),
        "folded": sum(item["applied"] == "folded" for item in tensors),
        "merged": sum(item["applied"] == "merged" for item in tensors),
    }
    for name, neutral in (
        ("grown", 0.0), ("weight_scale", 1.0), ("activation_scale", 1.0), ("clip_error", 1.0), ("output_error", 1.0),
    ):  # fmt: skip
        values = [float(item.get(name, neutral)) for item in tensors]
        line[name] = round(sum(values) / len(values), 4) if values else neutral
    return line
