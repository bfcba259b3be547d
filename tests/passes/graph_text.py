"""Graphs as text: ONNX's own syntax, with the layer tags and the constants in comments that the parser skips."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import ActivationQuant, WeightQuant, quantize_weight
from dmqexport.quant_weights import QuantWeights
from passes.base import Role, is_remainder, module_of, role_of, segment_of, tag

GOLDEN = Path(__file__).parent / "golden"
_TAG = "# tag:"


def parse(text: str) -> ir.Model:
    """ONNX text to a model; lines `# tag: <output> <module> <role> [<segment> [remainder]]` tag the node that makes
    <output>."""
    model = ir.from_onnx_text(text)
    producers = {output.name: node for node in model.graph for output in node.outputs}
    for line in text.splitlines():
        if line.startswith(_TAG):
            output, module, role, *rest = line.removeprefix(_TAG).split()
            remainder = rest[1:] == ["remainder"]
            tag(producers[output], module, Role(role), int(rest[0]) if rest else 0, remainder=remainder)
    return model


def read(name: str) -> ir.Model:
    """The graph in `golden/<name>.txt`."""
    return parse((GOLDEN / f"{name}.txt").read_text(encoding="utf-8"))


def render(model: ir.Model) -> str:
    """Everything a pass can change: nodes, types, tags, and every constant with its values."""
    lines = [line.rstrip() for line in ir.to_onnx_text(model, exclude_initializers=True).strip().splitlines()]
    for name in sorted(model.graph.initializers):
        array = model.graph.initializers[name].const_value
        assert array is not None
        values = " ".join(f"{value:.9g}" for value in array.numpy().astype(np.float64).flatten())
        lines.append(f"# {name}: {array.dtype.name} {list(array.shape)} = {values}")
    for node in model.graph:
        module, role = module_of(node), role_of(node)
        if module is not None and role is not None:
            line = f"{_TAG} {node.outputs[0].name} {module} {role.value} {segment_of(node)}"
            lines.append(f"{line} remainder" if is_remainder(node) else line)
    return "\n".join(lines) + "\n"


def assert_golden(model: ir.Model, name: str) -> None:
    """Compare with `golden/<name>.txt`; on a difference that is meant, paste the text that pytest shows."""
    rendered = render(model)
    path = GOLDEN / f"{name}.txt"
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    assert rendered == expected, f"{path.name} differs; the graph is now:\n{rendered}"


def weight_quant(bits: int, channels: int) -> WeightQuant:
    """Scales 0.25, 0.5, 0.25 …, zero_points near the middle."""
    scale = np.where(np.arange(channels) % 2, 0.5, 0.25)
    zero = np.full(channels, 128) if bits == 8 else 2 ** (bits - 1) - np.arange(channels) % 2
    return WeightQuant(bits, scale, zero)


def layer_quant(
    name: str,
    op: LayerOp,
    shape: tuple[int, ...],
    bits: int,
    activations: list[ActivationQuant | None],
    edges: list[int] | None = None,
) -> LayerQuant:
    """A layer with one segment an activation; `shape` is the torch shape of its weight."""
    edges = edges or [0, shape[1]]
    segments = [
        Segment(start, stop, weight_quant(bits, shape[0]), activation)
        for start, stop, activation in zip(edges[:-1], edges[1:], activations, strict=True)
    ]
    return LayerQuant(name, op, tuple(segments), int(np.prod(shape)))


def with_remainders(layer: LayerQuant, *indexes: int) -> LayerQuant:
    """The layer with a remainder in the segments of these indexes, the first one unless told."""
    segments = enumerate(layer.segments)
    changed = tuple(replace(segment, remainder=index in (indexes or (0,))) for index, segment in segments)
    return replace(layer, segments=changed)


def plan_of(*layers: LayerQuant, rows: int = 1, float_layers: dict[str, str] | None = None) -> QuantPlan:
    """A plan over six timesteps."""
    return QuantPlan("", "", np.arange(6) * rows // 6, rows, layers, float_layers=float_layers or {})


def save_codes(path: Path, plan: QuantPlan, weights: dict[str, np.ndarray]) -> QuantWeights:
    """Quantize `weights` (torch layout) as `plan` says."""
    codes = {}
    for layer in plan.layers:
        for index, segment in enumerate(layer.segments):
            part = weights[layer.name][:, segment.start : segment.stop] if len(layer.segments) > 1 else None
            codes[f"{layer.name}#{index}"] = quantize_weight(
                weights[layer.name] if part is None else np.ascontiguousarray(part), segment.weight
            )
    QuantWeights.save(path, codes)
    return QuantWeights(path)
