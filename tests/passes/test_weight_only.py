"""Layers with float activations in ONNX Runtime: the plan's codes, packed in the file, and nothing rounded beside."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from operator_pieces import compare, draw
from simulation_fixture import Exported, canonical_graph, export, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.quant_plan import LayerOp
from dmqexport.quant_weights import QuantWeights
from passes.lower.weight_only import BLOCK_PRODUCT, LowerWeightOnly, best_block
from passes.pipelines import lower_ort_cpu

#: Relative to the largest output. Nothing is rounded to codes here, so that only orders of float sums differ.
TOLERANCE = 2e-5
WIDTHS = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


def run(model: ir.Model, level: ort.GraphOptimizationLevel) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    inputs = random_inputs(3, seed=5)
    output: np.ndarray = session.run(None, {item.name: inputs[item.name].numpy() for item in session.get_inputs()})[0]
    return output


@pytest.mark.parametrize("packed", [False, True], ids=["expanded", "packed"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_fused_graph_computes_the_canonical_one(deep: Exported, tmp_path: Path, bits: int, packed: bool) -> None:
    plan = draw(deep, tmp_path, 0, bits=(bits, None))
    expected = run(canonical_graph(deep, plan, tmp_path / "codes"), ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    model = canonical_graph(deep, plan, tmp_path / "codes")
    lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=True, packed=packed)(model)
    assert not any(node.op_type == "DequantizeLinear" for node in model.graph)
    actual = run(model, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("packed", [False, True], ids=["expanded", "packed"])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_plans_lower_layer_by_layer(deep: Exported, tmp_path: Path, seed: int, packed: bool) -> None:
    plan = draw(deep, tmp_path, seed)
    assert any(layer.activation_bits is None for layer in plan.layers)
    weights = QuantWeights(tmp_path / "codes")
    assert compare(deep, plan, tmp_path / "codes", lower_ort_cpu(plan, weights, vnni=False, packed=packed)) <= 1e-5


def test_a_second_run_changes_nothing(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, None))
    for packed in (False, True):
        model = canonical_graph(deep, plan, tmp_path / "codes")
        lowering = LowerWeightOnly(plan, QuantWeights(tmp_path / "codes"), packed=packed)
        assert lowering(model).modified
        assert not lowering(model).modified


def test_linear_layers_stay_packed_and_hold_the_codes_of_the_plan(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, None))
    weights = QuantWeights(tmp_path / "codes")
    model = canonical_graph(deep, plan, tmp_path / "codes")
    LowerWeightOnly(plan, weights, packed=True)(model)
    products = {node.metadata_props["dmqexport.module"]: node for node in model.graph if node.op_type == BLOCK_PRODUCT}
    assert set(products) == {layer.name for layer in plan.layers if layer.op is LayerOp.LINEAR}
    for layer in plan.layers:
        if layer.name not in products:
            continue
        node, qparams = products[layer.name], layer.segments[0].weight
        assert node.attributes["accuracy_level"].as_int() == 1, "at level 4 activations are rounded to 8 bits"
        _, blocks, scales, _ = (value.const_value.numpy() if value.const_value else None for value in node.inputs)
        assert blocks is not None
        assert scales is not None
        halves = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(len(blocks), -1)
        features = weights.shape(layer.name, 0)[1]
        codes = halves[:, :features].astype(np.int64) - qparams.zero_point[:, None]
        np.testing.assert_array_equal(codes, weights.codes(layer.name, 0))
        np.testing.assert_array_equal(
            scales.reshape(len(blocks), -1), qparams.scale[:, None].repeat(blocks.shape[1], 1)
        )


def test_expanded_weights_lie_packed_in_the_file(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, None))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    LowerWeightOnly(plan, QuantWeights(tmp_path / "codes"), packed=False)(model)
    stored = [value.const_value for value in model.graph.initializers.values() if str(value.name).endswith("_codes")]
    assert len(stored) == sum(len(layer.segments) for layer in plan.layers)
    for tensor in stored:
        assert tensor is not None
        assert tensor.dtype == ir.DataType.UINT4
        assert tensor.numpy().dtype == ml_dtypes.uint4
        assert tensor.nbytes <= tensor.size / 2 + 1


@pytest.mark.parametrize(
    ("features", "block"), [(96, 32), (128, 128), (320, 64), (1280, 256), (768, 256), (10, 16), (130, 32)]
)
def test_the_block_costs_the_fewest_bytes(features: int, block: int) -> None:
    assert best_block(features, 4) == block
