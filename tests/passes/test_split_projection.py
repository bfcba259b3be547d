"""A projection whose result is split is computed part by part: the same numbers, nothing copied apart."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.openvino_ir import OpenVinoRunner, prove_int8
from passes.lower.split_projection import SplitProjection
from passes.pipelines import openvino_engine

INSIDE, PARTS = 12, 16
PRODUCT = "geglu.proj/MatMul"


def geglu(packed: bool = False, split_axis: int = -1, bias: bool = True, second_reader: bool = False) -> ir.Model:
    """x → Q/DQ → MatMul → Mul by a table's column → Add → Split → gelu(gate) · value, as lowered for OpenVINO."""
    random = np.random.default_rng(0)
    codes = random.integers(-7 if packed else -127, 8, (INSIDE, 2 * PARTS))
    nodes: list[ir.Node] = []
    constants: dict[str, ir.Value] = {}

    def constant(array: np.ndarray, name: str) -> ir.Value:
        constants[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        return constants[name]

    def add(op_type: str, inputs: list[ir.Value], name: str, outputs: int = 1, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=name, num_outputs=outputs)
        for index, output in enumerate(node.outputs):
            output.name, output.type = f"{name}:{index}", ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
        return node.outputs[0]

    sample, column = (
        ir.Input(name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT))
        for name, shape in (("sample", ["batch", 5, INSIDE]), ("column", ["batch", 1, 1]))
    )
    scale, zero = constant(np.float32(0.02), "scale"), constant(np.int8(0), "zero")
    quantized = add("QuantizeLinear", [sample, scale, zero], "codes")
    quantized.type = ir.TensorType(ir.DataType.INT8)
    seen = add("DequantizeLinear", [quantized, scale, zero], "seen")
    if packed:
        stored = add(
            "Cast", [constant((codes + 8).astype(ml_dtypes.uint4), "stored")], "wide", to=int(ir.DataType.INT32)
        )
        signed = add("Sub", [stored, constant(np.full((1, 2 * PARTS), 8, np.int32), "offset")], "signed")
        weight = add("Cast", [signed], "narrow", to=int(ir.DataType.INT8))
        for value, dtype in ((stored, ir.DataType.INT32), (signed, ir.DataType.INT32), (weight, ir.DataType.INT8)):
            value.type = ir.TensorType(dtype)
    else:
        weight = constant(codes.astype(np.int8), "weight")
    scales = constant(random.uniform(0.01, 0.02, 2 * PARTS).astype(np.float32), "scales")
    last = add("MatMul", [seen, add("DequantizeLinear", [weight, scales], "dequantized", axis=1)], PRODUCT)
    last = add("Mul", [last, column], f"{PRODUCT}/rescaled")
    if bias:
        last = add("Add", [last, constant(random.normal(size=2 * PARTS).astype(np.float32), "bias")], "geglu.proj/Add")
    last.shape = ir.Shape(["batch", 5, 2 * PARTS])
    value = add("Split", [last], "split", outputs=2, axis=split_axis, num_outputs=2)
    gate = value.producer().outputs[1]
    outputs = [add("Mul", [add("Gelu", [gate], "gelu"), value], "result")]
    outputs += [add("Neg", [last], "negative")] if second_reader else []
    for output in outputs:
        output.shape = ir.Shape(["batch", None, None])
    graph = ir.Graph(
        [sample, column],
        outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": 21},
        name="geglu",
    )
    return ir.Model(graph, ir_version=10)


FEEDS = {
    "sample": np.random.default_rng(1).uniform(-2, 2, (3, 5, INSIDE)).astype(np.float32),
    "column": np.random.default_rng(2).uniform(0.5, 2, (3, 1, 1)).astype(np.float32),
}


def run(model: ir.Model) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(None, FEEDS)[0]
    return found


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
def test_every_part_is_what_it_was(packed: bool, bias: bool) -> None:
    model = geglu(packed, bias=bias)
    expected = run(model)
    assert openvino_engine()(model).modified
    assert not any(node.op_type == "Split" for node in model.graph)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert [node.name for node in products] == [f"{PRODUCT}/part0", f"{PRODUCT}/part1"]
    assert not any(value.name in ("weight", "stored", "scales") for value in model.graph.initializers.values())
    np.testing.assert_allclose(run(model), expected, rtol=1e-6, atol=1e-6)
    assert not SplitProjection()(model).modified


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
def test_openvino_multiplies_both_parts_in_int8(packed: bool, tmp_path: Path) -> None:
    model = geglu(packed)
    expected = run(model)
    openvino_engine()(model)
    ir.save(model, tmp_path / "model.onnx")
    runner = OpenVinoRunner(tmp_path / "model.onnx", threads=1)
    executed = runner.executed({name: value.shape for name, value in FEEDS.items()})
    prove_int8(executed, {"geglu.proj": [PRODUCT]})
    assert sum(layer.kind == "FullyConnected" or "MatMul" in layer.kind for layer in executed) == 2
    assert not any(layer.kind == "Split" for layer in executed)
    np.testing.assert_allclose(next(iter(runner.run(FEEDS).values())), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: geglu(second_reader=True), id="the whole result is read too"),
        pytest.param(lambda: geglu(split_axis=0), id="split along another axis"),
    ],
)
def test_what_is_not_split_by_channels_alone_is_left(make: Callable[[], ir.Model]) -> None:
    model = make()
    if model.graph[-1].op_type != "Neg":  # three samples cannot be halved, so this one is not run
        assert not SplitProjection()(model).modified
        return
    expected = run(model)
    assert not SplitProjection()(model).modified
    np.testing.assert_array_equal(run(model), expected)


def test_other_operators_between_are_left() -> None:
    """A Mul that is no table's column may tell channels apart."""
    model = geglu()
    next(node for node in model.graph if str(node.name).endswith("/rescaled")).name = "something"
    assert not SplitProjection()(model).modified
