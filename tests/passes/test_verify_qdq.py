"""The last look at the graph: what the plan quantizes is quantized there, and nothing else of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import layer_quant, plan_of, read, render, save_codes, with_remainders

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import AttentionQuant, LayerOp, QuantPlan
from dmqexport.quant_types import ActivationQuant
from passes.insert_qdq import InsertQDQ
from passes.split_remainder import SplitRemainder
from passes.verify_qdq import VerifyQDQ

CENTERED = ActivationQuant.from_rows(8, [0.5], [128])
PLAN = replace(
    plan_of(
        layer_quant("to_q", LayerOp.LINEAR, (2, 2), 4, [CENTERED]),
        layer_quant("to_k", LayerOp.LINEAR, (2, 2), 8, [None]),
        float_layers={"to_out": "float"},
    ),
    attentions=(AttentionQuant("attention", CENTERED, CENTERED, CENTERED, CENTERED),),
)


def quantized(folder: Path) -> ir.Model:
    model = read("qdq_linear.before")
    weight = np.ones((2, 2), dtype=np.float32)
    InsertQDQ(PLAN, save_codes(folder / "codes", PLAN, {"to_q": weight, "to_k": weight}))(model)
    return model


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_a_graph_that_fits_is_not_changed(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    before = render(model)
    assert not VerifyQDQ(PLAN)(model).modified
    assert render(model) == before


def float_weight(model: ir.Model) -> None:
    node(model, "to_q/MatMul").replace_input_with(1, model.graph.initializers["w"])


def float_activation(model: ir.Model) -> None:
    node(model, "to_q/MatMul").replace_input_with(0, model.graph.inputs[0])


def quantized_activation(model: ir.Model) -> None:
    node(model, "to_k/MatMul").replace_input_with(0, node(model, "to_q/MatMul").inputs[0])


def float_key(model: ir.Model) -> None:
    node(model, "attention/QueryKey").replace_input_with(1, node(model, "n0").outputs[0])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (float_weight, "to_q: weight in float"),
        (float_activation, "to_q: activation in float"),
        (quantized_activation, "to_k: activation quantized"),
        (float_key, "attention: attention operand in float"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_operand_that_differs_is_refused(damage: Callable[[ir.Model], None], reason: str, tmp_path: Path) -> None:
    model = quantized(tmp_path)
    damage(model)
    with pytest.raises(LoweringError) as caught:
        VerifyQDQ(PLAN)(model)
    assert caught.value.message == f"verify_qdq: {reason}"


def test_a_float_graph_is_refused_with_every_operand() -> None:
    with pytest.raises(LoweringError) as caught:
        VerifyQDQ(PLAN)(read("qdq_linear.before"))
    assert caught.value.message.count("in float") == 5


def test_a_layer_kept_in_float_that_reads_codes_is_refused(tmp_path: Path) -> None:
    """The plan says float: an operand that was quantized for another layer must not reach it."""
    model = quantized(tmp_path)
    node(model, "to_out/MatMul").replace_input_with(0, node(model, "to_q/MatMul").inputs[0])
    with pytest.raises(LoweringError, match="to_out"):
        VerifyQDQ(PLAN)(model)


def test_a_plan_that_quantizes_nothing_is_refused() -> None:
    plan = QuantPlan("", "", [0], 1, (), (), {"to_q": "", "to_k": "", "to_out": ""})
    with pytest.raises(LoweringError, match="the plan quantizes nothing"):
        VerifyQDQ(plan)(read("qdq_linear.before"))


def test_unsplit_segments_are_refused() -> None:
    layer = layer_quant("joined", LayerOp.CONV, (2, 3, 1, 1), 4, [None, None], [0, 1, 3])
    plan = plan_of(layer, float_layers={"unbiased": "", "whole": ""})
    with pytest.raises(LoweringError, match="joined: 1 operators for 2 segments"):
        VerifyQDQ(plan)(read("concat.before"))


REMAINING = plan_of(
    with_remainders(layer_quant("to_q", LayerOp.LINEAR, (2, 2), 8, [CENTERED])),
    layer_quant("to_k", LayerOp.LINEAR, (2, 2), 8, [None]),
    float_layers={"to_out": "float"},
)


def remaining(folder: Path) -> ir.Model:
    model = read("qdq_linear.before")
    weight = np.ones((2, 2), dtype=np.float32)
    SplitRemainder(REMAINING)(model)
    InsertQDQ(REMAINING, save_codes(folder / "codes", REMAINING, {"to_q": weight, "to_k": weight}))(model)
    return model


def first_codes(model: ir.Model) -> None:
    """The second product reads the codes of the first one."""
    node(model, "to_q/MatMul/remainder").replace_input_with(0, node(model, "to_q/MatMul").inputs[0])


def codes_of_nothing_left(model: ir.Model) -> None:
    """The second product reads the whole tensor, quantized with the remainder's scale."""
    node(model, "to_q#0/remainder/codes").replace_input_with(0, model.graph.inputs[0])


def left_over_by_another(model: ir.Model) -> None:
    """What is subtracted are not the first product's codes."""
    node(model, "to_q#0/remainder/left_over").replace_input_with(1, node(model, "to_k/MatMul").outputs[0])


@pytest.mark.parametrize("damage", [first_codes, codes_of_nothing_left, left_over_by_another], ids=lambda d: d.__name__)
def test_a_second_product_of_anything_but_the_remainder_is_refused(
    damage: Callable[[ir.Model], None], tmp_path: Path
) -> None:
    model = remaining(tmp_path)
    assert not VerifyQDQ(REMAINING)(model).modified
    damage(model)
    with pytest.raises(LoweringError) as caught:
        VerifyQDQ(REMAINING)(model)
    reason = "to_q: its second product does not read what the first one's codes leave"
    assert caught.value.message == f"verify_qdq: {reason}"


def test_a_planned_remainder_without_a_product_of_its_own_is_refused(tmp_path: Path) -> None:
    model = read("qdq_linear.before")
    weight = np.ones((2, 2), dtype=np.float32)
    InsertQDQ(REMAINING, save_codes(tmp_path / "codes", REMAINING, {"to_q": weight, "to_k": weight}))(model)
    with pytest.raises(LoweringError, match="to_q: 1 operators for 2 segments and remainders"):
        VerifyQDQ(REMAINING)(model)
