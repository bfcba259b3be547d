"""OpenVINO itself: what it computes, what it executes as int8, and what it is asked for that is not there."""

import json
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dmqexport.errors import BackendMissingError, EngineError, ResourceError
from engines.bench import interleaved
from engines.openvino_ir import (
    IR_BIN,
    IR_JSON,
    IR_XML,
    ExecutedLayer,
    OpenVinoRunner,
    build_ir,
    check_device,
    devices,
    open_ir,
    prove_int8,
    version,
)

CHANNELS = 16


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two convolutions, `quantized/Conv` with Q/DQ around its input and weight and `plain/Conv` without."""
    random = np.random.default_rng(0)
    codes = random.integers(-100, 100, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    constants = {
        "codes": codes,
        "weight_scale": np.full(CHANNELS, 0.01, dtype=np.float32),
        "scale": np.array(0.05, dtype=np.float32),
        "zero": np.array(0, dtype=np.int8),
        "weight": random.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "dq"),
        helper.make_node("DequantizeLinear", ["codes", "weight_scale"], ["w"], "w", axis=0),
        helper.make_node("Conv", ["dq", "w"], ["hidden"], "quantized/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["hidden", "weight"], ["plain"], "plain/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Abs", ["plain"], ["out_sample"], "end"),
    ]
    shape = ["batch", CHANNELS, 8, 8]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "two",
            [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(model, path)
    return path


def sample(batch: int) -> dict[str, np.ndarray]:
    return {"sample": np.random.default_rng(batch).normal(size=(batch, CHANNELS, 8, 8)).astype(np.float32)}


SHAPES = {batch: {"sample": (batch, CHANNELS, 8, 8)} for batch in (1, 3)}
EXPECTED = {"quantized": ["quantized/Conv"]}


def test_any_batch_and_the_same_values_as_onnx_runtime(graph: Path) -> None:
    from engines.ort import Optimization, OrtRunner

    reference, runner = (
        OrtRunner(graph, optimization=Optimization.REFERENCE, threads=1),
        OpenVinoRunner(graph, threads=1),
    )
    assert runner.input_names == ("sample",)
    assert runner.output_names == ("out_sample",)
    for batch in (2, 5, 2):
        expected, actual = (side.run(sample(batch))["out_sample"] for side in (reference, runner))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_results_outlive_the_next_call(graph: Path) -> None:
    """OpenVINO hands out its own memory; what we return is a copy."""
    runner = OpenVinoRunner(graph, threads=1)
    first = runner.run(sample(2))["out_sample"]
    kept = first.copy()
    runner.run({"sample": sample(2)["sample"] * 3})
    assert np.array_equal(first, kept)


def test_threads_take_turns(graph: Path) -> None:
    """Concurrent calls of several shapes, more than are kept, all get their own answer."""
    runner = OpenVinoRunner(graph, threads=1)
    expected = {batch: OpenVinoRunner(graph, threads=1).run(sample(batch))["out_sample"] for batch in range(1, 8)}
    wrong: list[int] = []

    def work(offset: int) -> None:
        for index in range(14):
            batch = 1 + (index + offset) % 7
            if not np.array_equal(runner.run(sample(batch))["out_sample"], expected[batch]):
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_ir_runs_like_its_graph_and_is_proven_wherever_it_is_compiled(graph: Path, tmp_path: Path) -> None:
    built = build_ir(graph, tmp_path, SHAPES, device="CPU", expected=EXPECTED)
    assert built.version == version()
    assert built.batches == (1, 3)
    assert built.size_bytes == sum((tmp_path / name).stat().st_size for name in (IR_XML, IR_BIN))
    (proof,) = built.proofs
    assert (proof.layer, proof.node, proof.activation, proof.weight) == ("quantized", "quantized/Conv", "u8", "i8")
    opened = open_ir(tmp_path, threads=1)
    assert np.array_equal(
        opened.run(sample(2))["out_sample"], OpenVinoRunner(graph, threads=1).run(sample(2))["out_sample"]
    )
    document = json.loads((tmp_path / IR_JSON).read_text())
    document["expected"]["plain"] = ["plain/Conv"]
    (tmp_path / IR_JSON).write_text(json.dumps(document))
    with pytest.raises(EngineError, match=r"1 of 2 .*\n.*plain .*'plain/Conv'.* on f32 x f32"):
        open_ir(tmp_path, threads=1).run(sample(4))


def test_the_same_graph_makes_the_same_bytes(graph: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build_ir(graph, tmp_path / name, SHAPES, device="CPU", expected=EXPECTED)
        contents.append([(tmp_path / name / file).read_bytes() for file in (IR_XML, IR_BIN, IR_JSON)])
    assert contents[0] == contents[1]


def test_a_layer_in_float_or_nowhere_is_an_error(graph: Path, tmp_path: Path) -> None:
    wrong = {**EXPECTED, "plain": ["plain/Conv"], "gone": ["gone/Conv"], "empty": []}
    with pytest.raises(EngineError) as caught:
        build_ir(graph, tmp_path, SHAPES, device="CPU", expected=wrong)
    assert "3 of 4 quantized operators do not run in int8" in str(caught.value)
    assert "gone (node 'gone/Conv') is executed by no product, only by nothing" in str(caught.value)
    assert "quantized (node" not in str(caught.value)


def test_a_product_with_one_operand_in_float_is_no_proof() -> None:
    def layer(*inputs: str, kind: str = "FullyConnected") -> ExecutedLayer:
        return ExecutedLayer("a/MatMul/rescaled", kind, "brgemm", inputs, "f32", ("a/MatMul/rescaled", "other"))

    (proof,) = prove_int8([layer("i8", "i8")], {"a": ["a/MatMul"]})
    assert proof.engine_layer == "a/MatMul/rescaled"
    for layers in (
        [layer("f32", "i8")],
        [layer("u8", "f32")],
        [layer("u8")],
        [layer("i8", "i8", kind="Subgraph")],
        [layer("i8", "i8"), layer("f32", "f32")],
        [],
    ):
        with pytest.raises(EngineError, match="do not run in int8"):
            prove_int8(layers, {"a": ["a/MatMul"]})
    with pytest.raises(EngineError, match="only by nothing"):
        prove_int8([layer("i8", "i8")], {"a": ["a/Mat"]})


# Refusals


def test_missing_and_misshapen_inputs(graph: Path) -> None:
    runner = OpenVinoRunner(graph, threads=1)
    with pytest.raises(EngineError, match=r"inputs \['sample'\] missing, got \['other'\]"):
        runner.run({"other": np.zeros(1)})
    with pytest.raises(EngineError, match=r"OpenVINO failed on inputs .*\(2, 3, 8, 8\)"):
        runner.run({"sample": np.zeros((2, 3, 8, 8), dtype=np.float32)})


def test_files_that_are_no_networks(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match="OpenVINO cannot load this network"):
        OpenVinoRunner(tmp_path / "model.onnx")
    with pytest.raises(EngineError, match="OpenVINO cannot convert this graph"):
        build_ir(tmp_path / "model.onnx", tmp_path, {}, device="CPU", expected={})
    for content in (None, "{", '{"device": "CPU"}', '{"device": "CPU", "expected": 3}'):
        if content is not None:
            (tmp_path / IR_JSON).write_text(content)
        with pytest.raises(EngineError, match=r"precision\.json cannot be read"):
            open_ir(tmp_path)


def test_folders_that_cannot_be_written(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="the IR cannot be written"):
        build_ir(graph, graph, SHAPES, device="CPU", expected=EXPECTED)


def test_devices_that_are_not_here(graph: Path) -> None:
    found = devices()
    assert "CPU" in found
    check_device("CPU")
    for device in {"GPU", "NPU", "TPU"} - {name.partition(".")[0] for name in found}:
        with pytest.raises(BackendMissingError, match=f"OpenVINO sees no {device} here; its devices are: .*CPU"):
            OpenVinoRunner(graph, device=device)


def test_without_openvino(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    assert version() is None
    assert devices() == ()
    with pytest.raises(BackendMissingError, match=r"pip install 'dmqexport\[openvino\]'"):
        OpenVinoRunner(graph)


def test_bench_takes_it_beside_any_other_runner(graph: Path) -> None:
    result = interleaved(
        {"a": OpenVinoRunner(graph, threads=1), "b": OpenVinoRunner(graph, threads=1)}, sample(2), runs=3
    )
    assert result.median_ms.keys() == {"a", "b"}
    assert result.ratio("a", "b") > 0
