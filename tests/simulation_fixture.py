"""Exports of small denoisers, random plans for them, and graph taps."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from calib.probe import ProbeResult, probe
from calib.quantizer import ActivationQuantizer, QuantizedAttention, QuantizedLayer, RowContext
from calib.rotation import rotate_feed_forward, rotated_layers, unrotated
from dmqexport.onnx_export import export_float_graph
from dmqexport.quant_plan import AttentionQuant, LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import ActivationQuant, WeightQuant, quantize_weight, remainder_name
from dmqexport.quant_weights import QuantWeights
from passes.pipelines import canonical, float_cleanup
from tests.simulation_models import TIMESTEPS, RotatedDenoiser, Wrapped, random_inputs

#: Most codes that may differ where a sum that float rounding orders differently lands on a tie.
ALLOWED_FLIPS = 1e-5
#: Largest difference of a layer's output, relative to the largest absolute value.
OUTPUT_TOLERANCE = 1e-5


@dataclass
class Exported:
    """A denoiser, what the probe found in it, the cleaned float graph on disk, and the ranges of its activations."""

    denoiser: nn.Module
    found: ProbeResult
    graph: Path
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def export(denoiser: nn.Module, folder: Path, inputs: dict[str, Tensor]) -> Exported:
    """Export once; plans are applied to copies read from disk."""
    denoiser = denoiser.eval()
    graph = float_graph(Wrapped(denoiser), folder, inputs)

    def run(index: int) -> object:
        changed = {**inputs, "sample": inputs["sample"] + index, "timestep": (inputs["timestep"] + index) % TIMESTEPS}
        return denoiser(**changed)

    return Exported(denoiser, probe(denoiser, run), graph)


def export_rotated(folder: Path, inputs: dict[str, Tensor]) -> Exported:
    """A `RotatedDenoiser` with its feed-forwards rotated; the float graph is of the model as it was."""
    denoiser = RotatedDenoiser().eval()
    rotate_feed_forward(denoiser)
    with unrotated(denoiser):
        exported = export(denoiser, folder, inputs)
    observe_ranges(exported, inputs)
    return exported


def float_graph(wrapped: nn.Module, folder: Path, inputs: dict[str, Tensor]) -> Path:
    """Export and clean up; returns the path."""
    raw, graph = folder / "float_raw.onnx", folder / "float.onnx"
    export_float_graph(wrapped, inputs, raw)
    model = ir.load(raw)
    float_cleanup()(model)
    ir.save(model, graph)
    return graph


def observe_ranges(exported: Exported, inputs: dict[str, Tensor]) -> None:
    """Fill `ranges` with the extremes of every layer segment's input."""
    handles = []
    for info in exported.found.layers:

        def hook(module: nn.Module, args: tuple[Tensor, ...], info: object = info) -> None:
            axis = 1 if isinstance(module, nn.Conv2d) else args[0].ndim - 1
            for index, (start, stop) in enumerate(info.segments):  # type: ignore[attr-defined]
                part = args[0].narrow(axis, start, stop - start)
                exported.ranges[f"{info.name}#{index}"] = (  # type: ignore[attr-defined]
                    float(part.min()), float(part.max()),
                )  # fmt: skip

        handles.append(exported.denoiser.get_submodule(info.name).register_forward_pre_hook(hook))
    with torch.no_grad():
        exported.denoiser(**inputs)
    for handle in handles:
        handle.remove()


