"""From statistics and bits to the QuantPlan and its integer weights."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from calib.observer import ATTENTION_OPERANDS, ActivationStatistics
from calib.probe import LayerInfo, ProbeResult
from calib.range_search import (
    RangeMethod,
    length_gain,
    search_activation,
    search_centered,
    search_unsigned,
    search_weight,
)
from calib.rotation import rotated_layers
from calib.weight_dilation import scaled_columns
from dmqexport.quant_plan import Allocation, AttentionQuant, ChannelFold, LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import (
    CENTERED_ZERO_POINT,
    MAX_BITS,
    MIN_BITS,
    ActivationQuant,
    BitWidths,
    CodeArray,
    FloatArray,
    IntArray,
    WeightQuant,
    quantize_weight,
)
from dmqexport.quant_weights import QuantWeights

_TWICE = "two int8 products: of the activation, and of what its rounding leaves over"
_Tensor = tuple[str, int, tuple[int, ...], bool]  # source, segment, bits of the rows, whether there is a remainder
_ROOM = 1.25  # of ranges whose remainder is quantized too, beyond what was observed


@dataclass(frozen=True)
class LayerBits:
    """What one layer gets: its widths, or the reason why it stays in float; `reason` also says why widths differ."""

    widths: BitWidths | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class RowBits:
    """How the activation bits of timestep rows differ from their layer's.

    offsets: int64 [rows], added to the layer's bits; share: float [rows] of the sampling steps, sum 1; own: layer → the
    bits of each of its rows, int64 [rows or 1], instead.
    """

    offsets: IntArray
    share: FloatArray
    own: Mapping[str, IntArray] = field(default_factory=dict)

    def widths(self, bits: int, rows: int, layer: str = "") -> IntArray:
        """Bits of every row of what `layer` reads, int64 [rows], within what rows may differ in.

        8-bit tensors (they have a form of their own) and tensors that ignore the timestep (one row) do not vary.
        """
        if layer in self.own:
            return self.own[layer]
        if bits == MAX_BITS or rows == 1:
            return np.full(rows, bits, dtype=np.int64)
        widths: IntArray = np.clip(bits + self.offsets, MIN_BITS, MAX_BITS - 1)
        return widths

    def average(self, qparams: ActivationQuant) -> float:
        """Mean bits of a tensor over the sampling steps."""
        return float((qparams.widths * self.share).sum()) if qparams.rows > 1 else float(qparams.bits)


def freeze(
    denoiser: nn.Module,
    found: ProbeResult,
    bits: Mapping[str, LayerBits],
    statistics: Mapping[str, ActivationStatistics],
    row_map: IntArray,
    attention_bits: int | None,
    model_fingerprint: str,
    requested: str,
    codes_path: Path,
    folds: tuple[ChannelFold, ...] = (),
    progress: Callable[[int, int], None] | None = None,
    search: RangeMethod = "mse",
    factors: Mapping[str, FloatArray] | None = None,
    row_bits: RowBits | None = None,
    timestep_scale: float = 1.0,
    provisional: Collection[str] = (),
    remainders: Collection[str] = (),
    weight_of: Callable[[str], Tensor] | None = None,
) -> QuantPlan:
    """Choose every scale and zero_point as `search` says, write the weight codes to `codes_path`, return the plan.

    Readers of the same tensor with the same bits get the same quantizer, so that the graph quantizes it once.
    factors: float32 [channels] by `source#index` (calib/channel_scaling.py); `statistics` must have been observed with
    the same ones, and the columns of the readers' weights are multiplied by them before they are quantized. row_bits:
    how rows differ from their layer's bits; None: not at all. provisional: layers whose weights will be rounded anew,
    so that their ranges are not worth a search. remainders: layers whose activations, where they have 8 bits, get a
    remainder. weight_of: parameter name → its tensor, where `denoiser` does not hold its weights; one is asked for at a
    time, and codes are written layer by layer.
    """
    layers: list[LayerQuant] = []
    rotated = rotated_layers(denoiser)
    float_layers = dict(found.unsupported)
    ranges: dict[_Tensor, ActivationQuant] = {}
    with QuantWeights.writing(codes_path, _code_shapes(denoiser, found, bits)) as write:
        for position, info in enumerate(found.layers):
            choice = bits[info.name]
            if choice.widths is None:
                float_layers[info.name] = choice.reason
                continue
            name = f"{info.name}.weight"
            weight = (denoiser.get_parameter(name) if weight_of is None else weight_of(name)).detach()
            how: RangeMethod = "minmax" if info.name in provisional else search
            rest = info.name in remainders and choice.widths.activation == MAX_BITS
            layer = _freeze_layer(
                weight, info, choice, statistics, ranges, write, search, how, factors or {}, row_bits, rest
            )
            layers.append(replace(layer, rotation=rotated.get(info.name)))
            if progress is not None:
                progress(position + 1, len(found.layers))
    attentions: list[AttentionQuant] = []
    for name in found.attentions:
        if attention_bits is None:
            float_layers[f"{name} (attention matmuls)"] = (
                "float by default: int8 Q/DQ would cost the fused attention kernel"
            )
        else:
            attentions.append(_freeze_attention(name, statistics, attention_bits, search))
    return QuantPlan(
        model_fingerprint=model_fingerprint,
        bits=requested,
        row_map=row_map,
        timestep_scale=timestep_scale,
        rows=int(row_map.max()) + 1,
        layers=tuple(layers),
        attentions=tuple(attentions),
        float_layers=float_layers,
        allocation=_allocation(layers, found, requested, row_bits),
        folds=folds,
    )


def with_row_bits(
    plan: QuantPlan,
    found: ProbeResult,
    statistics: Mapping[str, ActivationStatistics],
    row_bits: RowBits,
    search: RangeMethod = "mse",
) -> QuantPlan:
    """The plan with the activation tables of its layers searched anew for rows of other bits; weights stay.

    The plan must have been frozen from the same `statistics`, with the same bits in every row.
    """
    infos = {info.name: info for info in found.layers}
    done: dict[tuple[str, int, tuple[int, ...]], ActivationQuant] = {}

    def again(layer: LayerQuant, index: int, segment: Segment) -> Segment:
        if segment.activation is None or segment.remainder:  # the latter has 8 bits, which rows do not differ in
            return segment
        observed = statistics[f"{infos[layer.name].source}#{index}"]
        widths = row_bits.widths(segment.activation.bits, len(observed.low), layer.name)
        key = (infos[layer.name].source, index, tuple(widths.tolist()))
        if key not in done:
            done[key] = _activation(observed, widths, search, segment.activation.channel_factor)
        return replace(segment, activation=done[key])

    layers = tuple(
        replace(layer, segments=tuple(again(layer, index, part) for index, part in enumerate(layer.segments)))
        for layer in plan.layers
    )
    return replace(plan, layers=layers)


def _code_shapes(denoiser: nn.Module, found: ProbeResult, bits: Mapping[str, LayerBits]) -> dict[str, tuple[int, ...]]:
    """Shape of every segment's codes, by `layer#segment`."""
    shapes = {}
    for info in found.layers:
        outputs, inputs, *kernel = denoiser.get_parameter(f"{info.name}.weight").shape
        for index, (start, stop) in enumerate(info.segments):
            if bits[info.name].widths is not None:
                # A grouped convolution sees only its own group's channels.
                shapes[f"{info.name}#{index}"] = (outputs, min(stop - start, inputs), *kernel)
    return shapes


