"""A layer whose activation leaves a remainder becomes two products that are added, before anything is quantized."""

from dataclasses import replace

import pytest
from graph_text import assert_golden, layer_quant, parse, plan_of, read, render, with_remainders
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerOp, QuantPlan
from dmqexport.quant_types import ActivationQuant
from passes.bind import bind
from passes.split_concat import SplitConcat
from passes.split_remainder import SplitRemainder
from passes.tap import layer_outputs

CENTERED = ActivationQuant.from_rows(8, [0.5], [128])
SHIFTED = ActivationQuant.from_rows(8, [0.5], [100])
#: Segments 0 and 1 of a concat, of which only the second has a remainder.
PLAN = plan_of(
    with_remainders(layer_quant("biased", LayerOp.CONV, (2, 1, 1, 1), 4, [CENTERED])),
    with_remainders(layer_quant("unbiased", LayerOp.CONV, (2, 1, 1, 1), 8, [CENTERED])),
    with_remainders(layer_quant("linear", LayerOp.LINEAR, (2, 2), 8, [CENTERED])),
    with_remainders(layer_quant("joined", LayerOp.CONV, (2, 3, 1, 1), 8, [SHIFTED, CENTERED], [0, 1, 3]), 1),
    layer_quant("whole", LayerOp.CONV, (1, 1, 1, 1), 8, [CENTERED]),
)


def without_remainders(plan: QuantPlan) -> QuantPlan:
    layers = (
        replace(layer, segments=tuple(replace(segment, remainder=False) for segment in layer.segments))
        for layer in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def test_each_remainder_gets_its_product() -> None:
    """Attributes and output names are kept, a bias is added once and last, whatever node it was in."""
    model = read("remainder.before")
    names = layer_outputs(model)
    assert SplitConcat(PLAN)(model).modified
    assert layer_outputs(model) == names
    assert SplitRemainder(PLAN)(model).modified
    assert layer_outputs(model) == names
    RemoveUnusedNodesPass()(model)
    assert_golden(model, "remainder.expected")


def test_the_second_product_follows_its_own_segment() -> None:
    model = read("remainder.before")
    SplitConcat(PLAN)(model)
    SplitRemainder(PLAN)(model)
    pairs = bind(model, PLAN).layers["joined"].pairs(PLAN.layer("joined"))
    assert [str(node.name) for node, _ in pairs] == ["joined/Conv0", "joined/Conv1", "joined/Conv1/remainder"]
    scales = [segment.activation.scale_ref for _, segment in pairs if segment.activation is not None]
    assert scales == [0.5, 0.5, pytest.approx(0.5 / 254)]
    assert [segment.remainder for _, segment in pairs] == [False, True, False]


def test_a_second_run_changes_nothing() -> None:
    model = read("remainder.before")
    SplitConcat(PLAN)(model)
    SplitRemainder(PLAN)(model)
    once = render(model)
    assert not SplitConcat(PLAN)(model).modified
    assert not SplitRemainder(PLAN)(model).modified
    assert render(model) == once


def test_a_plan_without_remainders_changes_nothing() -> None:
    model, plan = read("remainder.before"), without_remainders(PLAN)
    SplitConcat(plan)(model)
    before = render(model)
    assert not SplitRemainder(plan)(model).modified
    assert render(model) == before


def test_an_operator_whose_products_cannot_be_added_is_refused() -> None:
    """A Gemm adds its bias in each of them; `GemmToMatMul` comes first."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2] sample) => (float[batch,2] out)
    <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
    {
      ["linear/Gemm"] out = Gemm (sample, w, b)
    }
# tag: out linear compute
"""
    plan = plan_of(with_remainders(layer_quant("linear", LayerOp.LINEAR, (2, 2), 8, [CENTERED])))
    with pytest.raises(LoweringError, match="linear/Gemm is a Gemm; only products of Conv and MatMul are added"):
        SplitRemainder(plan)(parse(text))