class PlanSampler:
    """Draws plans: any bits, any zero_point, rows that are equal, differ in scale, in both, or in their bits."""

    def __init__(self, exported: Exported, seed: int, rows: int) -> None:
        self.exported = exported
        self.random = np.random.default_rng(seed)
        self.rows = rows
        self.row_map = self.random.integers(0, rows, TIMESTEPS)
        # Of their own: the plans of old seeds stay what they were.
        self.remaining, self.gaining = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])

    def activation(
        self, bits: int, low: float, high: float, *, centered: bool = False, channels: int | None = None
    ) -> ActivationQuant:
        """A quantizer of roughly [low, high]; `centered` keeps zero at the middle code, `channels` may get factors.
        Two of five tables of layers have a gain in every row."""
        found = self._without_gain(bits, low, high, centered, channels)
        if channels is None or found.rows == 1 or self.gaining.random() < 0.6:
            return found
        return replace(found, gain=self.gaining.uniform(0.7, 1.4, found.rows).astype(np.float32))

    def _without_gain(
        self, bits: int, low: float, high: float, centered: bool, channels: int | None
    ) -> ActivationQuant:
        levels = 2**bits - 1
        rows = int(self.random.choice([1, self.rows]))
        span = max(high, 0.0) - min(low, 0.0) + 1e-3
        scale = span / levels * self.random.uniform(0.4, 1.6, rows)
        zero = np.clip(np.rint(-min(low, 0.0) / scale) + self.random.integers(-2, 3, rows), 0, levels)
        form = self.random.integers(0, 4)
        if form == 0:
            zero = self.random.integers(0, levels + 1, rows)
        elif form == 1:
            scale = np.full(rows, scale[0])
        elif form == 2:
            zero = np.full(rows, zero[0])
        if centered or (bits == 8 and self.random.random() < 0.3):
            zero = np.full(rows, 2 ** (bits - 1))
        factor = None
        if channels is not None and self.random.random() < 0.4:
            factor = np.exp(self.random.uniform(-1, 1, channels)).astype(np.float32)
        widths = np.full(rows, bits)
        if 3 <= bits < 8 and rows > 1 and not centered and self.random.random() < 0.3:  # rows of bits of their own
            widths = np.append(self.random.integers(2, bits + 1, rows - 1), bits)
            return ActivationQuant.from_rows(widths, scale, np.minimum(zero, 2**widths - 1), factor)
        if self.random.random() < 0.1:  # the reference may be any number, not only the mean
            return ActivationQuant(bits, scale, zero, float(scale[0] * self.random.uniform(0.5, 2.0)), factor)
        return ActivationQuant.from_rows(bits, scale, zero, factor)

    def weight(self, bits: int, values: np.ndarray) -> WeightQuant:
        """Per-channel quantizer of `values` [out, ...]."""
        flat = values.reshape(values.shape[0], -1)
        low, high = np.minimum(flat.min(axis=1), 0), np.maximum(flat.max(axis=1), 0)
        scale = (high - low + 1e-3) / (2**bits - 1) * self.random.uniform(0.6, 1.4, len(flat))
        zero = np.clip(np.rint(-low / scale) + self.random.integers(-1, 2, len(flat)), 0, 2**bits - 1)
        return WeightQuant(bits, scale, np.full(len(flat), 128) if bits == 8 else zero)

    def plan(
        self, weights: Path, *, bits: tuple[int, int | None] | None = None, attention_bits: int | None = None
    ) -> QuantPlan:
        """Draw a plan and write its weight codes; `bits` (weight, activation) fixes what is drawn a layer otherwise."""
        layers: list[LayerQuant] = []
        rotated = rotated_layers(self.exported.denoiser)
        float_layers: dict[str, str] = {}
        codes: dict[str, np.ndarray] = {}
        shared: dict[tuple[str, int, int, int], ActivationQuant] = {}
        for info in self.exported.found.layers:
            if bits is None and self.random.random() < 0.1:
                float_layers[info.name] = "drawn to stay in float"
                continue
            weight = self.exported.denoiser.get_submodule(info.name).get_parameter("weight").detach().numpy()
            weight_bits = bits[0] if bits else int(self.random.integers(2, 9))
            drawn = int(self.random.integers(1, 9))
            activation_bits = bits[1] if bits else (None if drawn == 1 else drawn)
            # A planner may keep a concat whole; the graph then keeps its Concat.
            spans = info.segments if self.random.random() < 0.8 else ((0, info.segments[-1][1]),)
            segments = []
            for index, (start, stop) in enumerate(spans):
                part = weight if len(spans) == 1 else weight[:, start:stop]
                qparams = self.weight(weight_bits, part)
                codes[f"{info.name}#{index}"] = quantize_weight(part, qparams)
                activation: ActivationQuant | None = None
                if activation_bits is not None:
                    key = (info.source, start, stop, activation_bits)
                    low, high = self.exported.ranges.get(f"{info.name}#{index}", (-1.0, 1.0))
                    if key not in shared or self.random.random() < 0.3:
                        shared[key] = self.activation(activation_bits, low, high, channels=stop - start)
                    activation = shared[key]
                centered = activation is not None and activation.bits == 8 and set(activation.zero_point) == {128}
                remainder = centered and bool(self.remaining.random() < 0.7)
                segments.append(Segment(start, stop, qparams, activation, remainder))
            own = self.exported.denoiser.get_submodule(info.name).bias
            trained = own is not None and self.random.random() < 0.5
            bias = own.detach().numpy() + self.random.normal(0, 0.1, own.shape) if trained else None
            rotation = rotated.get(info.name)
            layers.append(LayerQuant(info.name, info.op, tuple(segments), weight.size, bias=bias, rotation=rotation))
        QuantWeights.save(weights, codes)
        attentions = () if attention_bits is None else tuple(self._attentions(attention_bits))
        return QuantPlan("random", "random", self.row_map, self.rows, tuple(layers), attentions, float_layers)

    def one_table_plan(self, weights: Path) -> QuantPlan:
        """All layers share their table, whatever the rank of what they read, but not their bits."""
        plan = self.plan(weights, bits=(8, 4))
        scale = np.exp(self.random.uniform(-1, 1, self.rows)) * 0.2
        zero = self.random.integers(0, 8, self.rows)
        layers = [
            replace(
                layer,
                segments=tuple(
                    replace(segment, activation=ActivationQuant.from_rows(4 + index % 4, scale, zero))
                    for segment in layer.segments
                ),
            )
            for index, layer in enumerate(plan.layers)
        ]
        return replace(plan, layers=tuple(layers))

    def _attentions(self, bits: int) -> list[AttentionQuant]:
        return [
            AttentionQuant(
                name,
                query=self.activation(bits, -2.0, 2.0),
                key=self.activation(bits, -2.0, 2.0, centered=bits == 8),
                probability=self.activation(8, 0.0, 1.0),
                value=self.activation(bits, -1.0, 1.0, centered=bits == 8),
            )
            for name in self.exported.found.attentions
        ]


