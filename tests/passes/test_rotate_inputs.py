"""A layer whose weight was rotated reads rotated inputs, before anything is quantized."""

from dataclasses import replace

import pytest
from graph_text import assert_golden, layer_quant, plan_of, read

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerOp
from dmqexport.quant_types import ActivationQuant
from passes.rotate_inputs import RotateInputs
from passes.tap import layer_outputs

CENTERED = ActivationQuant.from_rows(8, [0.5], [128])
#: Of four layers, two of them readers of one tensor, one that is left in float, and blocks of two sizes.
PLAN = plan_of(
    replace(layer_quant("linear", LayerOp.LINEAR, (2, 4), 4, [CENTERED]), rotation=2),
    layer_quant("other", LayerOp.LINEAR, (2, 4), 4, [CENTERED]),
    replace(layer_quant("flat", LayerOp.LINEAR, (2, 4), 4, [CENTERED]), rotation=4),
    float_layers={"kept": "asked for"},
)


def test_only_rotated_layers_get_the_product() -> None:
    model = read("rotation.before")
    names = layer_outputs(model)
    assert RotateInputs(PLAN)(model).modified
    assert layer_outputs(model) == names
    assert_golden(model, "rotation.expected")


def test_a_plan_without_rotations_changes_nothing() -> None:
    model = read("rotation.before")
    plain = replace(PLAN, layers=tuple(replace(layer, rotation=None) for layer in PLAN.layers))
    assert not RotateInputs(plain)(model).modified


def test_a_tensor_of_unknown_rank_is_refused() -> None:
    model = read("rotation.before")
    next(value for value in model.graph.inputs if value.name == "row").shape = None
    with pytest.raises(LoweringError, match="flat/MatMul reads a tensor of unknown rank"):
        RotateInputs(PLAN)(model)
