"""The bundled model as a TensorRT-RTX engine, built without a GPU, and in ONNX Runtime: every planned layer in int8."""

from pathlib import Path

import pytest

from dmqexport.pipeline import Build, Stage
from dmqexport.recipe import load_recipe
from dmqexport.workspace import SilentReporter, Workspace
from engines.ort_profile import multiplied_types, profile_nodes

# What the engine computes with does not depend on how well the ranges were measured.
QUICK = [
    *("calibration.size=2", "calibration.rows=3", "sampling.steps=4"),
    *("scaling.method=dilation", "quantization.rounding=nearest"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_every_planned_layer_of_the_bundled_model_is_int8(work: Path, tmp_path: Path, bits: str) -> None:
    recipe = load_recipe(None, {"model": "emoji", "bits": bits, "target": "trt-rtx"}, QUICK)
    build = Build(recipe, tmp_path / "bundle", Workspace(work, SilentReporter()))
    build.run(Stage.COMPILE)
    document = build.compiled.document
    assert build.compiled.engine is not None
    assert build.compiled.engine.stat().st_size > 1_000_000
    assert document["layers_proven"] == document["layers_planned"] == len(build.plan.layers) == 119
    assert {proof["activation"] for proof in document["proofs"]} == {"Int8"}
    assert {proof["weight"] for proof in document["proofs"]} == {"Int8"}


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_every_planned_layer_of_the_bundled_model_multiplies_bytes(work: Path, tmp_path: Path, bits: str) -> None:
    recipe = load_recipe(None, {"model": "emoji", "bits": bits, "target": "ort-cpu"}, QUICK)
    build = Build(recipe, tmp_path / "bundle", Workspace(work, SilentReporter()))
    inputs = {name: value.numpy() for name, value in build.model.example_inputs(batch=2).items()}
    nodes = profile_nodes(build.deployed_graph, inputs, runs=1, threads=1)
    executed = multiplied_types(nodes, [layer.name for layer in build.plan.layers])
    assert len(executed) == 119
    assert {layer: kinds for layer, kinds in executed.items() if not kinds or not kinds <= {"uint8", "int8"}} == {}
