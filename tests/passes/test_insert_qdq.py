"""The canonical operator as the pass writes it, node by node."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import assert_golden, layer_quant, parse, plan_of, read, render, save_codes, with_remainders
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import AttentionQuant, LayerOp, LayerQuant, QuantPlan
from dmqexport.quant_types import ActivationQuant
from dmqexport.quant_weights import QuantWeights
from passes.gather_timestep_scale import TABLE, GatherTimestepScale
from passes.insert_qdq import InsertQDQ
from passes.split_remainder import SplitRemainder
from passes.verify_qdq import VerifyQDQ

ROWS_4 = ActivationQuant(4, [0.25, 1.0], [3, 8], 0.5)
CONSTANT_6 = ActivationQuant.from_rows(6, [0.5], [20])
SHIFTED = ActivationQuant(8, [0.25, 1.0], [100, 120], 0.5)
CENTERED = ActivationQuant.from_rows(8, [0.5], [128])
PROBABILITY = ActivationQuant.from_rows(8, [1 / 256], [0])


def convolutions(folder: Path) -> tuple[QuantPlan, QuantWeights]:
    """A 4-bit layer with rows, a padded one with shifted 8 bits, a weight-only one of 5 bits."""
    plan = plan_of(
        layer_quant("body", LayerOp.CONV, (2, 1, 1, 1), 4, [ROWS_4]),
        layer_quant("shifted", LayerOp.CONV, (2, 2, 1, 1), 8, [SHIFTED]),
        layer_quant("light", LayerOp.CONV, (1, 2, 1, 1), 5, [None]),
        rows=2,
    )
    weights = {
        "body": np.array([1, -1], dtype=np.float32).reshape(2, 1, 1, 1),
        "shifted": np.array([[1, 2], [3, 4]], dtype=np.float32).reshape(2, 2, 1, 1),
        "light": np.array([1, -1], dtype=np.float32).reshape(1, 2, 1, 1),
    }
    return plan, save_codes(folder / "codes", plan, weights)


def linear(folder: Path) -> tuple[QuantPlan, QuantWeights]:
    """Two readers of one tensor, an attention, and a layer that is left in float."""
    shared = ActivationQuant(4, [0.25, 1.0], [3, 8], 0.5)
    attention = AttentionQuant("attention", query=CONSTANT_6, key=CENTERED, probability=PROBABILITY, value=CENTERED)
    plan = plan_of(
        layer_quant("to_q", LayerOp.LINEAR, (2, 2), 4, [shared]),
        layer_quant("to_k", LayerOp.LINEAR, (2, 2), 8, [shared]),
        rows=2,
        float_layers={"to_out": "kept in float"},
    )
    plan = QuantPlan(
        plan.model_fingerprint, plan.bits, plan.row_map, plan.rows, plan.layers, (attention,), plan.float_layers
    )
    weight = np.array([[1, 3], [2, 4]], dtype=np.float32)
    return plan, save_codes(folder / "codes", plan, {"to_q": weight, "to_k": -weight})


def ranks(folder: Path) -> tuple[QuantPlan, QuantWeights]:
    """One table for an image and a text: columns of rank 4 and of rank 3."""
    plan = plan_of(
        layer_quant("image", LayerOp.CONV, (1, 1, 1, 1), 6, [ROWS_4]),
        layer_quant("text", LayerOp.LINEAR, (2, 2), 7, [ROWS_4]),
        rows=2,
    )
    weights = {
        "image": np.ones((1, 1, 1, 1), dtype=np.float32),
        "text": np.array([[1, 3], [2, 4]], dtype=np.float32),
    }
    return plan, save_codes(folder / "codes", plan, weights)


CASES = pytest.mark.parametrize(
    ("name", "build"), [("qdq_conv", convolutions), ("qdq_linear", linear), ("ranks", ranks)]
)


@CASES
def test_the_canonical_operator(name: str, build: object, tmp_path: Path) -> None:
    assert callable(build)
    plan, weights = build(tmp_path)
    model = read(f"{name}.before")
    assert InsertQDQ(plan, weights)(model).modified
    assert_golden(model, f"{name}.expected")
    VerifyQDQ(plan)(model)
    again = InsertQDQ(plan, weights)(model)
    assert not again.modified
    assert_golden(model, f"{name}.expected")


@CASES
def test_one_gather_for_all_tables(name: str, build: object, tmp_path: Path) -> None:
    """Splits by rank where ranks differ; a second run finds nothing left to pack."""
    assert callable(build)
    plan, weights = build(tmp_path)
    model = read(f"{name}.before")
    InsertQDQ(plan, weights)(model)
    assert GatherTimestepScale()(model).modified
    RemoveUnusedNodesPass()(model)
    assert_golden(model, f"{name}.packed")
    assert not GatherTimestepScale()(model).modified
    assert_golden(model, f"{name}.packed")
    assert sum(node.op_type == "Gather" for node in model.graph) == 2
    VerifyQDQ(plan)(model)


def factored(folder: Path) -> tuple[QuantPlan, QuantWeights]:
    """Channel factors that vary by row (an image), and by nothing but the channel (a text)."""
    plan = plan_of(
        layer_quant("image", LayerOp.CONV, (1, 1, 1, 1), 6, [replace(ROWS_4, channel_factor=np.array([4.0]))]),
        layer_quant("text", LayerOp.LINEAR, (2, 2), 7, [replace(CONSTANT_6, channel_factor=np.array([2.0, 0.5]))]),
        rows=2,
    )
    weights = {"image": np.ones((1, 1, 1, 1), dtype=np.float32), "text": np.eye(2, dtype=np.float32)}
    return plan, save_codes(folder / "codes", plan, weights)


def test_channel_factors_are_one_product_with_the_rows(tmp_path: Path) -> None:
    plan, weights = factored(tmp_path)
    model = read("ranks.before")
    assert InsertQDQ(plan, weights)(model).modified
    VerifyQDQ(plan)(model)
    names = [str(node.name) for node in model.graph]
    assert names.count("image#0/scaled") == names.count("text#0/scaled") == 1
    text = next(node for node in model.graph if node.name == "text#0/scaled")
    np.testing.assert_array_equal(text.inputs[1].const_value.numpy(), [[0.5, 2.0]])
    assert not any("rescaled" in name and name.startswith("text") for name in names), "the weight undoes the factor"
    assert any("rescaled" in name and name.startswith("image") for name in names), "and nothing else undoes the row"


def test_wide_tables_are_gathered_with_the_narrow_ones(tmp_path: Path) -> None:
    plan, weights = factored(tmp_path)
    model = read("ranks.before")
    InsertQDQ(plan, weights)(model)
    assert GatherTimestepScale()(model).modified
    RemoveUnusedNodesPass()(model)
    assert sum(node.op_type == "Gather" for node in model.graph) == 2
    rho, narrow = np.array([0.5 / 0.25, 0.5 / 1.0]) / 4.0, 3
    packed = model.graph.initializers[TABLE].const_value.numpy()
    assert packed.shape == (2, narrow + 1)
    np.testing.assert_array_equal(packed[:, narrow], rho)
    before = render(model)
    assert not GatherTimestepScale()(model).modified
    assert render(model) == before
    VerifyQDQ(plan)(model)


@pytest.mark.parametrize("layer", ["image", "text"])
def test_factors_that_the_plan_has_and_the_graph_lacks_are_refused(layer: str, tmp_path: Path) -> None:
    plan, weights = factored(tmp_path)
    wide = {"image": np.array([1.0, 2.0]), "text": np.array([3.0])}[layer]

    def other(name: str) -> LayerQuant:
        found = plan.layer(name)
        activation = found.segments[0].activation
        assert activation is not None
        segment = replace(found.segments[0], activation=replace(activation, channel_factor=wide), stop=len(wide))
        return replace(found, segments=(segment,))

    model = read("ranks.before")
    InsertQDQ(plan, weights)(model)
    GatherTimestepScale()(model)
    changed = replace(plan, layers=tuple(other(item.name) if item.name == layer else item for item in plan.layers))
    with pytest.raises(LoweringError, match=f"{layer}: channel factors differ from the plan's"):
        VerifyQDQ(changed)(model)


def test_a_remainder_is_what_the_codes_leave_of_the_product_with_rho(tmp_path: Path) -> None:
    """Rows and channel factors are multiplied once, before both quantizers; both products are rescaled by the row."""
    activation = ActivationQuant(8, [0.25, 1.0], [128, 128], 0.5, [2.0, 4.0])
    plan = plan_of(with_remainders(layer_quant("twice", LayerOp.CONV, (2, 2, 1, 1), 8, [activation])), rows=2)
    weight = np.array([[1, 2], [3, 4]], dtype=np.float32).reshape(2, 2, 1, 1)
    weights = save_codes(tmp_path / "codes", plan, {"twice": weight})
    model = read("qdq_remainder.before")
    SplitRemainder(plan)(model)
    assert InsertQDQ(plan, weights)(model).modified
    RemoveUnusedNodesPass()(model)
    assert_golden(model, "qdq_remainder.expected")
    VerifyQDQ(plan)(model)
    assert not InsertQDQ(plan, weights)(model).modified
    assert_golden(model, "qdq_remainder.expected")
    GatherTimestepScale()(model)
    VerifyQDQ(plan)(model)


def test_readers_of_one_tensor_share_its_codes_and_those_of_its_remainder(tmp_path: Path) -> None:
    """A third reader, without a remainder, takes the first codes alone."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2] sample) => (float[batch,2] a, float[batch,2] b, float[batch,2] c)
    <float[2,2] w = {1, 0, 0, 1}>
    {
      ["a/MatMul"] a = MatMul (sample, w)
      ["b/MatMul"] b = MatMul (sample, w)
      ["c/MatMul"] c = MatMul (sample, w)
    }
