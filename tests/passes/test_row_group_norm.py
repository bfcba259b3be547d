"""Group normalization as rows: the same values from other operators, where the size of a group is known."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from graph_text import assert_golden, read, render

from passes.row_group_norm import RowGroupNorm


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes, nothing optimized."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.serde.serialize_model(model).SerializeToString()
    found: list[np.ndarray] = ort.InferenceSession(content, options).run(None, feeds)
    return found


def test_rows_of_known_size() -> None:
    """The one with a dynamic height stays; a graph output keeps its name; a second run changes nothing."""
    model = read("group_norm.before")
    assert RowGroupNorm()(model).modified
    assert_golden(model, "group_norm.expected")
    assert not RowGroupNorm()(model).modified
    assert_golden(model, "group_norm.expected")


def test_values_are_the_same() -> None:
    random = np.random.default_rng(0)
    feeds = {
        name: (3 + random.normal(size=shape)).astype(np.float32)
        for name, shape in (("sample", (5, 4, 2, 3)), ("tall", (5, 4, 7, 3)))
    }
    before, after = read("group_norm.before"), read("group_norm.before")
    RowGroupNorm()(after)
    for expected, actual in zip(outputs(before, feeds), outputs(after, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def test_computed_scales_stay() -> None:
    model = read("group_norm.before")
    for node in model.graph:
        node.replace_input_with(1, node.inputs[0])
    before = render(model)
    assert not RowGroupNorm()(model).modified
    assert render(model) == before
