"""Weights re-fitted to what they will really read, then rounded by second-order error compensation; closed form.

A layer's output error depends on the quantized input x̂, not on x. Least squares first moves the weight to
W* = W (E[x x̂ᵀ] + λI)(E[x̂ x̂ᵀ] + λI)⁻¹, which uses the correlation of neighbouring inputs against their quantization
noise; then columns are rounded one by one, each rounding error spread over the columns still open (GPTQ,
arXiv:2210.17323, Algorithm 1, in its Cholesky form). That only ever looks forward, so codes are then improved one
column at a time, all others given, and scales fitted to them: half a decibel less error in the bundled model's layers.
Nothing is trained and nothing changes at run time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.probe import removing
from calib.quantizer import ActivationQuantizer, RowContext
from calib.range_search import search_weight
from calib.sampling import TIMESTEP, CalibrationSet
from calib.weight_dilation import scaled_columns
from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan, QuantWeights, Segment
from dmqexport.quant_types import MAX_BITS, CodeArray, WeightQuant, code_range

_RIDGE = 0.1  # of the mean diagonal; pulls W* back to W where calibration says little
_DAMPING = 0.01  # of the mean diagonal, as in the paper
_BLOCK = 128
_SWEEPS = 4  # of coordinate descent; more change little
_LARGEST_INPUT = 4608  # a 3 × 3 convolution over 512 channels; two square matrices of this size take 170 MB
_WIDE_BLOCK = 1152  # 128 channels of such a convolution: wider inputs are compensated within blocks of about this size
_POSITIONS = 2**16  # output positions seen in all: more entries say more than more positions of each
MEMORY_BYTES = 2**30


@dataclass
class _Moments:
    """Running sums over positions: quantized·quantizedᵀ and float·quantizedᵀ, float32, of each block of inputs."""

    spans: list[tuple[int, int]]
    quantized: list[Tensor]
    mixed: list[Tensor]

    @classmethod
    def zeros(cls, spans: list[tuple[int, int]], device: torch.device) -> "_Moments":
        """Nothing seen yet."""
        squares = [torch.zeros(stop - start, stop - start, device=device) for start, stop in spans]
        return cls(spans, squares, [square.clone() for square in squares])

    def cpu(self) -> "_Moments":
        """The same in the memory of the CPU, where weights are fitted."""
        return _Moments(self.spans, *([square.cpu() for square in part] for part in (self.quantized, self.mixed)))

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add the float and the quantized inputs of some positions, both [positions, k]."""
        for (start, stop), quantized, mixed in zip(self.spans, self.quantized, self.mixed, strict=True):
            quantized.addmm_(right[:, start:stop].T, right[:, start:stop])
            mixed.addmm_(left[:, start:stop].T, right[:, start:stop])


def refine_weights(
    denoiser: nn.Module,
    plan: QuantPlan,
    weights: QuantWeights,
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    memory: int = MEMORY_BYTES,
) -> tuple[QuantPlan, dict[str, CodeArray]]:
    """Return the plan with refitted weight scales, and every weight's codes keyed `layer#segment`.

    Layers at 8 bits (rounding is not their problem) and grouped convolutions keep their codes. Inputs too wide for a
    square matrix are taken in blocks of channels, errors compensated within a block. Layers are taken in groups whose
    moments fit `memory` bytes (one layer may exceed it), however large the model is: one pass over `calibration` each.
    """
    chosen = [layer for layer in plan.layers if refinable(denoiser, layer.name, layer.weight_bits)]
    groups = list(_groups(denoiser, chosen, memory))
    refined: dict[str, LayerQuant] = {}
    codes: dict[str, CodeArray] = {}
    total = len(groups) * len(calibration)
    for number, group in enumerate(groups):
        offset = _offset(progress, number * len(calibration), total)
        moments = _observe(denoiser, plan, group, calibration, run, batch_size, seed, offset)
        for layer in group:
            refined[layer.name] = _refine(denoiser, layer, moments, codes)
    for layer in plan.layers:
        for index in range(len(layer.segments)):
            key = f"{layer.name}#{index}"
            if key not in codes:
                codes[key] = weights.codes(layer.name, index)
    return replace(plan, layers=tuple(refined.get(layer.name, layer) for layer in plan.layers)), codes


def _offset(progress: Callable[[int, int], None] | None, start: int, total: int) -> Callable[[int], None]:
    """Progress of one group within all groups."""
    return lambda count: progress(start + count, total) if progress is not None else None


def refinable(denoiser: nn.Module, name: str, bits: int) -> bool:
    """Whether `refine_weights` rounds the weight of this layer anew."""
    module = denoiser.get_submodule(name)
    grouped = isinstance(module, nn.Conv2d) and (module.groups != 1 or isinstance(module.padding, str))
    return bits < MAX_BITS and not grouped