def _freeze_layer(
    weight: Tensor,
    info: LayerInfo,
    choice: LayerBits,
    statistics: Mapping[str, ActivationStatistics],
    ranges: dict[_Tensor, ActivationQuant],
    write: Callable[[str, CodeArray], None],
    search: RangeMethod,
    weight_search: RangeMethod,
    factors: Mapping[str, FloatArray],
    row_bits: RowBits | None,
    remainder: bool,
) -> LayerQuant:
    assert choice.widths is not None
    segments = []
    for index, (start, stop) in enumerate(info.segments):
        observed = statistics[f"{info.source}#{index}"]
        activation: ActivationQuant | None = None
        factor = factors.get(f"{info.source}#{index}")
        part = weight if len(info.segments) == 1 else weight[:, start:stop]
        moment = observed.second_moment
        if choice.widths.activation is not None:
            bits, rows = choice.widths.activation, len(observed.low)
            widths = np.full(rows, bits) if row_bits is None else row_bits.widths(bits, rows, info.name)
            key = (info.source, index, tuple(widths.tolist()), remainder)
            if key not in ranges and remainder:
                ranges[key] = _first_of_two(observed, factor)
            elif key not in ranges:
                ranges[key] = _activation(observed, widths, search, factor)
            activation = ranges[key]
            part = part if factor is None else scaled_columns(part, torch.from_numpy(factor.copy()))
        elif factor is not None:  # a weight-only reader has no table to put a factor in: it reads the tensor as it is
            moment = moment * torch.from_numpy(factor.copy()).square()
        qparams = _weight(part, moment, choice.widths.weight, info.op, weight_search)
        write(f"{info.name}#{index}", quantize_weight(part.numpy(), qparams))
        segments.append(Segment(start, stop, qparams, activation, remainder and activation is not None))
    reason = "; ".join(filter(None, (choice.reason, _TWICE if remainder else "")))
    return LayerQuant(info.name, info.op, tuple(segments), info.parameters, reason)


