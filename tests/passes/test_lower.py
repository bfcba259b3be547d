"""Every lowered operator computes what the canonical one does, given the same inputs.

Operators are cut out of both graphs and compared one by one: end to end, a rounding tie that falls the other way in an
early layer would hide what a lowering did to a later one.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from simulation_fixture import (
    DeepDenoiser,
    Exported,
    PlanSampler,
    canonical_graph,
    export,
    observe_ranges,
    random_inputs,
)

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import QuantPlan, QuantWeights
from passes.bind import graph_attentions
from passes.lower.ort_cpu import FUSED_PRODUCT, LowerOrtCpu, may_saturate
from passes.lower.tensorrt import LowerTensorRT, VerifyTensorRT
from passes.pipelines import lower_ort_cpu, lower_tensorrt
from passes.tap import layer_outputs

BATCH = 3


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


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


def run_piece(model: ir.Model, names: list[str], result: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Cut one operator out of `model` and run it with all optimizations off."""
    graph = ir.convenience.extract(model.graph, ["timestep", *dict.fromkeys(names)], [result])
    graph.opset_imports.update(model.graph.opset_imports)
    for value in graph.inputs:
        if value.name != "timestep":
            value.shape = ir.Shape([None] * feeds[str(value.name)].ndim)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    piece = ir.Model(graph, ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        ir.serde.serialize_model(piece).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
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


@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
@pytest.mark.parametrize("seed", range(6))
def test_ort_cpu_computes_the_canonical_operators(deep: Exported, tmp_path: Path, seed: int, vnni: bool) -> None:
    plan = draw(deep, tmp_path, seed)
    if vnni and not _host_has_vnni():
        pytest.skip("signed 8-bit weights may saturate on this CPU: that graph is not built here")
    lowering = lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=vnni)
    assert compare(deep, plan, tmp_path / "codes", lowering) <= 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_tensorrt_computes_the_canonical_operators(deep: Exported, tmp_path: Path, seed: int) -> None:
    plan = draw(deep, tmp_path, seed)
    assert compare(deep, plan, tmp_path / "codes", lower_tensorrt(plan, QuantWeights(tmp_path / "codes"))) == 0.0


def test_every_planned_layer_becomes_an_integer_product(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, 4))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    lowering = LowerOrtCpu(plan, QuantWeights(tmp_path / "codes"), vnni=True)
    assert lowering(model).modified
    assert not lowering(model).modified
    products = [node for node in model.graph if node.op_type in (FUSED_PRODUCT, "ConvInteger")]
    attention = 2 * len(plan.attentions)
    assert len(products) == sum(len(layer.segments) for layer in plan.layers) + attention


def test_portable_weights_never_meet_the_saturating_kernel(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 2, bits=(8, 8))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    weights = QuantWeights(tmp_path / "codes")
    LowerOrtCpu(plan, weights, vnni=False)(model)
    risky = [
        layer
        for layer in plan.layers
        for index, segment in enumerate(layer.segments)
        if segment.activation is not None and may_saturate(weights.codes(layer.name, index), segment.activation)
    ]
    assert risky
    for node in model.graph:
        if node.op_type == FUSED_PRODUCT and node.inputs[1] is not None and node.inputs[1].is_initializer():
            assert node.inputs[1].dtype == ir.DataType.UINT8


def test_tensorrt_weights_are_int8_with_an_explicit_zero(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(3, 4))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    with pytest.raises(LoweringError, match="zero_point must be an int8 zero"):
        VerifyTensorRT()(model)
    lowering = LowerTensorRT(plan, QuantWeights(tmp_path / "codes"))
    assert lowering(model).modified
    assert not lowering(model).modified
    assert not VerifyTensorRT()(model).modified


def test_tensorrt_refuses_what_it_would_run_in_float(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(8, 8))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    scale = ir.Value(
        name="wide",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor([0.1], name="wide"),
    )
    model.graph.register_initializer(scale)
    node.replace_input_with(1, scale)
    with pytest.raises(LoweringError, match="rank 0 needed"):
        VerifyTensorRT()(model)


def _host_has_vnni() -> bool:
    from dmqexport.target import cpu_has_vnni

    return cpu_has_vnni()
