"""Timing, profiles and memory, on graphs small enough to count by hand."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest

from dmqexport.report.bench_chart import _QUANTIZED, bench_svg
from engines.bench import interleaved, interleaved_trajectories
from engines.memory import peak_memory
from engines.openvino_ir import OpenVinoRunner, float_types
from engines.openvino_profile import profile_network
from engines.ort import OrtRunner
from engines.ort_half import half_computes_in, write_half
from engines.ort_profile import NodeTime, by_layer, by_operator, profile_nodes

PRODUCT = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[M,64] x) => (float[M,32] y) { y = MatMul (x, w) }"""


def graph(folder: Path, repeats: int = 0) -> Path:
    """x @ w, then as many passes over the result as asked for."""
    model = ir.from_onnx_text(PRODUCT)
    product = model.graph[0]
    product.name = "layer/MatMul"
    weight = product.inputs[1]
    assert weight is not None
    weight.const_value = ir.tensor(np.ones((64, 32), dtype=np.float32), name="w")
    model.graph.register_initializer(weight)
    value = product.outputs[0]
    for index in range(repeats):
        node = ir.node("Erf", [value], name=f"layer#0/pass_{index}")
        model.graph.append(node)
        value = node.outputs[0]
        value.type, value.name = ir.TensorType(ir.DataType.FLOAT), f"value_{index}"
    model.graph.outputs[0] = value
    path = folder / f"g{repeats}.onnx"
    ir.save(model, path)
    return path


FEEDS = {"x": np.ones((2048, 64), dtype=np.float32)}


def test_more_work_takes_longer_by_every_clock(tmp_path: Path) -> None:
    runners = {"short": OrtRunner(graph(tmp_path), threads=1), "long": OrtRunner(graph(tmp_path, 40), threads=1)}
    result = interleaved(runners, FEEDS, runs=5)
    for times in (result.median_ms, result.minimum_ms, result.processor_ms):
        assert times["long"] > 2 * times["short"] > 0
    assert result.ratio("long", "short") == result.median_ms["long"] / result.median_ms["short"]
    assert all(result.minimum_ms[name] <= result.median_ms[name] for name in runners)
    trajectory = interleaved_trajectories(runners, [FEEDS] * 6, runs=3)
    assert trajectory.minimum_ms["long"] > 3 * result.minimum_ms["long"]


def test_the_profile_counts_arithmetic_and_traffic(tmp_path: Path) -> None:
    nodes = profile_nodes(graph(tmp_path, 2), FEEDS, runs=3, threads=1)
    product = next(node for node in nodes if node.op == "MatMul")
    assert product.operations == 2 * 2048 * 64 * 32
    assert product.traffic == 4 * (2048 * 64 + 64 * 32 + 2048 * 32)
    assert {node.operations for node in nodes if node.op == "Erf"} == {0}
    table = by_operator(nodes)
    assert {(row.op, row.count) for row in table} == {("MatMul", 1), ("Erf", 2)}
    assert sum(row.share for row in table) == pytest.approx(1.0)
    assert by_layer(nodes, ["layer"])["layer"] == pytest.approx(sum(node.ms for node in nodes))


def test_openvinos_counters_tell_the_same_as_onnx_runtimes_profile(tmp_path: Path) -> None:
    runner = OpenVinoRunner(graph(tmp_path, 2), threads=1, counting=True)
    nodes = profile_network(runner, FEEDS, runs=3)
    product = next(node for node in nodes if node.operations)
    assert product.operations == 2 * 2048 * 64 * 32
    assert product.traffic == 4 * (2048 * 64 + 64 * 32 + 2048 * 32)
    assert product.operand == "f32"
    assert by_layer(nodes, ["layer"])["layer"] >= product.ms > 0


