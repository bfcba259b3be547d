"""What every family must go through: a tiny random instance of each, from a folder to an engine.

A new family is one file, one line in the registry, and one line in `tiny_families`.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from dmqexport.models.family import family_names
from dmqexport.pipeline import Build
from dmqexport.pipeline_bundle import run_build
from dmqexport.quant_weights import WEIGHT_CODES
from dmqexport.recipe import load_recipe
from dmqexport.runtime import load_denoiser
from dmqexport.workspace import SilentReporter, Workspace
from engines.ort import Optimization, OrtRunner
from engines.trt import TrtFlavor, flavor_version
from tests.models.tiny_families import TINY_FAMILIES, TinyFamily, save
from tests.simulation_fixture import Exported, teacher_forced

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

_TINY = (
    "sampling.steps=3", "calibration.size=3", "calibration.rows=2", "calibration.batch_size=4",
    "scaling.method=dilation", "training.trajectories=2", "training.blocks.iterations=2",
    "training.blocks.batch_size=2", "training.blocks.entries=6", "training.blocks.held_out=2",
    "validation.images=1", "validation.entries=4", "validation.layer_entries=2", "validation.latency_runs=3",
)  # fmt: skip
_FLOAT_ROUNDING = 1e-4  # of the largest value, through a whole network
_OPERATOR_ROUNDING = 2e-5  # of the largest value, for one operator on the same codes
_TIES = 1e-4  # share of codes that another order of the float sums before them may tip


@pytest.fixture(params=TINY_FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    """Each family in turn."""
    tiny: TinyFamily = request.param
    return tiny


def _build(family: TinyFamily, folder: Path, target: str) -> Build:
    model = folder / "model"
    if not model.exists():
        save(family, model)
    recipe = load_recipe(None, {"model": str(model), "bits": "w4a4", "target": target}, [*_TINY, *family.options])
    return Build(recipe, folder / target, Workspace(folder / "work", SilentReporter()))


def test_family_from_folder_to_engine(family: TinyFamily, tmp_path: Path) -> None:
    engine = flavor_version(TrtFlavor.RTX) is not None
    build = _build(family, tmp_path, "trt-rtx" if engine else "onnx")
    result = run_build(build)
    plan = build.plan
    assert plan.rows == 2
    assert plan.layers
    assert {layer.weight_bits for layer in plan.layers} == {4, 8}
    _float_graph_is_the_model(build)
    _graph_is_the_simulation(build)
    if engine:
        document = build.compiled.document
        assert document["layers_proven"] == document["layers_planned"] == len(plan.layers)
    assert not result.failed_gates
    build.workspace.close()

    fast = _build(family, tmp_path, "ort-cpu")
    run_build(fast)
    fast.workspace.close()
    _bundle_denoises(fast, tmp_path / "ort-cpu")


def _float_graph_is_the_model(build: Build) -> None:
    """The exported graph computes what torch computes, for a batch size that it was not exported with."""
    inputs = build.calibration_set.select(torch.tensor([0, 1, 2]))
    expected = build._denoise(inputs).numpy()
    runner = OrtRunner(build.float_graph, optimization=Optimization.REFERENCE)
    actual = runner.run({name: value.numpy() for name, value in inputs.items()})["out_sample"]
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= _FLOAT_ROUNDING * np.abs(expected).max()


def _graph_is_the_simulation(build: Build) -> None:
    """Every quantizer and every layer of the canonical graph, given what the graph gives it: the simulated codes."""
    inputs = build.calibration_set.select(torch.tensor([0, 1, len(build.calibration_set) - 1]))
    assert len({int(build.plan.row_map[key]) for key in build.calibration_set.timesteps}) == 2
    exported = Exported(build.model.denoiser, build.probe_result, build.float_graph)
    agreement, _ = teacher_forced(exported, build.plan, build.trained_plan.path / WEIGHT_CODES, inputs)
    twice = sum(segment.remainder for layer in build.plan.layers for segment in layer.segments)
    assert twice > 0, "the layer that reads the sample"
    assert agreement.quantizers == len(build.plan.activations()) + twice
    assert agreement.flips <= _TIES * agreement.codes
    assert agreement.worst_flip <= 1
    assert max(agreement.outputs.values()) <= _OPERATOR_ROUNDING


def _bundle_denoises(build: Build, bundle: Path) -> None:
    """The bundle stands in for the denoiser in the loop that calibrated it, and draws nearly the same."""
    denoiser = load_denoiser(bundle)
    entries = build.calibration_set
    inputs = entries.select(torch.tensor([0, len(entries) - 1]))
    family, expected = build.model.family, build._denoise(inputs)
    actual = family.call(denoiser, inputs)
    assert actual.shape == expected.shape
    error = float((actual - expected).square().sum() / expected.square().sum())
    assert 0 < error < 0.25  # 6 dB: what the validation gate asks for


def test_every_class_of_the_registry_has_a_tiny_instance() -> None:
    made = {type(family.make()).__name__ for family in TINY_FAMILIES}
    assert made | {"Transformer2DModel"} == set(family_names())


def test_float_timesteps_reach_the_table_rounded(tmp_path: Path) -> None:
    """A graph of a flow model reads its row at round(timestep * scale), the end point of time included."""
    flux = next(family for family in TINY_FAMILIES if family.name == "flux-schnell")
    build = _build(flux, tmp_path, "onnx")
    model = ir.load(build.canonical_graph)
    assert len(build.plan.row_map) == 1001
    assert build.plan.timestep_scale == 1000.0
    assert any(node.name == "dmqexport/timestep_key" and node.op_type == "Cast" for node in model.graph)
    inputs = {name: value.numpy() for name, value in build.model.example_inputs(2).items()}
    runner = OrtRunner(build.canonical_graph)
    results = []
    for timestep in (0.5, 0.50002, 1.0):
        inputs["timestep"] = np.full(2, timestep, dtype=np.float32)
        results.append(runner.run(inputs)["out_sample"])
    assert np.isfinite(results[2]).all()
    build.workspace.close()
