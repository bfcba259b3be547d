"""Operators cut out of graphs and run alone.

End to end, a rounding tie that falls the other way in an early layer would hide what a lowering did to a later one.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from simulation_fixture import Exported, PlanSampler, canonical_graph
from simulation_models import random_inputs

from dmqexport.quant_plan import LayerQuant, QuantPlan
from dmqexport.quant_types import CENTERED_ZERO_POINT
from passes.bind import graph_attentions
from passes.tap import layer_outputs

BATCH = 3


def pieces(exported: Exported, plan: QuantPlan) -> dict[str, tuple[list[str], str]]:
    """Operator name → (names of its float inputs, name of its result); the names are the same in every graph."""
    model = ir.load(exported.graph)
    outputs = layer_outputs(model)
    nodes = {str(node.name): node for node in model.graph}
    found: dict[str, tuple[list[str], str]] = {}
    for layer in plan.layers:
        node = next(
            node
            for node in nodes.values()
            if node.metadata_props.get("dmqexport.module") == layer.name
            and node.metadata_props.get("dmqexport.role") == "compute"
        )
        source = node.inputs[0]
        assert source is not None
        producer = source.producer()
        names = [str(source.name)]
        if len(layer.segments) > 1:
            assert producer is not None
            names = [str(part.name) for part in producer.inputs if part is not None]
        found[layer.name] = (names, outputs[layer.name])
    pairs = graph_attentions(model.graph)
    for attention in plan.attentions:
        for node in (pairs[attention.name].query_key, pairs[attention.name].probability_value):
            names = [str(value.name) for value in node.inputs if value is not None]
            found[str(node.name)] = (names, str(node.outputs[0].name))
    return found


def cut_piece(model: ir.Model, names: list[str], result: str, feeds: dict[str, np.ndarray]) -> bytes:
    """One operator of `model` as a graph of its own, from `names` and the timestep to `result`; dynamic shapes."""
    graph = ir.convenience.extract(model.graph, ["timestep", *dict.fromkeys(names)], [result])
    graph.opset_imports.update(model.graph.opset_imports)
    for value in graph.inputs:
        if value.name != "timestep":
            value.shape = ir.Shape([None] * feeds[str(value.name)].ndim)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()


def run_piece(model: ir.Model, names: list[str], result: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Cut one operator out of `model` and run it with all optimizations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(cut_piece(model, names, result, feeds), options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})[0]
    return output


def float_values(exported: Exported, names: set[str], inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Values of the float graph: what each operator is really fed with."""
    model = ir.load(exported.graph)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    own = {name: inputs[name].numpy() for name in names if name in inputs}
    for name in sorted(names - own.keys()):
        if not values[name].is_graph_output():
            values[name].type = values[name].type or ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(values[name])
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    wanted = [name for name in names if name not in own]
    feeds = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    return {**own, **dict(zip(wanted, session.run(wanted, feeds), strict=True))}


def compare(exported: Exported, plan: QuantPlan, weights: Path, lower: Callable[[ir.Model], object]) -> float:
    """Largest difference of any operator, relative to its largest output; batches mix timesteps."""
    reference, lowered = canonical_graph(exported, plan, weights), canonical_graph(exported, plan, weights)
    lower(lowered)
    inputs = random_inputs(BATCH, seed=5)
    operators = pieces(exported, plan)
    values = float_values(exported, {name for names, _ in operators.values() for name in names}, inputs)
    values["timestep"] = inputs["timestep"].numpy()
    worst = 0.0
    for names, result in operators.values():
        expected, actual = (run_piece(model, names, result, values) for model in (reference, lowered))
        assert expected.shape == actual.shape
        worst = max(worst, float(np.abs(actual - expected).max() / np.abs(expected).max()))
    return worst


def draw(deep: Exported, folder: Path, seed: int, bits: tuple[int, int | None] | None = None) -> QuantPlan:
    sampler = PlanSampler(deep, seed, (1, 2, 10, 50)[seed % 4])
    return sampler.plan(folder / "codes", bits=bits, attention_bits=(None, 8, 5)[seed % 3])


def draw_remainders(deep: Exported, folder: Path, seed: int, weight_bits: int = 8) -> QuantPlan:
    """A plan whose every activation has a remainder, whether it has rows, channel factors, both or neither."""
    plan = draw(deep, folder, seed, bits=(weight_bits, 8))

    def remaining(layer: LayerQuant) -> LayerQuant:
        segments = []
        for segment in layer.segments:
            assert segment.activation is not None
            zero_point = np.full(segment.activation.rows, CENTERED_ZERO_POINT)
            activation = replace(segment.activation, zero_point=zero_point)
            segments.append(replace(segment, activation=activation, remainder=True))
        return replace(layer, segments=tuple(segments))

    return replace(plan, layers=tuple(remaining(layer) for layer in plan.layers))


def tolerance(plan: QuantPlan, operator: str) -> float:
    """How far an operator may be from the canonical one where float32 rounds otherwise before codes are taken.

    Relative to the largest result: float rounding, and with a remainder one of its codes, whose ties are many and whose
    steps are 254 times smaller than those of other 8-bit codes.
    """
    return 5e-5 if any(layer.name == operator and layer.has_remainder for layer in plan.layers) else 1e-5


_AVX2 = """
import sys, numpy as np
from pathlib import Path
from engines.openvino_ir import OpenVinoRunner
runner = OpenVinoRunner(Path(sys.argv[1]), threads=1)
feeds = dict(np.load(sys.argv[2]))
kernels = {layer.kernel for layer in runner.executed({k: v.shape for k, v in feeds.items()})}
assert set(sys.argv[4:]) <= kernels and not any("avx512" in kernel and "I8" in kernel for kernel in kernels), kernels
np.savez(sys.argv[3], **runner.run(feeds))
"""


def run_without_vnni(
    piece: bytes, feeds: dict[str, np.ndarray], result: str, folder: Path, *kernels: str
) -> np.ndarray:
    """Run an operator in OpenVINO as on a CPU with AVX2 alone, by these kernels: oneDNN's switch takes VNNI away."""
    graph, given, out = folder / "piece.onnx", folder / "in.npz", folder / "out.npz"
    graph.write_bytes(piece)
    np.savez(given, **feeds)
    subprocess.run(
        [sys.executable, "-c", _AVX2, graph, given, out, *kernels],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        check=True,
        timeout=120,
    )
    found: np.ndarray = np.load(out)[result]
    return found