def test_half_precision_is_what_the_processor_computes_in(tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    write_half(graph(tmp_path, 1), half)
    exact = OrtRunner(graph(tmp_path, 1), threads=1).run(FEEDS)
    found = OrtRunner(half, threads=1).run(FEEDS)
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3)
    assert half_computes_in(half, FEEDS, 1) in ("float16", "float")
    assert half_computes_in(graph(tmp_path, 1), FEEDS, 1) == "float"
    for kind in float_types("CPU"):
        (narrow,) = OpenVinoRunner(graph(tmp_path, 1), threads=1, precision=kind).run(FEEDS).values()
        np.testing.assert_allclose(narrow, next(iter(exact.values())), rtol=1e-2)


def test_a_layer_has_the_nodes_of_its_name_and_no_others() -> None:
    named = {
        "a.conv/Conv": "a.conv", "a.conv#1/codes_u8_im2col/axis2_0": "a.conv", "a.conv2/Conv": "a.conv2",
        "a.conv#0/scaled": "a.conv", "node_silu_3": None, "b/x": None,
    }  # fmt: skip
    nodes = [NodeTime(name, "Op", (), 2.0**index, 0, 0) for index, name in enumerate(named)]
    expected = {layer: sum(node.ms for node in nodes if named[node.name] == layer) for layer in ("a.conv", "a.conv2")}
    assert by_layer(nodes, list(expected)) == expected


def test_peak_memory_sees_what_was_freed_again() -> None:
    with peak_memory() as peak:
        block = np.ones(32 * 2**20, dtype=np.uint8)
        del block
    if peak.grown is None:
        pytest.skip("this system does not say its peak memory")
    assert 24 * 2**20 < peak.grown < 200 * 2**20
    with peak_memory() as nothing:
        pass
    assert nothing.grown is not None
    assert nothing.grown < 8 * 2**20


def test_the_chart_draws_every_bar_and_escapes_names() -> None:
    document = {
        "batch": 2, "threads": 1, "ratio": 0.5, "layers": [{"layer": "a<b", "fp32_ms": 2.0, "quantized_ms": 1.0}],
        "runtimes": [{"runtime": "onnxruntime", "precision": "bf16", "median_ms": 4.0}],
        "mixed": {"rows": 2, "fp32_ms": 4.0, "quantized_ms": 3.0},
        "trajectory": {"steps": 3, "pictures": 1.0, "fp32_ms": 12.0, "quantized_ms": 6.0},
        "peaks": None, "operators": {"fp32": [], "quantized": []},
    }  # fmt: skip
    drawn = bench_svg(document)
    assert "a&lt;b" in drawn
    assert "a<b" not in drawn
    assert drawn.count("<rect") == 1 + 1 + 2 + 2 + 2
    assert drawn.count(_QUANTIZED) == 3, "float in half precision is not quantized"
    ElementTree.fromstring(drawn)

    product = {
        "op": "MatMul",
        "shapes": ((8, 64), (64, 32)),
        "count": 3,
        "ms": 2.0,
        "bound": "arithmetic",
        "of_peak": 0.25,
    }
    cached = {**product, "op": "Add", "ms": 1.0, "bound": "traffic", "of_peak": 1.5}
    unplaced = {key: product[key] for key in ("op", "shapes", "count", "ms")}
    document["operators"] = {"fp32": [unplaced], "quantized": [product, cached]}
    document["peaks"] = {"gflops": 100.0, "int8_gops": 400.0, "gbytes": 20.0}
    roofline = bench_svg(document)
    ElementTree.fromstring(roofline)
    assert "3 MatMul [8,64] × [64,32]" in roofline
    assert "2 ms, 25% of arithmetic" in roofline
    assert "1 ms, 150% of traffic" in roofline
    operators = roofline.split("Operators,")[1]
    bar = rf'width="([0-9.]+)" height="14" fill="{_QUANTIZED}"'
    solid, pale = (re.search(bar + end, operators) for end in ("/>", " fill-opacity"))
    assert solid is not None
    assert pale is not None
    assert float(solid[1]) == pytest.approx(float(pale[1]) / 3, rel=0.01), "a quarter of the time is what it would take"
    assert roofline.count("fill-opacity") == 1, "what is faster than memory, or was not placed, has nothing beyond"
