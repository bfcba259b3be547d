"""The products of one layer are added as they come: same results, fewer passes over them."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from operator_pieces import draw, float_values, pieces, run_piece, tolerance
from simulation_fixture import Exported, canonical_graph, export, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import QuantWeights
from passes.base import Role, role_of
from passes.lower.join_products import JoinProducts
from passes.lower.ort_cpu import FUSED_PRODUCT
from passes.lower.uniform_rows import UniformRows
from passes.pipelines import lower_ort_cpu


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


def uniform(deep: Exported, plan: QuantPlan, codes: Path) -> ir.Model:
    """The fast graph of batches of one row, not joined yet."""
    model = canonical_graph(deep, plan, codes)
    lower_ort_cpu(plan, QuantWeights(codes), vnni=False)(model)
    UniformRows()(model)
    return model


def moved_sums(model: ir.Model) -> list[str]:
    """Sums of a layer whose operands were both moved after their product."""
    found = []
    for node in model.graph:
        makers = [value.producer() for value in node.inputs if value is not None]
        if node.op_type == "Add" and role_of(node) is Role.SUM:
            found += [str(node.name)] if all(maker and maker.op_type == "Transpose" for maker in makers) else []
    return found


@pytest.mark.parametrize("seed", range(8))
def test_joined_products_compute_what_the_canonical_operators_do(deep: Exported, tmp_path: Path, seed: int) -> None:
    plan = draw(deep, tmp_path, seed)
    reference, joined = canonical_graph(deep, plan, tmp_path / "codes"), uniform(deep, plan, tmp_path / "codes")
    JoinProducts()(joined)
    assert not JoinProducts()(joined).modified
    operators, inputs = pieces(deep, plan), random_inputs(3, seed=5)
    inputs["timestep"] = torch.full_like(inputs["timestep"], len(plan.row_map) // 2)
    values = float_values(deep, {name for names, _ in operators.values() for name in names}, inputs)
    values["timestep"] = inputs["timestep"].numpy()
    for name, (names, result) in operators.items():
        expected, actual = (run_piece(model, names, result, values) for model in (reference, joined))
        assert np.abs(actual - expected).max() <= tolerance(plan, name) * np.abs(expected).max(), result


def test_a_split_convolution_is_moved_once_and_its_bias_added_by_a_product(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 1, bits=(4, 4))
    model = uniform(deep, plan, tmp_path / "codes")
    before = moved_sums(model)
    split = [layer.name for layer in plan.layers if len(layer.segments) > 1]
    assert split
    assert len(before) == len(split)
    assert JoinProducts()(model).modified
    assert moved_sums(model) == []
    for name in split:
        biased = [
            node
            for node in model.graph
            if node.op_type == FUSED_PRODUCT and str(node.name).startswith(f"{name}/") and len(node.inputs) > 6
        ]
        assert len(biased) == 1, name


def test_a_graph_without_sums_is_left_alone(deep: Exported) -> None:
    model = ir.load(deep.graph)
    before = [node.name for node in model.graph]
    assert not JoinProducts()(model).modified
    assert [node.name for node in model.graph] == before
