"""Quantized attention for OpenVINO: the same products, as one kernel, and never saturated."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from operator_pieces import BATCH, cut_piece, draw, float_values, pieces, run_piece, run_without_vnni
from simulation_fixture import Exported, canonical_graph, export, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import AttentionQuant, QuantPlan
from dmqexport.quant_types import ActivationQuant
from dmqexport.quant_weights import QuantWeights
from engines.openvino_ir import OpenVinoRunner
from passes.bind import bind, graph_attentions
from passes.lower.fuse_attention import FuseAttention
from passes.lower.openvino import LowerOpenVINO
from passes.pipelines import lower_openvino


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


@pytest.fixture(params=[1, 4], ids=["rows", "one-row"])
def drawn(deep: Exported, tmp_path: Path, request: pytest.FixtureRequest) -> QuantPlan:
    plan = draw(deep, tmp_path, request.param)
    assert plan.attentions

    def as_calibrated(item: AttentionQuant) -> AttentionQuant:
        rows = {"query": (item.query, 128), "probability": (item.probability, 0)}
        moved = {
            name: ActivationQuant.from_rows(8, old.scale, np.full(old.rows, zero)) for name, (old, zero) in rows.items()
        }
        return replace(item, **moved)

    return replace(plan, attentions=tuple(as_calibrated(item) for item in plan.attentions))


def lowered(deep: Exported, plan: QuantPlan, folder: Path, vnni: bool = True) -> ir.Model:
    model = canonical_graph(deep, plan, folder / "codes")
    lower_openvino(plan, QuantWeights(folder / "codes"), vnni=vnni)(model)
    return model


def quantized(values: np.ndarray, qparams: ActivationQuant, rows: np.ndarray) -> np.ndarray:
    """What the codes of `values` stand for, in float64; rows: of the table, one a sample."""
    at = rows if qparams.rows > 1 else np.zeros_like(rows)
    scale, zero = (np.asarray(part)[at].reshape(-1, 1, 1, 1) for part in (qparams.scale, qparams.zero_point))
    found: np.ndarray = np.clip(np.round(values / scale.astype(np.float64)) + zero, 0, 2**qparams.bits - 1) - zero
    return found * scale


def test_products_are_those_of_the_codes(deep: Exported, drawn: QuantPlan, tmp_path: Path) -> None:
    """Nearer to exact arithmetic than the canonical graph, which takes back 128 steps times the sum of the values."""
    model, inputs, operators = lowered(deep, drawn, tmp_path), random_inputs(BATCH, seed=5), pieces(deep, drawn)
    pairs = graph_attentions(ir.load(deep.graph).graph)
    for attention in drawn.attentions:
        for node, left, right in (
            (pairs[attention.name].query_key, attention.query, attention.key),
            (pairs[attention.name].probability_value, attention.probability, attention.value),
        ):
            names, result = operators[str(node.name)]
            values = float_values(deep, set(names), inputs) | {"timestep": inputs["timestep"].numpy()}
            rows = drawn.row_map[values["timestep"]]
            exact = quantized(values[names[0]], left, rows) @ quantized(values[names[1]], right, rows)
            found = run_piece(model, names, result, values)
            assert np.abs(found - exact).max() <= 5e-7 * np.abs(exact).max(), node.name


def test_nothing_but_the_products_reads_codes(deep: Exported, drawn: QuantPlan, tmp_path: Path) -> None:
    model = lowered(deep, drawn, tmp_path)
    float_pairs = graph_attentions(ir.load(deep.graph).graph)
    for attention in drawn.attentions:
        nodes = bind(model, drawn).attentions[attention.name]
        operands = [
            value.producer() for product in (nodes.query_key, nodes.probability_value) for value in product.inputs
        ]
        types = [node.inputs[0].dtype for node in operands]
        assert types == [ir.DataType.INT8] * 2 + [ir.DataType.UINT8, ir.DataType.INT8]
        for product, original in zip(
            (nodes.query_key, nodes.probability_value),
            (float_pairs[attention.name].query_key, float_pairs[attention.name].probability_value),
            strict=True,
        ):
            result = product.outputs[0]
            while result.name != original.outputs[0].name:  # by one product with a table at most
                (reader,) = (use.node for use in result.uses())
                assert reader.op_type == "Mul"
                assert product.outputs[0] in reader.inputs
                result = reader.outputs[0]
        assert all(use.node is nodes.probability_value for use in operands[3].outputs[0].uses())


def test_a_second_run_changes_nothing(deep: Exported, drawn: QuantPlan, tmp_path: Path) -> None:
    model = canonical_graph(deep, drawn, tmp_path / "codes")
    assert FuseAttention(drawn)(model).modified
    assert not FuseAttention(drawn)(model).modified


def test_openvino_runs_it_as_one_kernel(deep: Exported, drawn: QuantPlan, tmp_path: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in random_inputs(BATCH, 0).items()}
    ir.save(canonical_graph(deep, drawn, tmp_path / "codes"), tmp_path / "canonical.onnx")
    ir.save(lowered(deep, drawn, tmp_path), tmp_path / "lowered.onnx")
    separate, whole = (
        OpenVinoRunner(tmp_path / name, threads=1).executed(shapes) for name in ("canonical.onnx", "lowered.onnx")
    )
    assert drawn.rows == 1 or any(layer.kind == "Softmax" for layer in separate)
    assert not any(layer.kind == "Softmax" for layer in whole)
    for attention in drawn.attentions:
        (kernel,) = (
            layer
            for layer in whole
            if any(source.endswith("Softmax") and attention.name in source for source in layer.sources)
        )
        assert kernel.kernel.endswith("i8"), kernel


@pytest.mark.parametrize("first", ["canonical", "vnni"])
def test_portable_attention_multiplies_its_codes_in_float(
    deep: Exported, drawn: QuantPlan, tmp_path: Path, first: str
) -> None:
    """Also in a graph that was lowered for VNNI: a bundle is rebuilt from that."""
    model = lowered(deep, drawn, tmp_path, vnni=first == "vnni")
    assert LowerOpenVINO(drawn, vnni=False)(model).modified is (first == "vnni")
    for nodes in bind(model, drawn).attentions.values():
        for product in (nodes.query_key, nodes.probability_value):
            assert {value.producer().op_type for value in product.inputs} == {"Mul"}


@pytest.mark.slow
@pytest.mark.parametrize("vnni", [True, False], ids=["signed", "portable"])
def test_portable_attention_does_not_saturate_on_cpus_without_vnni(
    deep: Exported, drawn: QuantPlan, tmp_path: Path, vnni: bool
) -> None:
    """oneDNN's own switch takes VNNI away: what relies on it goes wrong, the portable form does not."""
    attention: AttentionQuant = drawn.attentions[0]
    node = graph_attentions(ir.load(deep.graph).graph)[attention.name].probability_value
    names, result = pieces(deep, drawn)[str(node.name)]
    inputs = random_inputs(BATCH, seed=5)
    feeds = float_values(deep, set(names), inputs)
    for name, qparams in zip(names, (attention.probability, attention.value), strict=True):
        feeds[name] = np.full_like(feeds[name], 500 * float(np.max(qparams.scale)))  # the largest codes side by side
    feeds["timestep"] = inputs["timestep"].numpy()
    rows = drawn.row_map[feeds["timestep"]]
    exact = quantized(feeds[names[0]], attention.probability, rows) @ quantized(feeds[names[1]], attention.value, rows)
    piece = cut_piece(lowered(deep, drawn, tmp_path, vnni), names, result, feeds)
    error = float(np.abs(run_without_vnni(piece, feeds, result, tmp_path) - exact).max() / np.abs(exact).max())
    assert (error <= 1e-5) is not vnni, error


def test_a_graph_that_is_not_canonical_is_refused(deep: Exported, drawn: QuantPlan, tmp_path: Path) -> None:
    model = canonical_graph(deep, drawn, tmp_path / "codes")
    product = bind(model, drawn).attentions[drawn.attentions[0].name].probability_value
    product.replace_input_with(0, product.inputs[1])
    with pytest.raises(LoweringError, match="fuse_attention"):
        FuseAttention(drawn).call(model)
