"""The first and last layers are found on the graph, whatever they are called."""

import pytest
from graph_text import layer_quant, parse, plan_of, render

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerOp, QuantPlan
from passes.keep_boundary_8bit import KeepBoundary8Bit

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,2,4,4] sample, int64[batch] timestep, float[batch,2,2,2] text) => (float[batch,2,4,4] out)
<float[2,2,1,1] w = {1, 2, 3, 4}, float[2,2] v = {1, 2, 3, 4}>
{
  [n0] scaled = Mul (sample, sample)
  ["entry/Conv"] entry = Conv (scaled, w)
  ["shortcut/Conv"] shortcut = Conv (sample, w)
  [n1] sigmoid = Sigmoid (entry)
  ["middle/Conv"] middle = Conv (sigmoid, w)
  ["text/MatMul"] context = MatMul (text, v)
  [n2] joined = Concat <axis: int = -1> (middle, shortcut)
  [n3] folded = ReduceSum (context)
  [n4] sum = Add (joined, folded)
  ["exit/MatMul"] product = MatMul (sum, v)
  ["exit/Add"] biased = Add (product, v)
  [n5] out = Relu (biased)
}
# tag: entry entry compute
# tag: shortcut shortcut compute
# tag: middle middle compute
# tag: context text compute
# tag: product exit compute
# tag: biased exit bias
"""


def plan(**bits: int) -> QuantPlan:
    """4 bits a layer unless told otherwise; 0 keeps it in float."""
    widths = {"entry": 8, "shortcut": 8, "middle": 4, "text": 4, "exit": 8} | bits
    ops = {name: LayerOp.LINEAR if name in ("text", "exit") else LayerOp.CONV for name in widths}
    layers = [layer_quant(name, ops[name], (2, 2), width, [None]) for name, width in widths.items() if width]
    return plan_of(*layers, float_layers={name: "float" for name, width in widths.items() if not width})


def test_first_and_last_are_found_by_walking() -> None:
    found = KeepBoundary8Bit.boundary(parse(TEXT).graph)
    assert sorted(found) == [("first", "entry"), ("first", "shortcut"), ("last", "exit")]


def test_a_boundary_of_8_bits_passes_and_changes_nothing() -> None:
    model = parse(TEXT)
    before = render(model)
    assert not KeepBoundary8Bit(plan())(model).modified
    assert render(model) == before


@pytest.mark.parametrize(
    ("name", "place", "bits"), [("entry", "first", 7), ("shortcut", "first", 4), ("exit", "last", 2)]
)
def test_a_narrow_boundary_is_refused_unless_insisted_on(name: str, place: str, bits: int) -> None:
    with pytest.raises(
        LoweringError, match=f"{name} is the {place} layer of the graph but has {bits} weight"
    ) as caught:
        KeepBoundary8Bit(plan(**{name: bits}))(parse(TEXT))
    assert "quantization.boundary" in str(caught.value.hint)
    assert not KeepBoundary8Bit(plan(**{name: bits}), frozenset({name}))(parse(TEXT)).modified


def test_a_float_boundary_passes() -> None:
    assert not KeepBoundary8Bit(plan(entry=0, exit=0))(parse(TEXT)).modified
