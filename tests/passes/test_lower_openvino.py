"""Every operator lowered for OpenVINO computes what the canonical one does, in ONNX Runtime and in OpenVINO itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from operator_pieces import (
    compare,
    cut_piece,
    draw,
    draw_remainders,
    float_values,
    pieces,
    run_piece,
    run_without_vnni,
    tolerance,
)
from simulation_fixture import Exported, canonical_graph, export, export_rotated, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.errors import EngineError, LoweringError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import REMAINDER_STEPS
from dmqexport.quant_weights import QuantWeights
from engines.openvino_ir import OpenVinoRunner, prove_int8
from passes.bind import bind
from passes.lower.openvino import LowerOpenVINO, VerifyOpenVINO
from passes.pipelines import lower_openvino

#: Taking back the shift of 8-bit probabilities cancels most of what float32 holds: without it, the lowered product is
#: nearer to exact arithmetic than the canonical one (test_fuse_attention), and as far from that as that is from exact.
UNSHIFTED = 4e-6
#: OpenVINO rounds x/s + 128 in float32, so a value this near to a tie may take the other code; everything else may not.
NEAR_TIE = 2.0**-16
BATCH = 3


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
@pytest.mark.parametrize("seed", range(6))
def test_the_lowered_operators_mean_the_canonical_ones(deep: Exported, tmp_path: Path, seed: int, vnni: bool) -> None:
    plan = draw(deep, tmp_path, seed)
    lowering = lower_openvino(plan, QuantWeights(tmp_path / "codes"), vnni=vnni)
    unshifted = vnni and any(not item.probability.zero_point.any() for item in plan.attentions)
    assert compare(deep, plan, tmp_path / "codes", lowering) <= (UNSHIFTED if unshifted else 1e-6)


@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
@pytest.mark.parametrize(("seed", "bits"), [(0, 8), (1, 8), (2, 4), (3, 6)])
def test_both_products_of_remainders_mean_the_canonical_ones(
    deep: Exported, tmp_path: Path, seed: int, bits: int, vnni: bool
) -> None:
    plan = draw_remainders(deep, tmp_path, seed, bits)
    lowering = lower_openvino(plan, QuantWeights(tmp_path / "codes"), vnni=vnni)
    assert compare(deep, plan, tmp_path / "codes", lowering) <= 1e-6


@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
@pytest.mark.parametrize(("seed", "bits"), [(1, 8), (4, 4)])
def test_openvino_executes_both_products_of_remainders_in_int8(
    deep: Exported, tmp_path: Path, seed: int, bits: int, vnni: bool
) -> None:
    plan = draw_remainders(deep, tmp_path, seed, bits)
    path, expected = lowered_file(deep, plan, tmp_path, vnni)
    assert {name: len(nodes) for name, nodes in expected.items()} == {
        layer.name: 2 * len(layer.segments) for layer in plan.layers
    }
    shapes = {name: tuple(value.shape) for name, value in random_inputs(BATCH, 0).items()}
    proofs = prove_int8(OpenVinoRunner(path, threads=1).executed(shapes), expected)
    assert [proof.node for proof in proofs] == [node for nodes in expected.values() for node in nodes]
    assert {proof.weight for proof in proofs} == {"i8"}


def execute(
    model: ir.Model, names: list[str], result: str, feeds: dict[str, np.ndarray], path: Path
) -> tuple[np.ndarray, OpenVinoRunner]:
    """Cut one operator out of `model` and run it in OpenVINO."""
    path.write_bytes(cut_piece(model, names, result, feeds))
    runner = OpenVinoRunner(path, threads=1)
    return runner.run(feeds)[result], runner


def distance_to_tie(model: ir.Model, layer: str, names: list[str], feeds: dict[str, np.ndarray]) -> float:
    """How near any value that the layer's quantizers round comes to the middle between two codes.

    In codes of the layer's own quantizer: a remainder is a float32 difference in steps 254 times finer.
    """
    nearest = 1.0
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and str(node.name).startswith(f"{layer}#"):
            values = run_piece(model, names, str(node.inputs[0].name), feeds)
            codes = values.astype(np.float64) / float(node.inputs[1].const_value.numpy())
            distance = float(np.abs(codes - np.floor(codes) - 0.5).min())
            nearest = min(nearest, distance / REMAINDER_STEPS if "/remainder" in str(node.name) else distance)
    return nearest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "seed"), [*((draw, seed) for seed in range(4)), (draw_remainders, 0), (draw_remainders, 1)]
)
def test_openvino_computes_the_canonical_operators(
    deep: Exported, tmp_path: Path, make: Callable[..., QuantPlan], seed: int
) -> None:
    plan = make(deep, tmp_path, seed)
    reference, lowered = (canonical_graph(deep, plan, tmp_path / "codes") for _ in range(2))
    lower_openvino(plan, QuantWeights(tmp_path / "codes"), vnni=True)(lowered)
    inputs, operators = random_inputs(BATCH, seed=5), pieces(deep, plan)
    values = float_values(deep, {name for names, _ in operators.values() for name in names}, inputs)
    values["timestep"] = inputs["timestep"].numpy()
    exact = 0
    for name, (names, result) in operators.items():
        expected = run_piece(reference, names, result, values)
        actual, _ = execute(lowered, names, result, values, tmp_path / "piece.onnx")
        assert actual.shape == expected.shape
        if np.abs(actual - expected).max() <= tolerance(plan, name) * np.abs(expected).max():
            exact += 1
        else:
            assert distance_to_tie(reference, name, names, values) < NEAR_TIE, name
    assert exact >= len(operators) - 1


@pytest.mark.parametrize("bits", [(4, 4), (3, 7), (8, 8), (8, 4)], ids=["w4a4", "w3a7", "w8a8", "w8a4"])
@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
def test_openvino_executes_every_planned_layer_in_int8(
    deep: Exported, tmp_path: Path, bits: tuple[int, int], vnni: bool
) -> None:
    plan = draw(deep, tmp_path, 4 if bits == (8, 4) else 1, bits=bits)  # 4: one row, so that nothing follows conv_out
    path, expected = lowered_file(deep, plan, tmp_path, vnni)
    runner = OpenVinoRunner(path, threads=1)
    shapes = {name: tuple(value.shape) for name, value in random_inputs(BATCH, 0).items()}
    proofs = prove_int8(runner.executed(shapes), expected)
    assert [proof.node for proof in proofs] == [node for nodes in expected.values() for node in nodes]
    assert {proof.weight for proof in proofs} == {"i8"}


@pytest.mark.parametrize("vnni", [True, False], ids=["vnni", "portable"])
def test_openvino_executes_rotated_layers_in_int8(tmp_path: Path, vnni: bool) -> None:
    """The float product that rotates is not taken for the layer's own."""
    torch.manual_seed(0)
    exported = export_rotated(tmp_path, random_inputs(3, 1))
    plan = draw(exported, tmp_path, 1, bits=(4, 4))
    path, expected = lowered_file(exported, plan, tmp_path, vnni)
    shapes = {name: tuple(value.shape) for name, value in random_inputs(BATCH, 0).items()}
    proofs = prove_int8(OpenVinoRunner(path, threads=1).executed(shapes), expected)
    assert {proof.layer for proof in proofs} == {layer.name for layer in plan.layers} >= {"tokens.net.2", "rows.net.2"}


