"""What ONNX Runtime executed, from its own profile: every layer that a report calls int8 multiplies bytes."""

import numpy as np
import pytest

from dmqexport.bundle import open_bundle
from engines.ort_profile import NodeTime, multiplied_types, profile_nodes
from tests.conftest import Built
from tests.models.tiny_pipelines import TOKENS, WIDTH

BYTES = {"uint8", "int8"}
INPUTS = {
    "text_bundle": {
        "sample": np.ones((2, 4, 8, 8), dtype=np.float32),
        "encoder_hidden_states": np.ones((2, TOKENS, WIDTH), dtype=np.float32),
    },
    "plain_bundle": {"sample": np.ones((2, 3, 8, 8), dtype=np.float32)},
}


@pytest.mark.parametrize("name", INPUTS)
def test_layers_that_a_report_calls_int8_multiply_bytes(name: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(name)
    bundle = open_bundle(built.path)
    inputs = {**INPUTS[name], "timestep": np.array([1, 2])}
    nodes = profile_nodes(bundle.graph, inputs, runs=1, threads=1, config=bundle.session_config)
    planned = {layer.name for layer in bundle.plan.layers}
    reported = {layer["name"]: layer["compute"] for layer in bundle.report["layers"] if layer["name"] in planned}
    executed = multiplied_types(nodes, list(reported))
    assert len(reported) > 20
    for layer, compute in reported.items():
        if compute == "int8":
            assert executed[layer], f"{layer} is executed by no product that carries its name"
            assert executed[layer] <= BYTES, f"{layer} is reported as int8 and runs on {executed[layer]}"
        else:
            assert executed[layer] <= {"float"}, f"{layer} is reported as {compute} and runs on {executed[layer]}"
    assert sum(compute == "int8" for compute in reported.values()) > len(reported) / 2


def test_a_float_product_is_no_proof() -> None:
    named = [("a/MatMul", "MatMulIntegerToFloat", "uint8"), ("a/second", "MatMul", "float"), ("b/Mul", "Mul", "uint8")]
    nodes = [NodeTime(name, op, (), 1.0, 0, 0, operand) for name, op, operand in named]
    assert multiplied_types(nodes, ["a", "b"]) == {"a": {"uint8", "float"}, "b": set()}


def test_a_rotation_is_no_product_of_its_layer() -> None:
    named = [
        *(("a/rotation/product", "MatMul", "float"), ("a/rotation1/product", "MatMul", "float")),
        *(("a/MatMul", "MatMulInteger", "uint8"), ("b/rotations/product", "MatMul", "float")),
        ("rotation/product", "MatMul", "float"),
    ]
    nodes = [NodeTime(name, op, (), 1.0, 0, 0, operand) for name, op, operand in named]
    assert multiplied_types(nodes, ["a", "b", "rotation"]) == {"a": {"uint8"}, "b": {"float"}, "rotation": {"float"}}