def _spans(denoiser: nn.Module, layer: LayerQuant, segment: Segment) -> list[tuple[int, int]]:
    """Blocks of the columns that a segment's weight is multiplied with; whole channels each."""
    weight = denoiser.get_submodule(layer.name).get_parameter("weight")
    taps, channels = int(weight[0, 0].numel()), segment.stop - segment.start
    count = 1 if channels * taps <= _LARGEST_INPUT else -(-channels * taps // _WIDE_BLOCK)
    edges = [channels * index // count * taps for index in range(count + 1)]
    return list(pairwise(edges))


def _groups(denoiser: nn.Module, layers: Sequence[LayerQuant], memory: int) -> Iterator[list[LayerQuant]]:
    group: list[LayerQuant] = []
    size = 0
    for layer in layers:
        spans = [span for segment in layer.segments for span in _spans(denoiser, layer, segment)]
        needed = 8 * sum((stop - start) ** 2 for start, stop in spans)
        if group and size + needed > memory:
            yield group
            group, size = [], 0
        group.append(layer)
        size += needed
    if group:
        yield group


def _observe(
    denoiser: nn.Module,
    plan: QuantPlan,
    group: Sequence[LayerQuant],
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, _Moments]:
    """Second moments of the group's inputs along the float model."""
    context = RowContext(torch.from_numpy(plan.row_map.copy()), timestep_scale=plan.timestep_scale)
    moments: dict[str, _Moments] = {}
    generator = torch.Generator().manual_seed(seed)
    positions = -(-_POSITIONS * batch_size // max(len(calibration), 1))  # of a batch

    def hook(layer: LayerQuant) -> Callable[..., None]:
        place = 1 if layer.op is LayerOp.CONV else -1
        quantizers = [
            None
            if segment.activation is None
            else ActivationQuantizer(f"{layer.name}#{index}", segment.activation, context, place, segment.remainder)
            for index, segment in enumerate(layer.segments)
        ]

        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            tensor = args[0]
            axis = 1 if isinstance(module, nn.Conv2d) else tensor.ndim - 1
            for index, segment in enumerate(layer.segments):
                part = tensor.narrow(axis, segment.start, segment.stop - segment.start)
                quantizer = quantizers[index]
                if quantizer is not None:
                    quantizer.to(tensor.device)
                if segment.activation is not None and segment.activation.channel_factor is not None:
                    # Both moments are of the divided tensor: that is what the weight with its scaled columns reads.
                    spread = (-1,) + (1,) * (tensor.ndim - 2) if axis == 1 else (-1,)
                    factor = torch.from_numpy(segment.activation.channel_factor.copy()).to(tensor.device)
                    divided = part / factor.reshape(spread)
                else:
                    divided = part
                seen = divided
                if quantizer is not None:
                    seen = quantizer.rescale(quantizer(part))
                    if quantizer.has_shift:
                        seen = seen - quantizer.per_sample(quantizer.correction, seen)
                left, right = _columns(module, divided), _columns(module, seen)
                if len(left) > positions:
                    kept = torch.randperm(len(left), generator=generator)[:positions].to(left.device)
                    left, right = left[kept], right[kept]
                key = f"{layer.name}#{index}"
                if key not in moments:
                    moments[key] = _Moments.zeros(_spans(denoiser, layer, segment), tensor.device)
                moments[key].add(left, right)

        return observe

    handles = [denoiser.get_submodule(layer.name).register_forward_pre_hook(hook(layer)) for layer in group]
    with removing(handles), torch.no_grad():
        for entries, batch in calibration.batches(batch_size):
            context.set_timestep(batch[TIMESTEP], len(entries))
            run(batch)
            progress(int(entries[-1]) + 1)
    return {key: found.cpu() for key, found in moments.items()}


def _columns(module: nn.Module, tensor: Tensor) -> Tensor:
    """The vectors that rows of the flattened weight are multiplied with, [positions, k]."""
    if not isinstance(module, nn.Conv2d):
        return tensor.reshape(-1, tensor.shape[-1])
    assert not isinstance(module.padding, str)
    unfolded = F.unfold(tensor, module.kernel_size, module.dilation, module.padding, module.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def _refine(
    denoiser: nn.Module, layer: LayerQuant, moments: Mapping[str, _Moments], codes: dict[str, CodeArray]
) -> LayerQuant:
    weight = denoiser.get_submodule(layer.name).get_parameter("weight").detach().cpu()
    segments = []
    for index, segment in enumerate(layer.segments):
        key = f"{layer.name}#{index}"
        part = weight[:, segment.start : segment.stop]
        if segment.activation is not None and segment.activation.channel_factor is not None:
            part = scaled_columns(part, torch.from_numpy(segment.activation.channel_factor.copy()))
        found, columns = moments[key], part.flatten(1)
        fitted = [
            fit_least_squares(columns[:, start:stop], quantized, mixed)
            for (start, stop), quantized, mixed in zip(found.spans, found.quantized, found.mixed, strict=True)
        ]
        target = torch.cat(fitted, dim=1)
        rounded, qparams = round_second_order(target, found.quantized, segment.weight.bits)
        codes[key] = rounded.reshape(part.shape).to(torch.int8).numpy()
        segments.append(replace(segment, weight=qparams))
    return replace(layer, segments=tuple(segments))


def fit_least_squares(weight: Tensor, quantized: Tensor, mixed: Tensor) -> Tensor:
    """The weight [out, k] that best maps quantized inputs to float outputs. weight [out, k]; both moments [k, k]."""
    ridge = _RIDGE * quantized.diagonal().mean().clamp_min(1e-12) * torch.eye(len(quantized))
    fitted: Tensor = torch.linalg.solve(quantized + ridge, (weight @ (mixed + ridge)).T).T
    return fitted


def round_second_order(weight: Tensor, moments: Sequence[Tensor], bits: int) -> tuple[Tensor, WeightQuant]:
    """Signed codes [out, k] of `weight` and their quantizer, compensating each column's rounding in later columns, then
    descending from there, codes and scales in turn, in the error of the layer's output.

    moments: sums of x̂ x̂ᵀ of consecutive blocks of columns, [k, k] where there is one. Ranges are searched as for plain
    rounding, weighted by the moments' diagonals.
    """
    diagonal = torch.cat([moment.diagonal() for moment in moments])
    found = search_weight(weight, diagonal / diagonal.mean().clamp_min(1e-12), bits)
    qparams = WeightQuant(bits, found.scale.numpy(), found.zero_point.numpy())
    low, high = (torch.from_numpy(bound).unsqueeze(1).float() for bound in code_range(bits, qparams.zero_point))
    blocks = weight.split([len(moment) for moment in moments], dim=1)  # type: ignore[no-untyped-call]  # torch's own
    scale = found.scale.unsqueeze(1)
    damped = [
        moment + _DAMPING * moment.diagonal().mean().clamp_min(1e-12) * torch.eye(len(moment)) for moment in moments
    ]
    codes = [_compensate(part, moment, scale, low, high) for part, moment in zip(blocks, damped, strict=True)]
    # Products with the moments are most of the work: the weight's are made once, the codes' kept up to date.
    pulls = [part @ moment for part, moment in zip(blocks, damped, strict=True)]
    products = [code @ moment for code, moment in zip(codes, damped, strict=True)]
    for _ in range(_SWEEPS):
        scale = _fitted_scale(blocks, products, codes, scale)
        codes = [
            _descend(pull, product, moment, scale, low, high, found)
            for pull, product, moment, found in zip(pulls, products, damped, codes, strict=True)
        ]
    fitted = WeightQuant(bits, scale.flatten().numpy(), qparams.zero_point)
    return torch.cat(codes, dim=1), fitted


def _fitted_scale(
    weights: Sequence[Tensor], products: Sequence[Tensor], codes: Sequence[Tensor], scale: Tensor
) -> Tensor:
    """The scale of every output channel, [out, 1], that fits these codes best; `scale` where none does.

    products: codes times moments.
    """
    along = sum(
        ((product * weight).sum(dim=1, keepdim=True) for product, weight in zip(products, weights, strict=True)),
        torch.zeros_like(scale),
    )
    power = sum(
        ((product * code).sum(dim=1, keepdim=True) for product, code in zip(products, codes, strict=True)),
        torch.zeros_like(scale),
    )
    best = along / power.clamp_min(1e-30)
    return torch.where((along > 0) & (power > 0), torch.maximum(torch.minimum(best, 1.5 * scale), scale / 1.5), scale)


def _descend(
    pull: Tensor, product: Tensor, moment: Tensor, scale: Tensor, low: Tensor, high: Tensor, codes: Tensor
) -> Tensor:
    """One sweep of coordinate descent: each column's codes in turn become the best for the codes of all others.

    The squared output error tr((QS - W) H (QS - W)ᵀ), which compensation only ever looks forward in, cannot rise.
    pull: W H. product: Q H of `codes`, made that of the result.
    """
    codes, diagonal = codes.clone(), moment.diagonal()
    for start in range(0, codes.shape[1], _BLOCK):
        stop = min(start + _BLOCK, codes.shape[1])
        gradient, moved = scale * product[:, start:stop] - pull[:, start:stop], torch.zeros(len(codes), stop - start)
        for column in range(stop - start):
            at = start + column
            code = codes[:, at : at + 1]
            best = torch.round(code - gradient[:, column : column + 1] / (diagonal[at] * scale)).clamp(low, high)
            step = best - code
            gradient[:, column + 1 :] += (step * scale) @ moment[at : at + 1, at + 1 : stop]
            moved[:, column : column + 1] = step
            codes[:, at : at + 1] = best
        product += moved @ moment[start:stop]
    return codes


def _compensate(weight: Tensor, moment: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """moment: damped."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    open_weight, codes = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        block, errors = open_weight[:, start:stop].clone(), torch.zeros(len(weight), stop - start)
        local = upper[start:stop, start:stop]
        for column in range(stop - start):
            value = block[:, column : column + 1]
            code = torch.round(value / scale).clamp(low, high)
            codes[:, start + column : start + column + 1] = code
            error = (value - code * scale) / local[column, column]
            block[:, column:] -= error @ local[column : column + 1, column:]
            errors[:, column : column + 1] = error
        open_weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes
