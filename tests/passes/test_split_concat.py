"""A convolution over a concat, planned in segments, becomes one convolution a half."""

import onnx_ir as ir
import pytest
from graph_text import assert_golden, layer_quant, parse, plan_of, read, render

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerOp, QuantPlan
from passes.split_concat import SplitConcat


def plan(edges: list[int]) -> QuantPlan:
    none = [None] * (len(edges) - 1)
    return plan_of(
        layer_quant("joined", LayerOp.CONV, (2, 3, 1, 1), 4, none, edges),
        layer_quant("unbiased", LayerOp.CONV, (1, 3, 1, 1), 4, none, edges),
        layer_quant("whole", LayerOp.CONV, (1, 3, 1, 1), 4, [None]),
    )


def test_each_half_gets_its_convolution() -> None:
    """Attributes are kept, the bias is added once, one segment stays one convolution, output names stay."""
    model = read("concat.before")
    assert SplitConcat(plan([0, 1, 3]))(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert_golden(model, "concat.expected")


def test_a_second_run_changes_nothing() -> None:
    model = read("concat.before")
    SplitConcat(plan([0, 1, 3]))(model)
    once = render(model)
    assert not SplitConcat(plan([0, 1, 3]))(model).modified
    assert render(model) == once


def test_a_plan_without_segments_changes_nothing() -> None:
    model = read("concat.before")
    before = render(model)
    assert not SplitConcat(plan([0, 3]))(model).modified
    assert render(model) == before


def test_other_segments_than_the_graph_concatenates_are_refused() -> None:
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(SplitConcat(plan([0, 1, 2, 3])))(read("concat.before"))
    assert isinstance(caught.value.__cause__, LoweringError)
    assert "joined is planned in 3 segments" in str(caught.value.__cause__)


def test_segments_at_other_channels_than_the_graph_concatenates_are_refused() -> None:
    """As many segments as inputs, cut elsewhere: the weights would not fit the halves."""
    with pytest.raises(LoweringError, match="joined"):
        SplitConcat(plan([0, 2, 3]))(read("concat.before"))


def test_an_input_that_is_no_concat_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    # nothing to split
    g (float[batch,3,4,4] sample) => (float[batch,2,4,4] out)
    <float[2,3,1,1] w = {1, 2, 3, 4, 5, 6}>
    {
      ["joined/Conv"] out = Conv (sample, w)
    }
# tag: out joined compute
"""
    layer = layer_quant("joined", LayerOp.CONV, (2, 3, 1, 1), 4, [None, None], [0, 1, 3])
    with pytest.raises(LoweringError, match="its input is not a Concat of as many tensors in the graph"):
        SplitConcat(plan_of(layer))(parse(text))
