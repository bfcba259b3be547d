"""INT4, FP8 and half precision for TensorRT: the same codes, and each type proven from what the builder made of it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from operator_pieces import compare, draw, draw_remainders
from simulation_fixture import Exported, canonical_graph, export, export_rotated, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import QuantWeights
from engines.precision import prove_types
from engines.trt import ShapeRange, TrtFlavor, build_engine, flavor_version
from engines.trt_layers import EngineLayer
from passes.base import constant_array
from passes.lower.tensorrt import fits_fp8, holds_int4, product_types
from passes.pipelines import lower_tensorrt

needs_rtx = pytest.mark.skipif(flavor_version(TrtFlavor.RTX) is None, reason="pip install 'dmqexport[rtx]'")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


def run(model: ir.Model) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 4
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    inputs = random_inputs(3, seed=5)
    output: np.ndarray = session.run(None, {item.name: inputs[item.name].numpy() for item in session.get_inputs()})[0]
    return output


def lowered(deep: Exported, folder: Path, plan: QuantPlan, **options: object) -> ir.Model:
    model = canonical_graph(deep, plan, folder / "codes")
    lower_tensorrt(plan, QuantWeights(folder / "codes"), **options)(model)  # type: ignore[arg-type]
    return model


def built_layers(model: ir.Model, folder: Path) -> tuple[EngineLayer, ...]:
    """What TensorRT-RTX makes of `model`."""
    ir.save(model, folder / "model.onnx")
    shapes = {name: tuple(value.shape[1:]) for name, value in random_inputs(2, seed=0).items()}
    built = build_engine(
        folder / "model.onnx",
        folder / "engine.plan",
        flavor=TrtFlavor.RTX,
        profiles={name: ShapeRange((1, *rest), (2, *rest), (4, *rest)) for name, rest in shapes.items()},
        log_path=folder / "build.log",
    )
    return built.layers


@pytest.mark.parametrize("seed", range(2))
def test_fp8_computes_the_canonical_operators(deep: Exported, tmp_path: Path, seed: int) -> None:
    plan = draw(deep, tmp_path, seed, bits=(4, 4))
    lowering = lower_tensorrt(plan, QuantWeights(tmp_path / "codes"), fp8=True)
    assert compare(deep, plan, tmp_path / "codes", lowering) == 0.0


def test_fp8_takes_what_it_can_hold_and_int8_the_rest(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 2)
    types, weights = product_types(lowered(deep, tmp_path, plan, fp8=True), plan), QuantWeights(tmp_path / "codes")
    kinds = {layer.name: types[layer.name][0] for layer in plan.layers}
    for layer in plan.layers:
        if layer.activation_bits is None:
            even = all(holds_int4(weights.shape(layer.name, i)) for i in range(len(layer.segments)))
            assert kinds[layer.name] == ("weight Int4" if layer.weight_bits <= 4 and even else "weight Int8")
        elif layer.weight_bits <= 4:
            assert kinds[layer.name] == ("FP8" if all(fits_fp8(s) for s in layer.segments) else "Int8")
        else:
            assert kinds[layer.name] == "Int8"
    assert len(set(kinds.values())) >= 3


def test_both_products_of_a_remainder_have_to_be_proven(deep: Exported, tmp_path: Path) -> None:
    """FP8, which holds no more than 4 bits, is for none of them."""
    plan = draw_remainders(deep, tmp_path, 1, 4)
    model = lowered(deep, tmp_path, plan, fp8=True)
    types, known = product_types(model, plan), {str(node.name) for node in model.graph}
    for layer in plan.layers:
        kind, names = types[layer.name]
        products = [str(name) for name in names]
        assert kind == "Int8"
        assert len(products) == len(set(products)) == 2 * len(layer.segments)
        assert [name.endswith("/remainder") for name in products] == [False, True] * len(layer.segments)
        assert set(products) <= known


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=["float16", "bfloat16"])
def test_remainders_and_what_they_are_left_over_of_stay_in_float32(
    deep: Exported, tmp_path: Path, dtype: ir.DataType
) -> None:
    """In half the remainder would be that of an operand rounded to 11 bits, and the sum of the products rounded too."""
    plan = draw_remainders(deep, tmp_path, 1)
    model = lowered(deep, tmp_path, plan, half=dtype)
    endings = ("/left_over", "/remainder", "/with_remainder", "/remainder/rescaled", "/remainder/dequantized")
    parts = [node for node in model.graph if str(node.name).endswith(endings)]
    assert len(parts) >= 4 * len(plan.layers)
    for node in parts:
        assert {value.dtype for value in (*node.inputs, *node.outputs) if value is not None} & {dtype} == set()
    if dtype == ir.DataType.FLOAT16:  # ONNX Runtime has no bfloat16 on CPU
        expected, actual = run(canonical_graph(deep, plan, tmp_path / "codes")), run(model)
        assert np.abs(actual - expected).max() <= 0.01 * np.abs(expected).max(), "no code of 8 bits shows any more"


def test_int4_weights_with_any_zero_point_are_the_canonical_ones(deep: Exported, tmp_path: Path) -> None:
    for bits in (2, 4):
        plan = draw(deep, tmp_path, 0, bits=(bits, None))
        model = lowered(deep, tmp_path, plan)
        assert any(node.op_type == "Sub" and str(node.name).endswith("weight_centered") for node in model.graph)
        expected, actual = run(canonical_graph(deep, plan, tmp_path / "codes")), run(model)
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, None)], ids=str)
def test_half_leaves_quantizers_products_and_norms_in_float32(
    deep: Exported, tmp_path: Path, bits: tuple[int, int | None]
) -> None:
    plan = draw(deep, tmp_path, 0, bits=bits)
    model = lowered(deep, tmp_path, plan, half=ir.DataType.FLOAT16)
    half = {node for node in model.graph if any(v.dtype == ir.DataType.FLOAT16 for v in node.outputs)}
    assert {"MatMul", "Softmax", "Add"} <= {node.op_type for node in half}, "attention products and residual sums"
    assert not {"QuantizeLinear", "DequantizeLinear", "LayerNormalization"} & {node.op_type for node in half}
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = constant_array(node.inputs[1])
            assert scale is not None
            assert scale.dtype == np.float32
    for node in half - {node for node in half if node.op_type == "Cast"}:
        floats = {v.dtype for v in node.inputs if v is not None and v.dtype != ir.DataType.INT64}
        assert floats <= {ir.DataType.FLOAT16} or node.op_type == "Resize", f"{node.name} mixes types"
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("out_sample", ir.DataType.FLOAT)]
    expected, actual = run(canonical_graph(deep, plan, tmp_path / "codes")), run(model)
    worst = 0.01 if bits[1] is None else 0.3  # codes of later layers may differ by one where half moves an input
    assert np.abs(actual - expected).max() <= worst * np.abs(expected).max()
    assert np.abs(actual - expected).mean() <= worst / 5 * np.abs(expected).max()


@needs_rtx
@pytest.mark.parametrize(
    ("bits", "half", "kinds"),
    [
        pytest.param((4, 4), None, {"FP8"}, id="fp8"),
        pytest.param((4, 4), ir.DataType.BFLOAT16, {"FP8"}, id="fp8 in bfloat16"),
        pytest.param((6, 6), ir.DataType.FLOAT16, {"Int8"}, id="int8 in half"),
        pytest.param((8, 8), ir.DataType.FLOAT16, {"Int8"}, id="remainders in half"),
        pytest.param((4, None), None, {"weight Int4", "weight Int8"}, id="int4 weights"),
        pytest.param((4, None), ir.DataType.FLOAT16, {"weight Int4", "weight Int8"}, id="int4 weights in half"),
    ],
)
def test_every_type_is_proven_from_the_builders_log(
    deep: Exported, tmp_path: Path, bits: tuple[int, int | None], half: ir.DataType | None, kinds: set[str]
) -> None:
    plan = draw_remainders(deep, tmp_path, 0) if bits == (8, 8) else draw(deep, tmp_path, 0, bits=bits)
    model = lowered(deep, tmp_path, plan, fp8=True, half=half)
    layers = built_layers(model, tmp_path)
    types = product_types(model, plan)
    proofs = prove_types(layers, types)
    assert {proof.layer for proof in proofs} == {layer.name for layer in plan.layers}
    assert {kind for kind, _ in types.values()} == kinds
    floats = {None: "Float", ir.DataType.FLOAT16: "Half", ir.DataType.BFLOAT16: "BFloat16"}
    types_of = {output.dtype for layer in layers for output in layer.outputs}
    assert floats[half] in types_of
    assert not [proof for proof in proofs if proof.activation in ("Int8", "FP8") and proof.output != "Float"]


@needs_rtx
def test_rotated_layers_are_proven(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exported = export_rotated(tmp_path, random_inputs(3, 1))
    plan = draw(exported, tmp_path, 1, bits=(4, 4))
    model = lowered(exported, tmp_path, plan)
    layers = built_layers(model, tmp_path)
    proofs = prove_types(layers, product_types(model, plan))
    assert {proof.layer for proof in proofs} == {layer.name for layer in plan.layers} >= {"tokens.net.2", "rows.net.2"}
    assert {proof.activation for proof in proofs} == {"Int8"}
