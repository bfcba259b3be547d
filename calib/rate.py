"""What bits cost: the budgets of an allocation as tables of layer × pair of widths.

nominal: the bits that the papers count. realisable: what the target's file holds; ONNX has 4- and 8-bit containers, so
2-, 3- and 4-bit weights occupy four bits and 5- to 8-bit weights eight. Activations travel in int8 containers on every
target and are never stored, so an average of activation bits is always nominal. An average of weight bits is nominal by
default (an average of 3 has no meaning where the narrowest container is 4), bytes and latency are realisable.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.allocation_problem import Resource
from calib.candidates import FLOAT_BITS, WidthPair
from calib.probe import LayerInfo, removing
from dmqexport.errors import RecipeError
from dmqexport.quant_types import MAX_BITS

Curves = Mapping[str, Mapping[WidthPair, float]]
_SCALE_BYTES = 5  # an output channel's float32 scale and its zero_point, as stored


class Rate(StrEnum):
    """How weight bits are counted."""

    NOMINAL = "nominal"
    REALISABLE = "realisable"


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of one forward of one sample, layer by layer: multiply-accumulates plus reading the weights.

    ms = macs / (1e6 · gmacs) + bytes / (1e6 · gbytes), float operands at `float_slowdown` times the arithmetic. Every
    width up to 8 bits multiplies in int8, so below 8 bits only the bytes fall. `table` (layer pattern → pair such as
    w4a8 → ms) replaces the formula where it has an entry: measure your target and write it down.
    """

    gmacs: float = 50.0
    gbytes: float = 10.0
    float_slowdown: float = 2.0
    table: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | None) -> "LatencyModel":
        """With the table of a JSON file, or without one; raises RecipeError when the file is something else."""
        if path is None:
            return cls()
        try:
            table = json.loads(Path(path).read_text(encoding="utf-8"))
            checked = {str(p): {str(k): float(v) for k, v in row.items()} for p, row in table.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise RecipeError(
                f"latency table {path} cannot be used: {error}",
                hint='expected JSON such as {"*.ff.net.*": {"w4a8": 0.12, "w8a8": 0.14}}',
            ) from error
        return cls(table=checked)

    def milliseconds(self, info: LayerInfo, pair: WidthPair, stored_bits: int) -> float:
        """Cost of one layer at one pair."""
        for pattern, row in self.table.items():
            if fnmatchcase(info.name, pattern) and str(pair) in row:
                return row[str(pair)]
        slowdown = self.float_slowdown if pair.activation is None else 1.0
        return info.macs * slowdown / (1e6 * self.gmacs) + info.parameters * stored_bits / 8 / (1e6 * self.gbytes)


def occupied_bits(bits: int, containers: Sequence[int], rate: Rate) -> int:
    """Bits that one weight of `bits` takes; containers: widths of the target's storage types."""
    if rate is Rate.NOMINAL:
        return bits
    return min((size for size in containers if size >= bits), default=FLOAT_BITS)


def average_weight_bits(
    layers: Sequence[LayerInfo], curves: Curves, limit: float, containers: Sequence[int], rate: Rate
) -> Resource:
    """Mean bits over all quantized weights, pinned layers included."""
    total = sum(info.parameters for info in layers)

    def cost(info: LayerInfo, pair: WidthPair) -> float:
        return occupied_bits(pair.weight or FLOAT_BITS, containers, rate) * info.parameters / total

    return _resource("average weight bits", layers, curves, cost, limit)


def average_activation_bits(
    layers: Sequence[LayerInfo], curves: Curves, limit: float, doubled: Collection[str] = ()
) -> Resource:
    """Mean bits of the multiplied activations, weighted by multiply-accumulates as `Allocation` reports them.

    doubled: layers for which no activation bits mean 8 and a remainder of 8 more, not float.
    """
    quantized = [
        info
        for info in layers
        if info.name in doubled or any(pair.activation is not None for pair in curves[info.name])
    ]
    total = max(sum(info.macs for info in quantized), 1)

    def cost(info: LayerInfo, pair: WidthPair) -> float:
        bits = (2 * MAX_BITS if info.name in doubled else 0) if pair.activation is None else pair.activation
        return bits * info.macs / total

    return _resource("average activation bits", layers, curves, cost, limit)


def joint_bits(
    layers: Sequence[LayerInfo],
    curves: Curves,
    elements: Mapping[str, int],
    limit: float,
    containers: Sequence[int],
    rate: Rate,
) -> Resource:
    """DMQ's single budget: the size of weights and activations together, as mean bits over all their elements.

    elements: source layer → elements of its input for one sample; a tensor that several layers read counts once.
    """
    total = sum(info.parameters for info in layers) + sum(elements[source] for source in {i.source for i in layers})
    first: dict[str, str] = {}
    for info in layers:
        first.setdefault(info.source, info.name)

    def cost(info: LayerInfo, pair: WidthPair) -> float:
        read = elements[info.source] if first[info.source] == info.name else 0
        weight = occupied_bits(pair.weight or FLOAT_BITS, containers, rate) * info.parameters
        return (weight + (pair.activation or FLOAT_BITS) * read) / total

    return _resource("average bits of weights and activations", layers, curves, cost, limit)


def stored_bytes(
    layers: Sequence[LayerInfo],
    curves: Curves,
    float_parameters: int,
    channels: Mapping[str, int],
    limit: float,
    containers: Sequence[int],
    rate: Rate,
) -> Resource:
    """Bytes of all parameters at rest: codes in their containers, scales and zero-points, the rest in float32.

    float_parameters: parameters outside the weights of `layers`; channels: layer → output channels × segments. The
    graph's own description (its nodes and names) and the timestep tables do not depend on widths and are not counted.
    """
    # Spread over the layers, so that what a choice uses is the whole model's size.
    share = 4.0 * float_parameters / max(len(layers), 1)

    def cost(info: LayerInfo, pair: WidthPair) -> float:
        codes = occupied_bits(pair.weight or FLOAT_BITS, containers, rate) * info.parameters / 8
        return codes + _SCALE_BYTES * channels[info.name] + share

    return _resource("bytes of stored weights", layers, curves, cost, limit)


def latency(
    layers: Sequence[LayerInfo],
    curves: Curves,
    model: LatencyModel,
    limit: float,
    containers: Sequence[int],
    doubled: Collection[str] = (),
) -> Resource:
    """Milliseconds of the quantized layers, by `model`; weights are read as stored. doubled: as above; two products
    take twice the time of one.
    """

    def cost(info: LayerInfo, pair: WidthPair) -> float:
        stored = occupied_bits(pair.weight or FLOAT_BITS, containers, Rate.REALISABLE)
        if pair.activation is None and info.name in doubled:
            return 2 * model.milliseconds(info, WidthPair(pair.weight, MAX_BITS), stored)
        return model.milliseconds(info, pair, stored)

    return _resource("milliseconds of quantized layers", layers, curves, cost, limit)


def input_elements(denoiser: nn.Module, names: Sequence[str], run: Callable[[], object]) -> dict[str, int]:
    """Elements of each layer's input for one sample; `run()` must run one forward."""
    found: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0][0].numel()

        return observe

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with removing(handles), torch.no_grad():
        run()
    return found


def _resource(
    name: str,
    layers: Sequence[LayerInfo],
    curves: Curves,
    cost: Callable[[LayerInfo, WidthPair], float],
    limit: float,
) -> Resource:
    table = {info.name: {pair: cost(info, pair) for pair in curves[info.name]} for info in layers}
    return Resource(name, table, limit)
