"""Builds that never run their model: the same layers, codes and graphs, and nobody can miss what they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from calib.probe import ProbeResult
from dmqexport.bundle import open_bundle
from dmqexport.cli_console import print_bundle
from dmqexport.errors import RecipeError
from dmqexport.models.family import family_of
from dmqexport.models.random_weights import CONFIG, absent_denoiser, drawn_weight, random_denoiser
from dmqexport.onnx_export import export_float_graph
from dmqexport.pipeline import Build
from dmqexport.pipeline_bundle import run_build
from dmqexport.quant_weights import WEIGHT_CODES, QuantWeights
from dmqexport.recipe import Recipe, load_recipe
from dmqexport.runtime import load_denoiser
from dmqexport.workspace import SilentReporter, Workspace
from engines.ort import OrtRunner
from engines.trt import TrtFlavor, flavor_version
from tests.command_line import dmqexport, refused
from tests.models.tiny_families import TINY_FAMILIES, TinyFamily, save

pytestmark = pytest.mark.usefixtures("one_torch_thread")

#: Small, with weights above and below the size that may be absent.
SMALL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [32, 256],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}


def folder_of(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(SMALL), encoding="utf-8")
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}
    (path / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    return path


def drawn(model: Path, **options: Any) -> Recipe:
    given = {"model": str(model), "weights": "random", "bits": "w4a4", "calibration.statistics": "drawn", **options}
    return load_recipe(None, {"target": "onnx", **given}, [])


def build_of(recipe: Recipe, folder: Path) -> Build:
    return Build(recipe, folder / "bundle", Workspace(folder / "work", SilentReporter()))


@pytest.mark.parametrize("family", TINY_FAMILIES, ids=lambda family: family.name)
def test_shapes_say_what_running_the_model_says(family: TinyFamily, tmp_path: Path) -> None:
    save(family, tmp_path / "model")
    options = ["sampling.steps=3", "calibration.size=1", *family.options]

    def found(**given: str) -> ProbeResult:
        recipe = load_recipe(None, {"model": str(tmp_path / "model"), **given}, options)
        build = build_of(recipe, tmp_path)
        build.model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args))
        return build.probe_result

    seen: list[Any] = []
    ran = found()
    assert seen
    shapes = found(**{"calibration.statistics": "drawn"})
    assert shapes == ran


def test_absent_weights_are_those_of_a_model_in_memory() -> None:
    whole, absent = random_denoiser(SMALL, 3), absent_denoiser(SMALL, 3)
    missing = {name for name, parameter in absent.named_parameters() if parameter.is_meta}
    assert missing
    assert all(name.endswith(".weight") and whole.get_parameter(name).numel() >= 2**18 for name in missing)
    for name, parameter in whole.named_parameters():
        there = drawn_weight(absent, name, 3) if name in missing else absent.get_parameter(name)
        assert torch.equal(there, parameter), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(absent.get_buffer(name), buffer)


def test_a_graph_without_its_weights_in_memory_is_the_same_graph(tmp_path: Path) -> None:
    family = family_of(str(SMALL["_class_name"]), SMALL)
    for name, denoiser in (("whole", random_denoiser(SMALL)), ("absent", absent_denoiser(SMALL))):
        export_float_graph(
            family.wrap(denoiser),
            family.example_inputs(2),
            tmp_path / f"{name}.onnx",
            weight_of=lambda weight, module=denoiser: drawn_weight(module, weight),
        )
        parameters = dict(denoiser.named_parameters())
        assert any(parameter.is_meta for parameter in parameters.values()) == (name == "absent")
    whole, absent = (ir.load(tmp_path / f"{name}.onnx") for name in ("whole", "absent"))
    assert [node.op_type for node in whole.graph] == [node.op_type for node in absent.graph]
    assert list(whole.graph.initializers) == list(absent.graph.initializers)
    for name, value in whole.graph.initializers.items():
        other = absent.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        assert np.array_equal(value.const_value.numpy(), other.numpy()), name


def test_a_drawn_build_never_runs_the_model_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    build = build_of(drawn(folder_of(tmp_path / "model"), **{"quantization.attention_bits": 8}), tmp_path)
    result = run_build(build)
    assert build.workspace.forwards == 0
    assert not {record.name for record in build.workspace.records} & {
        "trajectories",
        "scaling",
        "reference",
        "validate",
    }
    assert result.failed_gates == ()
    assert result.document["gates"] == []
    assert result.document["statistics"] == "drawn"
    assert "DRAWN AT RANDOM" in result.document["warnings"][0]
    assert result.document["metrics"]["eps_sqnr_db"] is None
    assert {layer.weight_bits for layer in build.plan.layers} == {4, 8}
    assert len(build.plan.attentions) > 0
    # Real weights, quantized as they would be: codes and scales give them back to half a step.
    codes = QuantWeights(build.planned.path / WEIGHT_CODES)
    for layer in build.plan.layers:
        for index, segment in enumerate(layer.segments):
            weight = build.model.weight(f"{layer.name}.weight")[:, segment.start : segment.stop].numpy()
            scale = segment.weight.scale.reshape(-1, *[1] * (weight.ndim - 1))
            error = np.abs(codes.codes(layer.name, index) * scale - weight)
            assert (error <= 0.5001 * scale * (1 + 2 * (layer.weight_bits < 8))).all(), layer.name
    # It is a graph that runs.
    inputs = {name: value.numpy() for name, value in build.model.example_inputs(1).items()}
    assert np.isfinite(OrtRunner(build.deployed_graph).run(inputs)["out_sample"]).all()

    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest["statistics"] == "drawn"
    print_bundle(bundle, layers=False)
    assert "must not be deployed" in capsys.readouterr().out
    assert "DRAWN AT RANDOM" in (tmp_path / "bundle/dmqexport/report.html").read_text(encoding="utf-8")
    load_denoiser(tmp_path / "bundle")
    assert "--random-statistics" in caplog.text


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "model")
    first, again, other = (
        build_of(drawn(model, seed=seed), tmp_path / str(number)).plan for number, seed in enumerate((0, 0, 1))
    )
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert first.rows == 10


def test_stored_weights_are_quantized_too(tmp_path: Path) -> None:
    family = next(family for family in TINY_FAMILIES if family.name == "dit")
    save(family, tmp_path / "model")
    recipe = drawn(tmp_path / "model", weights="stored", **{"calibration.row_assignment": "per-step"})
    build = build_of(recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 5})}), tmp_path)
    run_build(build)
    assert build.workspace.forwards == 0
    assert build.plan.rows == 5
    assert not any(parameter.is_meta for parameter in build.model.denoiser.parameters())


@pytest.mark.slow
@pytest.mark.skipif(flavor_version(TrtFlavor.RTX) is None, reason="TensorRT-RTX is not installed")
def test_engines_are_built_and_proven(tmp_path: Path) -> None:
    build = build_of(drawn(folder_of(tmp_path / "model"), target="trt-rtx"), tmp_path)
    run_build(build)
    document = build.compiled.document
    assert document["layers_proven"] == document["layers_planned"] == len(build.plan.layers)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"training.network.iterations": 10}, "training"),
        ({"allocation.mixed": True}, "allocation"),
        ({"calibration.row_assignment": "cluster"}, "cluster"),
        ({"validation.gates.image_psnr_db": 20.0}, "gates"),
        ({"validation.gates.eps_sqnr_db": 20.0}, "gates"),
    ],
    ids=["training", "allocation", "cluster", "pictures", "noise"],
)
def test_what_has_to_be_measured_is_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{named}.*--random-statistics never runs it"):
        drawn(tmp_path, **options)


def test_a_recipe_says_what_was_left_out(tmp_path: Path) -> None:
    recipe = drawn(tmp_path)
    quantization = recipe.quantization
    assert (recipe.scaling.method, quantization.rounding, quantization.range) == ("none", "nearest", "minmax")
    asked = drawn(tmp_path, **{"bits": "w8a8", "quantization.remainder_share": 0.1})
    assert quantization.remainder_share == asked.quantization.remainder_share == 0, "no activation's error is measured"
    assert recipe.validation.gates.eps_sqnr_db is None
    assert load_recipe(None, {"model": "emoji"}, []).calibration.statistics == "measured"


def test_the_option_is_on_the_command_line(tmp_path: Path) -> None:
    output = str(tmp_path / "o")
    said = dmqexport("build", "-m", "sd14", "--weights", "random", "--random-statistics", "-o", output, "--dry-run")
    assert said.code == 0, said.err
    assert "statistics: drawn" in said.out
    assert "trajectories" not in said.out.partition("# what")[2]
    said = dmqexport("validate", "-m", "emoji", "--random-statistics", "-o", output)
    refused(said, 2, ["nothing to validate"])