def inputs_on_ties(plan: QuantPlan, batch: int, seed: int) -> dict[str, Tensor]:
    """Inputs of `ShallowDenoiser` half way between two codes of some quantizer, or one float32 beside that."""
    random = np.random.default_rng(seed)
    inputs = random_inputs(batch, seed)
    rows = plan.row_map[inputs["timestep"].numpy()]
    for name, reader, spread in (("sample", "convolutions.", (-1, 1, 1)), ("encoder_hidden_states", "tokens", (-1,))):
        readers = [item for key, item in plan.activations() if key.startswith(reader)]
        values = inputs[name].numpy()
        for index, row in enumerate(rows):
            shape = values[index].shape
            scales = np.stack(
                [
                    np.broadcast_to(
                        item.scale[row if item.rows > 1 else 0]
                        * (np.float32(1) if item.channel_factor is None else item.channel_factor.reshape(spread)),
                        shape,
                    )
                    for item in readers
                ]
            )
            largest = 2 ** readers[0].bits
            halves = random.integers(-largest, largest, shape).astype(np.float32) + np.float32(0.5)
            exact = halves * np.take_along_axis(scales, random.integers(len(scales), size=(1, *shape)), axis=0)[0]
            aim = random.choice(np.array([-np.inf, 0.0, np.inf], dtype=np.float32), shape)
            values[index] = np.where(aim == 0, exact, np.nextafter(exact, aim))
    return inputs


def canonical_graph(exported: Exported, plan: QuantPlan, weights: Path) -> ir.Model:
    """The graph that deployment starts from."""
    model = ir.load(exported.graph)
    canonical(plan, QuantWeights(weights), frozenset(layer.name for layer in plan.layers))(model)
    return model