def _activation(
    observed: ActivationStatistics, widths: IntArray, search: RangeMethod, factor: FloatArray | None
) -> ActivationQuant:
    """widths: bits of every row."""
    widths = widths.copy()
    scale, zero_point = torch.zeros(len(widths)), torch.zeros(len(widths), dtype=torch.int64)
    gain = torch.ones(len(widths))
    for width in np.unique(widths):
        own = torch.from_numpy(np.flatnonzero(widths == width))
        found = search_activation(
            observed.values[own], observed.weights[own], observed.low[own], observed.high[own], int(width), search
        )
        scale[own], zero_point[own] = found.scale, found.zero_point
        # 8 bits have no error worth it. One row has no rescaling after the operator, and would need one.
        if search == "unbiased" and width < MAX_BITS and len(widths) > 1:
            gain[own] = length_gain(
                observed.values[own], observed.weights[own], found.scale, found.zero_point, int(width)
            )
    dead = observed.high <= observed.low
    if bool(dead.any()) and not bool(dead.all()):
        # A row that saw only one value has no range; it takes the widest live one, which can hold whatever comes and
        # does not drag the tables' common scale to nothing.
        widest = int(torch.where(dead, torch.zeros_like(scale), scale).argmax())
        scale[dead], zero_point[dead], gain[dead] = scale[widest], zero_point[widest], gain[widest]
        widths[dead.numpy()] = widths[widest]
    return ActivationQuant.from_rows(widths, scale.numpy(), zero_point.numpy(), factor, gain.numpy())


def _first_of_two(observed: ActivationStatistics, factor: FloatArray | None) -> ActivationQuant:
    """The centered 8-bit quantizer of a tensor whose remainder is quantized too: all that was seen, and some more.

    With 16 bits, room for values that calibration did not see costs nothing that matters, and clipping would.
    """
    extreme = torch.maximum(observed.high, -observed.low) * _ROOM
    extreme = torch.where(extreme > 0, extreme, extreme.max().clamp_min(1e-12))  # rows that saw nothing but zero
    scale = (extreme / (CENTERED_ZERO_POINT - 1)).numpy()
    return ActivationQuant.from_rows(MAX_BITS, scale, np.full(len(scale), CENTERED_ZERO_POINT), factor)


def _weight(part: Tensor, second_moment: Tensor, bits: int, op: LayerOp, search: RangeMethod) -> WeightQuant:
    importance: Tensor | None = None
    if second_moment.numel() == part.shape[1]:  # a grouped convolution sees only its own group's channels
        kernel = part[0, 0].numel() if op is LayerOp.CONV else 1
        # A floor keeps a channel that calibration never excited from being quantized to anything at all.
        importance = second_moment.clamp_min(1e-4 * float(second_moment.mean()) + 1e-12).repeat_interleave(kernel)
    found = search_weight(part.flatten(1), importance, bits, search)
    return WeightQuant(bits, found.scale.numpy(), found.zero_point.numpy())


def _freeze_attention(
    name: str, statistics: Mapping[str, ActivationStatistics], bits: int, search: RangeMethod
) -> AttentionQuant:
    operands: dict[str, ActivationQuant] = {}
    search = "mse" if search == "unbiased" else search  # operands have no gain, and wider ranges were not measured
    for operand in ATTENTION_OPERANDS:
        observed = statistics[f"{name}#{operand}"]
        # Softmax needs the most codes: most probabilities are near zero.
        width = MAX_BITS if operand == "probability" else bits
        if operand == "probability":
            found = search_unsigned(observed.values, observed.weights, observed.high, width, search)
        elif width == MAX_BITS and search == "mse":
            found = search_centered(observed.values, observed.weights, observed.low, observed.high, width)
        else:
            found = search_activation(observed.values, observed.weights, observed.low, observed.high, width, search)
        operands[operand] = ActivationQuant.from_rows(width, found.scale.numpy(), found.zero_point.numpy())
    return AttentionQuant(name, **operands)


def _allocation(layers: list[LayerQuant], found: ProbeResult, requested: str, row_bits: RowBits | None) -> Allocation:
    macs = {info.name: info.macs for info in found.layers}
    parameters = sum(layer.parameters for layer in layers)
    average = sum(layer.weight_bits * layer.parameters for layer in layers) / max(parameters, 1)
    quantized = []
    for layer in layers:
        qparams = layer.segments[0].activation
        if qparams is not None:
            bits = float(qparams.bits) if row_bits is None else row_bits.average(qparams)
            quantized.append((bits * (2 if layer.has_remainder else 1), macs[layer.name]))
    total = sum(weight for _, weight in quantized)
    activation = sum(width * weight for width, weight in quantized) / total if total else None
    return Allocation(
        method="uniform",
        budget=requested,
        average_weight_bits=round(average, 6),
        average_activation_bits=None if activation is None else round(activation, 6),
        details={"activation_average_weighted_by": "multiply-accumulates"},
    )
