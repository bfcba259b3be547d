"""Graphs that run a batch one table row at a time: same codes, no vectors of scales, one sample as in any company."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from operator_pieces import draw, draw_remainders, float_values, pieces, run_piece, tolerance
from simulation_fixture import Exported, canonical_graph, export, observe_ranges
from simulation_models import DeepDenoiser, random_inputs

from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import QuantWeights
from passes.base import constant_array
from passes.bind import graph_attentions, graph_layers
from passes.gather_timestep_scale import TABLE
from passes.lower.group_by_row import GROUPS, GroupByRow, layer_graph, looping
from passes.lower.ort_cpu import FUSED_PRODUCT
from passes.lower.portable import MakePortable
from passes.lower.uniform_rows import UniformRows
from passes.pipelines import lower_ort_cpu
from passes.tap import TapOutputs


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    exported = export(DeepDenoiser(), tmp_path_factory.mktemp("deep"), random_inputs(2, 0))
    observe_ranges(exported, random_inputs(8, 1))
    return exported


def lowered(deep: Exported, plan: QuantPlan, codes: Path) -> ir.Model:
    """The fast graph; unsigned weights, which are exact on every CPU."""
    model = canonical_graph(deep, plan, codes)
    lower_ort_cpu(plan, QuantWeights(codes), vnni=False)(model)
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray], *, fast: bool = True) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if not fast:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})
    return found


def arrays(batch: int, seed: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in random_inputs(batch, seed).items()}


@pytest.mark.parametrize("seed", range(8))
def test_a_uniform_batch_gets_what_the_canonical_operators_compute(deep: Exported, tmp_path: Path, seed: int) -> None:
    check_uniform(deep, draw(deep, tmp_path, seed), tmp_path)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_uniform_batch_gets_the_canonical_remainders(deep: Exported, tmp_path: Path, seed: int) -> None:
    check_uniform(deep, draw_remainders(deep, tmp_path, seed), tmp_path)


def check_uniform(deep: Exported, plan: QuantPlan, folder: Path) -> None:
    """Compare every operator at three timesteps."""
    reference, uniform = canonical_graph(deep, plan, folder / "codes"), lowered(deep, plan, folder / "codes")
    assert UniformRows()(uniform).modified
    assert not UniformRows()(uniform).modified
    operators, inputs = pieces(deep, plan), random_inputs(3, seed=5)
    for timestep in (0, len(plan.row_map) // 2, len(plan.row_map) - 1):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        values = float_values(deep, {name for names, _ in operators.values() for name in names}, inputs)
        values["timestep"] = inputs["timestep"].numpy()
        for name, (names, result) in operators.items():
            expected, actual = (run_piece(model, names, result, values) for model in (reference, uniform))
            assert np.abs(actual - expected).max() <= tolerance(plan, name) * np.abs(expected).max(), result


def test_no_vector_of_scales_is_left(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 6, bits=(4, 4))
    model = lowered(deep, plan, tmp_path / "codes")
    assert plan.rows > 1
    before = sum(1 for _ in model.graph)
    UniformRows()(model)
    assert sum(1 for _ in model.graph) < before
    endings = ("/lo_clipped", "/hi_clipped", "/scaled", "/shifted", "/rescaled", "/corrected")
    integer = [node for node in model.graph if node.op_type != "ConvInteger"]
    assert [node.name for node in integer if str(node.name).endswith(endings[:2])] == []
    left = [node for node in integer if str(node.name).endswith(endings)]
    grouped = {name for name, nodes in graph_layers(model.graph).items() if nodes.compute[0].op_type == "ConvInteger"}
    assert {str(node.name).split("/")[0].split("#")[0] for node in left} <= grouped
    assert all(constant_array(node.inputs[0]) is not None for node in model.graph if node.op_type == "Gather"
               and str(node.name).startswith("dmqexport/uniform"))  # fmt: skip


def test_the_packed_table_keeps_what_is_read_alone(deep: Exported, tmp_path: Path) -> None:
    shrunk = 0
    for seed in range(8):
        codes = tmp_path / str(seed)
        codes.mkdir()
        model = lowered(deep, draw(deep, codes, seed), codes / "codes")
        before = constant_array(model.graph.initializers.get(TABLE))
        UniformRows()(model)
        after = constant_array(model.graph.initializers.get(TABLE))
        if before is None or after is None:
            continue  # no table, or every column of it became a number
        shrunk += after.shape[1] < before.shape[1]
        gather = next(use.node for use in model.graph.initializers[TABLE].uses())
        nodes = [use.node for use in gather.outputs[0].uses()]
        nodes += [u.node for node in nodes if node.op_type == "Split" for value in node.outputs for u in value.uses()]
        assert all(value.uses() for node in nodes for value in node.outputs)
    assert shrunk


@pytest.mark.parametrize("make", [draw, draw_remainders])
@pytest.mark.parametrize("seed", [1, 2, 3, 6])
def test_samples_of_a_mixed_batch_get_what_they_get_alone(
    deep: Exported, tmp_path: Path, seed: int, make: Callable[..., QuantPlan]
) -> None:
    plan = make(deep, tmp_path, seed)
    model = lowered(deep, plan, tmp_path / "codes")
    assert GroupByRow()(model).modified
    assert not GroupByRow()(model).modified
    feeds = arrays(6, 7)
    last = len(plan.row_map) - 1
    feeds["timestep"] = np.array([last, 0, last // 2, 0, last, 1], dtype=feeds["timestep"].dtype)
    (together,) = run(model, feeds)
    for index in range(6):
        (alone,) = run(model, {name: value[index : index + 1] for name, value in feeds.items()})
        np.testing.assert_array_equal(together[index : index + 1], alone)


def test_the_loop_runs_what_was_wrapped(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 2)
    flat, model = (lowered(deep, plan, tmp_path / "codes") for _ in range(2))
    UniformRows()(flat)
    GroupByRow()(model)
    feeds = arrays(3, 7)
    feeds["timestep"][:] = 5
    np.testing.assert_array_equal(run(flat, feeds)[0], run(model, feeds)[0])
    assert set(graph_layers(layer_graph(model))) == set(graph_layers(flat.graph))
    assert [value.name for value in model.graph.outputs] == [value.name for value in flat.graph.outputs]
    assert [value.shape for value in model.graph.outputs] == [value.shape for value in flat.graph.outputs]
    loop = looping(model)
    assert loop is not None
    # With a sequence among them ONNX Runtime plans no memory for the body.
    carried = [*loop.inputs[2:], *loop.outputs]
    assert all(value is not None and isinstance(value.type, ir.TensorType) for value in carried)
    assert all(value.uses() for graph in model.graphs() for value in graph.initializers.values())
    assert {value.name for node in layer_graph(model) for value in node.inputs if value is not None
            and value.is_initializer() and value.graph is model.graph} == set()  # fmt: skip


def test_layers_inside_can_be_read_in_the_order_of_the_batch(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 2)
    flat, model = (lowered(deep, plan, tmp_path / "codes") for _ in range(2))
    UniformRows()(flat)
    GroupByRow()(model)
    layer = plan.layers[len(plan.layers) // 2].name
    (name,) = {str(graph_layers(flat.graph)[layer].compute[-1].outputs[0].name)}
    for graph in (flat, model):
        assert TapOutputs([name])(graph).modified
        assert not TapOutputs([name])(graph).modified
    feeds = arrays(4, 7)
    last = len(plan.row_map) - 1
    feeds["timestep"] = np.array([last, 0, last // 2, 0], dtype=feeds["timestep"].dtype)
    whole = run(model, feeds)[1]
    for index in range(4):
        expected = run(flat, {key: value[index : index + 1] for key, value in feeds.items()})[1]
        np.testing.assert_array_equal(whole[index : index + 1], expected)


def test_weights_inside_become_portable_too(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 2, bits=(8, 8))
    model = canonical_graph(deep, plan, tmp_path / "codes")
    lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=True)(model)
    GroupByRow()(model)
    assert MakePortable()(model).modified
    assert not MakePortable()(model).modified
    assert all(value.uses() for graph in model.graphs() for value in graph.initializers.values())
    constants = [constant_array(node.inputs[1]) for node in layer_graph(model) if node.op_type == FUSED_PRODUCT]
    assert any(weight is not None and weight.dtype == np.uint8 for weight in constants)
    assert run(model, arrays(2, 7))[0].shape[0] == 2


@pytest.mark.parametrize("seed", [1, 2], ids=["attention of 8 bits", "attention of 5 bits"])
def test_attention_multiplies_signed_codes_until_it_must_not(deep: Exported, tmp_path: Path, seed: int) -> None:
    plan = draw(deep, tmp_path, seed, bits=(4, 4))
    signed = canonical_graph(deep, plan, tmp_path / "codes")
    lower_ort_cpu(plan, QuantWeights(tmp_path / "codes"), vnni=True)(signed)
    GroupByRow()(signed)
    assert right_operands(signed) == [ir.DataType.INT8] * 2 * len(plan.attentions)
    MakePortable()(signed)
    unsigned = lowered(deep, plan, tmp_path / "codes")
    GroupByRow()(unsigned)
    assert right_operands(signed) == right_operands(unsigned) == [ir.DataType.UINT8] * 2 * len(plan.attentions)
    feeds = arrays(4, 7)
    feeds["timestep"] = np.array([0, len(plan.row_map) - 1, 0, 3], dtype=feeds["timestep"].dtype)
    np.testing.assert_array_equal(run(signed, feeds)[0], run(unsigned, feeds)[0])


def right_operands(model: ir.Model) -> list[ir.DataType | None]:
    """Types of the codes that attention products take second."""
    pairs = graph_attentions(layer_graph(model)).values()
    values = [node.inputs[1] for pair in pairs for node in (pair.query_key, pair.probability_value)]
    return [None if value is None else value.dtype for value in values]


def test_a_graph_without_a_table_has_no_loop(deep: Exported, tmp_path: Path) -> None:
    plan = draw(deep, tmp_path, 0, bits=(4, 4))
    assert plan.rows == 1
    flat, model = (lowered(deep, plan, tmp_path / "codes") for _ in range(2))
    GroupByRow()(model)
    assert GROUPS not in {node.name for node in model.graph}
    feeds = arrays(3, 7)
    left, right = run(flat, feeds, fast=False)[0], run(model, feeds, fast=False)[0]
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * float(np.abs(left).max()))