def lowered_file(deep: Exported, plan: QuantPlan, folder: Path, vnni: bool) -> tuple[Path, dict[str, list[str]]]:
    """(the whole lowered graph on disk, layer → nodes that must run in int8)."""
    model = canonical_graph(deep, plan, folder / "codes")
    lower_openvino(plan, QuantWeights(folder / "codes"), vnni=vnni)(model)
    path = folder / "lowered.onnx"
    ir.save(model, path)
    nodes = {name: [str(node.name) for node in item.compute] for name, item in bind(model, plan).layers.items()}
    return path, {name: nodes[name] for name in nodes if plan.layer(name).activation_bits is not None}


def test_the_canonical_graph_alone_does_not_run_in_int8(deep: Exported, tmp_path: Path) -> None:
    """What the lowering is for, and that the proof sees it: packed weights are multiplied in float."""
    plan = draw(deep, tmp_path, 1, bits=(4, 4))
    path, expected = lowered_file(deep, plan, tmp_path, True)
    ir.save(canonical_graph(deep, plan, tmp_path / "codes"), path)
    shapes = {name: tuple(value.shape) for name, value in random_inputs(BATCH, 0).items()}
    with pytest.raises(
        EngineError, match=r"(?s)quantized operators do not run in int8:\n.*conv_in/Conv.* on f32 x f32"
    ):
        prove_int8(OpenVinoRunner(path, threads=1).executed(shapes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("vnni", [True, False], ids=["signed", "portable"])
def test_portable_weights_do_not_saturate_on_cpus_without_vnni(deep: Exported, tmp_path: Path, vnni: bool) -> None:
    """oneDNN's own switch takes VNNI away: the weights that rely on it go wrong, the portable ones do not."""
    plan = draw(deep, tmp_path, 2, bits=(8, 8))
    reference, lowered = (canonical_graph(deep, plan, tmp_path / "codes") for _ in range(2))
    lower_openvino(plan, QuantWeights(tmp_path / "codes"), vnni=vnni)(lowered)
    names, result = pieces(deep, plan)["skip_conv"]
    random, inputs = np.random.default_rng(0), random_inputs(BATCH, seed=5)
    shapes = {name: value.shape for name, value in float_values(deep, set(names), inputs).items()}
    # Saturation needs large codes of one sign beside each other.
    feeds = {name: (8 + random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    feeds["timestep"] = inputs["timestep"].numpy()
    expected = run_piece(reference, names, result, feeds)
    found = run_without_vnni(cut_piece(lowered, names, result, feeds), feeds, result, tmp_path, "jit_avx2_I8")
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert (error <= 1e-5) is not vnni, error


def test_a_second_run_changes_nothing(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(8, 4))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    for vnni in (False, True):
        assert LowerOpenVINO(plan, vnni=vnni)(model).modified is not vnni


def test_a_graph_for_vnni_becomes_the_portable_one(deep: Exported, tmp_path: Path) -> None:
    """What a bundle keeps can be rebuilt for another CPU without the weights it was made from."""
    plan = draw(deep, tmp_path, 2, bits=(8, 8))
    weights = QuantWeights(tmp_path / "codes")

    def twice(model: ir.Model) -> None:
        lower_openvino(plan, weights, vnni=True)(model)
        assert LowerOpenVINO(plan, vnni=False)(model).modified

    assert compare(deep, plan, tmp_path / "codes", twice) <= 1e-6


def test_what_openvino_does_not_load_or_runs_in_float_is_refused(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(8, 8))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    node.replace_input_with(1, node.inputs[0])
    next(node for node in model.graph if node.op_type == "Softmax").domain = "com.microsoft"
    with pytest.raises(LoweringError, match=r"ONNX Runtime only; .*a scale that is not constant runs in float"):
        VerifyOpenVINO()(model)
