"""The bundled model as real TensorRT-RTX engines, built without a GPU: every planned layer proven int8."""

from pathlib import Path

import pytest

from dmqexport.pipeline import Build, Stage
from dmqexport.recipe import load_recipe
from dmqexport.workspace import SilentReporter, Workspace

# What the engine computes with does not depend on how well the ranges were measured.
QUICK = ["calibration.size=2", "calibration.rows=3", "sampling.steps=4", "quantization.rounding=nearest"]


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