# tag: a a compute
# tag: b b compute
# tag: c c compute
"""
    layers = [layer_quant(name, LayerOp.LINEAR, (2, 2), 8, [CENTERED]) for name in "abc"]
    plan = plan_of(with_remainders(layers[0]), with_remainders(layers[1]), layers[2])
    weights = save_codes(tmp_path / "codes", plan, {name: np.eye(2, dtype=np.float32) for name in "abc"})
    model = parse(text)
    SplitRemainder(plan)(model)
    InsertQDQ(plan, weights)(model)
    VerifyQDQ(plan)(model)
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("QuantizeLinear"), kinds.count("Sub"), kinds.count("MatMul")) == (2, 1, 5)
    readers = {str(node.name): node.inputs[0] for node in model.graph if node.op_type == "MatMul"}
    assert readers["a/MatMul"] is readers["b/MatMul"] is readers["c/MatMul"]
    assert readers["a/MatMul/remainder"] is readers["b/MatMul/remainder"]


def test_a_trained_bias_takes_the_place_of_one_that_moved(tmp_path: Path) -> None:
    layer = with_remainders(layer_quant("twice", LayerOp.CONV, (2, 2, 1, 1), 8, [CENTERED]))
    plan = plan_of(replace(layer, bias=np.array([3.0, 4.0])))
    weights = save_codes(tmp_path / "codes", plan, {"twice": np.ones((2, 2, 1, 1), dtype=np.float32)})
    model = read("qdq_remainder.before")
    SplitRemainder(plan)(model)
    InsertQDQ(plan, weights)(model)
    add = next(node for node in model.graph if node.name == "twice/Conv/biased")
    np.testing.assert_array_equal(add.inputs[1].const_value.numpy().reshape(-1), [3.0, 4.0])


def test_nothing_is_gathered_from_a_graph_without_tables(tmp_path: Path) -> None:
    model = read("qdq_conv.before")
    assert not GatherTimestepScale()(model).modified
    plan = plan_of(
        layer_quant("body", LayerOp.CONV, (2, 1, 1, 1), 4, [CONSTANT_6]),
        float_layers={"shifted": "float", "light": "float"},
    )
    weights = save_codes(tmp_path / "codes", plan, {"body": np.ones((2, 1, 1, 1), dtype=np.float32)})
    assert InsertQDQ(plan, weights)(model).modified
    assert not GatherTimestepScale()(model).modified


def test_an_empty_plan_changes_nothing(tmp_path: Path) -> None:
    plan = plan_of(float_layers={"body": "float", "shifted": "float", "light": "float"})
    model = read("qdq_conv.before")
    before = render(model)
    assert not InsertQDQ(plan, save_codes(tmp_path / "codes", plan, {}))(model).modified
    assert render(model) == before


def test_codes_of_another_shape_are_refused(tmp_path: Path) -> None:
    plan, _ = convolutions(tmp_path)
    wrong = {
        "body": np.ones((2, 1, 3, 3), dtype=np.float32),
        "shifted": np.ones((2, 2, 1, 1), dtype=np.float32),
        "light": np.ones((1, 2, 1, 1), dtype=np.float32),
    }
    weights = save_codes(tmp_path / "wrong", plan, wrong)
    with pytest.raises(LoweringError, match=r"body#0 has codes \(2, 1, 3, 3\), the graph's weight is"):
        InsertQDQ(plan, weights)(read("qdq_conv.before"))


def test_a_table_without_a_timestep_input_is_refused(tmp_path: Path) -> None:
    plan, weights = convolutions(tmp_path)
    model = read("qdq_conv.before")
    model.graph.inputs[1].name = "time"
    with pytest.raises(LoweringError, match="no input 'timestep' to index the table with"):
        InsertQDQ(plan, weights)(model)


@pytest.mark.parametrize("operand", ["key", "value"])
def test_a_shifted_second_operand_is_refused(operand: str, tmp_path: Path) -> None:
    plan, weights = linear(tmp_path)
    (attention,) = plan.attentions
    shifted = AttentionQuant(
        "attention", **{name: getattr(attention, name) for name in ("query", "key", "probability", "value")}
        | {operand: SHIFTED}
    )  # fmt: skip
    plan = QuantPlan("", "", plan.row_map, plan.rows, plan.layers, (shifted,), plan.float_layers)
    with pytest.raises(LoweringError, match=f"attention#{operand} is shifted; only the first operand may be"):
        InsertQDQ(plan, weights)(read("qdq_linear.before"))


def test_an_unknown_rank_is_refused(tmp_path: Path) -> None:
    plan, weights = linear(tmp_path)
    model = read("qdq_linear.before")
    model.graph.inputs[0].shape = None
    with pytest.raises(LoweringError, match="rank of 'sample', read by to_q#0, is unknown"):
        InsertQDQ(plan, weights)(model)


def test_automatic_padding_cannot_follow_a_shift(tmp_path: Path) -> None:
    plan, weights = convolutions(tmp_path)
    model = read("qdq_conv.before")
    node = next(node for node in model.graph if node.name == "shifted/Conv")
    node.attributes["auto_pad"] = ir.AttrString("auto_pad", "SAME_UPPER")
    with pytest.raises(LoweringError, match="shifted#0 uses auto_pad"):
        InsertQDQ(plan, weights)(model)


def test_pads_left_to_their_default_are_none(tmp_path: Path) -> None:
    plan, weights = convolutions(tmp_path)
    model = read("qdq_conv.before")
    node = next(node for node in model.graph if node.name == "shifted/Conv")
    del node.attributes["pads"]
    InsertQDQ(plan, weights)(model)
    assert not any(node.op_type == "Pad" for node in model.graph)


def test_readers_with_other_pads_pad_apart(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,1,4,4] sample) => (float[batch,1,6,6] a, float[batch,1,6,6] b, float[batch,1,4,4] c)
    <float[1,1,1,1] w = {1}>
    {
      ["a/Conv"] a = Conv <pads: ints = [1, 1, 1, 1]> (sample, w)
      ["b/Conv"] b = Conv <pads: ints = [1, 1, 1, 1]> (sample, w)
      ["c/Conv"] c = Conv (sample, w)
    }
# tag: a a compute
# tag: b b compute
# tag: c c compute
"""
    shifted = ActivationQuant.from_rows(8, [0.5], [100])
    layers = [layer_quant(name, LayerOp.CONV, (1, 1, 1, 1), 8, [shifted]) for name in "abc"]
    plan = plan_of(*layers)
    weights = save_codes(tmp_path / "codes", plan, {name: np.ones((1, 1, 1, 1), dtype=np.float32) for name in "abc"})
    model = parse(text)
    InsertQDQ(plan, weights)(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Pad") == 1
    assert kinds.count("QuantizeLinear") == 2
