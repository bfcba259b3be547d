"""Convolutions that pad by themselves: the same outputs to the last bit of float rounding, borders included."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_text import layer_quant, plan_of, read, render, save_codes

from dmqexport.quant_plan import LayerOp, QuantPlan
from dmqexport.quant_types import ActivationQuant
from dmqexport.quant_weights import QuantWeights
from passes.insert_qdq import InsertQDQ
from passes.unpad_shifted import UnpadShifted

SHIFTED = ActivationQuant(8, [0.02, 0.05], [100, 140], 0.03)
CENTERED = ActivationQuant.from_rows(8, [0.05], [128])
KERNELS = {"wide": (2, 2, 3, 3), "strided": (1, 2, 3, 3), "other": (1, 2, 3, 3)}


def canonical(
    folder: Path, activation: ActivationQuant = SHIFTED, **attributes: list[int]
) -> tuple[ir.Model, QuantPlan, QuantWeights]:
    """Two convolutions of one tensor and one of a tensor with a dynamic height, quantized."""
    random = np.random.default_rng(0)
    plan = plan_of(*(layer_quant(name, LayerOp.CONV, KERNELS[name], 8, [activation]) for name in KERNELS), rows=2)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in KERNELS.items()}
    model = read("unpad.before")
    for node, array in zip(model.graph, weights.values(), strict=True):
        assert node.inputs[1] is not None
        node.inputs[1].const_value = ir.tensor(array, name=node.inputs[1].name)
        model.graph.register_initializer(node.inputs[1])
        for name, values in attributes.items():
            node.attributes[name] = ir.AttrInt64s(name, values)
        for output in node.outputs:
            if attributes:
                output.shape = ir.Shape([None] * 4)
    saved = save_codes(folder / "codes", plan, weights)
    InsertQDQ(plan, saved)(model)
    return model, plan, saved


def outputs(model: ir.Model) -> list[np.ndarray]:
    """What ONNX Runtime computes, nothing optimized, for a batch that mixes rows."""
    random = np.random.default_rng(1)
    feeds = {
        "sample": random.normal(size=(3, 2, 5, 4)).astype(np.float32),
        "tall": random.normal(size=(3, 2, 7, 4)).astype(np.float32),
        "timestep": np.array([0, 5, 2]),
    }
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.serde.serialize_model(model).SerializeToString()
    found: list[np.ndarray] = ort.InferenceSession(content, options).run(None, feeds)
    return found


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [0, 1, 2, 0]},
        {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
        {"strides": [3, 2], "pads": [1, 2, 1, 2]},
    ],
    ids=["as is", "uneven", "dilated", "strided"],
)
def test_outputs_are_the_same(tmp_path: Path, attributes: dict[str, list[int]]) -> None:
    model, plan, weights = canonical(tmp_path, **attributes)
    expected = outputs(model)
    assert UnpadShifted(plan, weights)(model).modified
    pads = [node for node in model.graph if node.op_type == "Pad"]
    assert [node.inputs[0].name for node in pads] == ["tall"], "one Pad less; what has no known height keeps its own"
    for left, right in zip(outputs(model), expected, strict=True):
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=0, atol=3e-6)
    once = render(model)
    assert not UnpadShifted(plan, weights)(model).modified
    assert render(model) == once


def test_borders_matter(tmp_path: Path) -> None:
    """The test above can fail: with the sum of all weights everywhere, borders are off by a multiple of the shift."""
    model, plan, weights = canonical(tmp_path)
    expected = outputs(model)[0]
    UnpadShifted(plan, weights)(model)
    for node in model.graph:
        if str(node.name).endswith("border_1"):
            border = node.inputs[1].const_value.numpy()
            whole = np.full_like(border, border.max())  # the set of all taps sorts last
            node.inputs[1].const_value = ir.tensor(whole, name=node.inputs[1].name)
    error = np.abs(outputs(model)[0] - expected).max(axis=(0, 1))
    assert (error[[0, -1]] > 0.01).all()
    assert (error[1:-1] < 1e-5).all()


def test_unshifted_layers_are_left_alone(tmp_path: Path) -> None:
    model, plan, weights = canonical(tmp_path, CENTERED)
    before = render(model)
    assert not UnpadShifted(plan, weights)(model).modified
    assert render(model) == before