def run_graph(model: ir.Model, inputs: dict[str, Tensor], extra: list[ir.Value]) -> dict[str, np.ndarray]:
    """Run with onnxruntime, all optimizations off; `extra` values are returned too, by name."""
    known = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(value for value in dict.fromkeys(extra) if value.name not in known)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = {item.name for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    feeds = {name: value.numpy() for name, value in inputs.items() if name in wanted}
    return dict(zip(names, session.run(names, feeds), strict=True))


@dataclass(frozen=True)
class Tap:
    """Where one quantizer sits in the graph: the float tensor before any padding, the one after it, and the codes."""

    source: ir.Value
    padded: ir.Value
    codes: ir.Value


def tap(compute: ir.Node, operand: int = 0) -> Tap | None:
    """Walk from an operator's input up its quantizer chain; None when the input is float."""
    value = compute.inputs[operand]
    assert value is not None
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    codes = dequantize.inputs[0]
    assert codes is not None
    quantize = codes.producer()
    assert quantize is not None
    assert quantize.op_type == "QuantizeLinear"
    owner = str(codes.name).removesuffix("/codes")
    assert str(codes.name) == f"{owner}/codes"

    def above(value: ir.Value, labels: tuple[str, ...]) -> ir.Value:
        while (node := value.producer()) is not None and str(node.name).startswith(f"{owner}/"):
            if str(node.name).removeprefix(f"{owner}/") not in labels:
                break
            assert node.inputs[0] is not None
            value = node.inputs[0]
        return value

    assert quantize.inputs[0] is not None
    padded = above(quantize.inputs[0], ("scaled", "lo_clipped", "hi_clipped", "shifted"))
    producer = padded.producer()
    source = padded
    if producer is not None and producer.op_type == "Pad":
        assert producer.inputs[0] is not None
        source = producer.inputs[0]
    return Tap(source, padded, codes)


def quantizer_taps(model: ir.Model, plan: QuantPlan) -> dict[str, Tap]:
    """The taps of every quantizer by its name in the plan, and those of remainders; a layer with float activations has
    its input three times."""
    computes: dict[tuple[str, int, bool], ir.Node] = {}
    matmuls: dict[tuple[str, str], ir.Node] = {}
    for node in model.graph:
        module, role = node.metadata_props.get("dmqexport.module"), node.metadata_props.get("dmqexport.role")
        if module is not None and role == "compute":
            remainder = "dmqexport.remainder" in node.metadata_props
            computes[module, int(node.metadata_props.get("dmqexport.segment", "0")), remainder] = node
        elif module is not None and role in ("query_key", "probability_value"):
            matmuls[module, role] = node
    taps: dict[str, Tap] = {}
    for layer in plan.layers:
        for index, segment in enumerate(layer.segments):
            found = tap(computes[layer.name, index, False])
            assert (found is not None) == (segment.activation is not None)
            rest = computes.get((layer.name, index, True))
            assert (rest is not None) == segment.remainder
            if rest is not None:
                left = tap(rest)
                assert left is not None
                taps[remainder_name(f"{layer.name}#{index}")] = left
            if found is None:
                source = computes[layer.name, index, False].inputs[0]
                assert source is not None
                found = Tap(source, source, source)
            taps[f"{layer.name}#{index}"] = found
    for attention in plan.attentions:
        for role, operands in (("query_key", ("query", "key")), ("probability_value", ("probability", "value"))):
            for position, operand in enumerate(operands):
                found = tap(matmuls[attention.name, role], position)
                assert found is not None
                taps[f"{attention.name}#{operand}"] = found
    return taps


@dataclass
class Agreement:
    """What teacher forcing found. flips: codes that differ; worst_flip: by how many steps; worst_output: relative."""

    codes: int = 0
    flips: int = 0
    worst_flip: int = 0
    quantizers: int = 0
    outputs: dict[str, float] = field(default_factory=dict)

    def add_codes(self, simulated: Tensor, deployed: np.ndarray) -> None:
        """Compare the codes of one quantizer."""
        assert tuple(simulated.shape) == deployed.shape
        difference = np.abs(simulated.numpy().astype(np.int32) - deployed.astype(np.int32))
        self.codes += difference.size
        self.flips += int(np.count_nonzero(difference))
        self.worst_flip = max(self.worst_flip, int(difference.max(initial=0)))
        self.quantizers += 1

    def add_output(self, name: str, simulated: Tensor, deployed: np.ndarray) -> None:
        """Compare the output of one operator."""
        assert tuple(simulated.shape) == deployed.shape, name
        self.outputs[name] = relative_difference(simulated.numpy(), deployed)


def relative_difference(simulated: np.ndarray, deployed: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float(np.abs(simulated - deployed).max() / max(float(np.abs(simulated).max()), 1e-12))


def teacher_forced(
    exported: Exported, plan: QuantPlan, weights: Path, inputs: dict[str, Tensor]
) -> tuple[Agreement, dict[str, np.ndarray]]:
    """Give each simulated quantizer and layer the tensor that the graph's own one reads, and compare what they make."""
    model = canonical_graph(exported, plan, weights)
    values = {value.name: value for node in model.graph for value in node.outputs}
    final = model.graph.outputs[0]

    def result_of(layer: str) -> ir.Value:
        return values.get(f"{layer}/output", final)

    taps = quantizer_taps(model, plan)
    wanted = [result_of(layer.name) for layer in plan.layers]
    for attention in plan.attentions:
        wanted += [values[f"{attention.name}/scores"], values[f"{attention.name}/output"]]
    for item in taps.values():
        wanted += [item.source, item.padded, item.codes]
    graph_inputs = {value.name for value in model.graph.inputs}
    results = run_graph(model, inputs, [value for value in wanted if value.name not in graph_inputs])
    results.update({name: value.numpy() for name, value in inputs.items()})

    agreement = Agreement()
    context = RowContext(torch.from_numpy(plan.row_map.copy()), timestep_scale=plan.timestep_scale)
    context.set_timestep(inputs["timestep"], inputs["timestep"].shape[0])

    def tensor(value: ir.Value) -> Tensor:
        return torch.from_numpy(results[str(value.name)])

    def compare_codes(name: str, quantizer: ActivationQuantizer) -> None:
        context.codes = {}
        quantizer(tensor(taps[name].padded))
        for made, codes in context.codes.items():
            agreement.add_codes(codes, results[str(taps[made].codes.name)])
        context.codes = None

    with torch.no_grad():
        for name, activation in plan.activations():
            layer = next((item for item in plan.layers if name.startswith(f"{item.name}#")), None)
            axis = 1 if layer is not None and layer.op is LayerOp.CONV else -1
            rest = layer is not None and layer.segments[int(name.rpartition("#")[2])].remainder
            compare_codes(name, ActivationQuantizer(name, activation, context, axis, rest))
        for layer in plan.layers:
            base = exported.denoiser.get_submodule(layer.name)
            assert isinstance(base, (nn.Conv2d, nn.Linear))
            quantized = QuantizedLayer(base, layer, QuantWeights(weights), context)
            axis = 1 if isinstance(base, nn.Conv2d) else -1
            parts = [tensor(taps[f"{layer.name}#{index}"].source) for index in range(len(layer.segments))]
            output = result_of(layer.name)
            agreement.add_output(layer.name, quantized(torch.cat(parts, dim=axis)), results[str(output.name)])
        for attention in plan.attentions:
            pair = QuantizedAttention(attention, context)
            for left, right, suffix in (("query", "key", "scores"), ("probability", "value", "output")):
                operands = [tensor(taps[f"{attention.name}#{operand}"].source) for operand in (left, right)]
                simulated = pair._matmul(left, operands[0], right, operands[1])
                name = f"{attention.name}/{suffix}"
                agreement.add_output(name, simulated, results[name])
    return agreement, results
