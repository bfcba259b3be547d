"""Builds from end to end, through the command line: every target, every stage reused, nothing lost, nothing broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmqexport.bundle import ANSWERS, open_bundle
from dmqexport.models.loading import load_model
from dmqexport.pipeline import Build, Stage
from dmqexport.recipe import load_recipe
from dmqexport.runtime import load_denoiser
from dmqexport.workspace import SilentReporter, Workspace
from engines.trt import TrtFlavor, flavor_version
from tests.command_line import SMALL, Answer, build, refused
from tests.conftest import Built
from tests.models.tiny_pipelines import copy, unconditional_unet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

PRETENDED_GPU = Path(__file__).parent / "engines" / "pretend_gpu"
STAGES = ("trajectories", "statistics", "plan", "export", "passes", "reference", "validate")


def report(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / "dmqexport" / "report.json").read_text())
    return document


def session(path: Path) -> onnxruntime.InferenceSession:
    """Plain ONNX Runtime: no option, no custom operator."""
    return onnxruntime.InferenceSession(str(path / "unet" / "model.onnx"), providers=["CPUExecutionProvider"])


def random_inputs(batch: int, conditional: bool) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(batch)
    channels = 4 if conditional else 3
    inputs = {
        "sample": generator.normal(size=(batch, channels, 8, 8)).astype(np.float32),
        "timestep": generator.integers(0, 20, size=batch),
    }
    if conditional:
        inputs["encoder_hidden_states"] = generator.normal(size=(batch, 16, 16)).astype(np.float32)
    return inputs


# What a bundle holds


def test_the_bundle_is_a_diffusers_folder_for_everybody(text_bundle: Built) -> None:
    path = text_bundle.path
    for name in ("model_index.json", "scheduler", "tokenizer", "text_encoder", "vae", "unet/config.json"):
        assert (path / name).exists(), name
    own = {file.name for file in (path / "dmqexport").iterdir()}
    assert own >= {"manifest.json", "quant_plan.json", "quant_plan.safetensors", "recipe.yaml", "report.json"}
    assert own >= {"report.html", "grid.png"}
    for file in path.rglob("*"):
        assert file.stat().st_mode & 0o044 == 0o044, f"{file} is private"
    open_bundle(path, verify=True)
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


def test_report_has_the_keys_that_scripts_read(text_bundle: Built) -> None:
    document = report(text_bundle.path)
    metrics = document["metrics"]
    assert metrics["eps_sqnr_db"] > 1
    assert metrics["image_psnr_db"] > 0
    assert len(metrics["by_timestep"]) == 4
    assert document["size_bytes"].keys() >= {"float", "nominal", "storage"}
    assert document["latency"].keys() >= {"fp32_ms", "quantized_ms", "ratio"}
    for layer in document["layers"]:
        assert layer.keys() >= {"name", "nominal_bits", "storage_bits", "compute", "sqnr_db"}
    planned = [layer for layer in document["layers"] if layer["sqnr_db"] is not None]
    assert {layer["compute"] for layer in planned} == {"int8"}
    assert {layer["nominal_bits"]["weight"] for layer in planned} == {4, 8}


def test_graph_loads_in_plain_onnx_runtime_with_any_batch(text_bundle: Built) -> None:
    plain = session(text_bundle.path)
    assert [item.name for item in plain.get_inputs()] == ["sample", "timestep", "encoder_hidden_states"]
    assert [item.name for item in plain.get_outputs()] == ["out_sample"]
    for batch in (1, 3):
        assert plain.run(None, random_inputs(batch, True))[0].shape == (batch, 4, 8, 8)
    names = Counter(node.name for node in onnx.load(text_bundle.path / "unet" / "model.onnx").graph.node)
    assert [name for name, count in names.items() if count > 1] == []


def test_a_batch_of_mixed_timesteps_is_the_samples_one_by_one(text_bundle: Built) -> None:
    plain, inputs = session(text_bundle.path), random_inputs(6, True)
    inputs["timestep"] = np.array([1, 251, 501, 751, 1, 999])
    together = plain.run(None, inputs)[0]
    for index in range(6):
        alone = plain.run(None, {name: value[index : index + 1] for name, value in inputs.items()})[0]
        np.testing.assert_allclose(together[index : index + 1], alone, rtol=0, atol=1e-5)


# Targets


def test_canonical_graph_computes_what_the_fast_one_does(text_bundle: Built, tmp_path: Path) -> None:
    answer = build(
        text_bundle.model, tmp_path / "onnx", text_bundle.work, "--bits", "w4a4", "--target", "onnx", "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.err == ""
    assert answer.json["target"] == "onnx"
    assert answer.json["latency"] is None
    inputs = random_inputs(2, True)
    # The canonical graph is the reference with ONNX Runtime's rewrites off: its fusions of Q/DQ add in another order,
    # and at 4 bits this random network answers one rounding tie that tips with noise as large as its own.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = str(tmp_path / "onnx" / "unet" / "model.onnx")
    canonical = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    left, right = (one.run(None, inputs)[0] for one in (session(text_bundle.path), canonical))
    signal_power, noise = (right**2).sum(), ((left - right) ** 2).sum()
    assert 10 * np.log10(signal_power / max(noise, 1e-30)) > 60


def test_rtx_engine_is_built_and_proven(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model, tmp_path / "rtx", plain_bundle.work, "--bits", "w8a8", "--target", "trt-rtx")
    assert answer.code == 0, answer.err
    (engine,) = (tmp_path / "rtx").glob("unet/engines/*/engine.plan")
    assert engine.stat().st_size > 10_000
    proof = report(tmp_path / "rtx")["engine"]
    assert proof["layers_proven"] == proof["layers_planned"] > 10
    assert "layers proven int8" in answer.out
    assert (tmp_path / "rtx" / "finish_on_gpu.py").is_file(), "runs, judges and times the engine where a GPU is"
    with np.load(tmp_path / "rtx" / ANSWERS, allow_pickle=False) as kept:
        inputs = {name.removeprefix("input:"): kept[name] for name in kept.files if name.startswith("input:")}
        (given,) = session(tmp_path / "rtx").run(None, inputs)
        exact, target = (kept[f"{kind}:out_sample"] for kind in ("exact", "float"))
    assert len(given) == 8, "all that such a short validation has"
    assert ((given - exact) ** 2).sum() < 0.1 * ((exact - target) ** 2).sum()


@pytest.mark.skipif(flavor_version(TrtFlavor.TRT) is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_bundle_finishes_on_another_host(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model, tmp_path / "trt", plain_bundle.work, "--bits", "w8a8", "--target", "trt")
    assert answer.code == 7
    assert "tensorrt" in answer.err
    assert "python finish_on_gpu.py" in answer.err
    assert "Traceback" not in answer.err
    opened = open_bundle(tmp_path / "trt", verify=True)
    assert opened.manifest["finish_command"] == "python finish_on_gpu.py"
    helped = subprocess.run(
        [sys.executable, tmp_path / "trt" / "finish_on_gpu.py", "--help"], capture_output=True, text=True, check=False
    )
    assert helped.returncode == 0, helped.stderr
    _finish_on_pretended_gpu(tmp_path / "trt")
    compiled = build(
        plain_bundle.model, tmp_path / "x", plain_bundle.work, "--bits", "w8a8", "--target", "trt", verb="compile"
    )
    assert compiled.code == 7
    assert not (tmp_path / "x").exists()


def _finish_on_pretended_gpu(bundle: Path) -> None:
    """The script judges the graph, as an engine, by the answers in the bundle; diffusers then draws with it."""
    engine = bundle / "unet" / "engines" / "trt-sm89-10.99.1" / "engine.plan"
    engine.parent.mkdir(parents=True)
    profiles = {"sample": [(1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8)], "timestep": [(1,), (2,), (8,)]}
    ranges = {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in profiles.items()}
    engine.write_text(json.dumps({"onnx": str(bundle / "unet" / "model.onnx"), "profiles": ranges}))
    pretended = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PRETENDED_GPU), os.environ.get("PYTHONPATH", "")])}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=pretended)

    done = run(str(bundle / "finish_on_gpu.py"), "--runs", "2")
    assert done.returncode == 0, done.stderr
    assert "(8 samples)" in done.stdout, "all that such a short validation has"
    code = (
        "import sys, torch\n"
        "from dmqexport.runtime import load_denoiser\n"
        "denoiser = load_denoiser(sys.argv[1])\n"
        "answer = denoiser(torch.zeros(2, 3, 8, 8), 5).sample\n"
        "print(type(denoiser.runner).__name__, tuple(answer.shape))"
    )
    drawn = run("-c", code, str(bundle))
    assert drawn.stdout.splitlines()[-1:] == ["TrtRunner (2, 3, 8, 8)"], drawn.stderr
    engine.unlink()
    without = run("-c", code, str(bundle))
    assert "no tensorrt engine for this machine" in without.stderr


# Variants


def test_weight_only_leaves_activations_in_float(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w4a16")
    assert answer.code == 0, answer.err
    layers = [layer for layer in report(tmp_path / "out")["layers"] if layer["sqnr_db"] is not None]
    assert {layer["nominal_bits"]["activation"] for layer in layers} == {None}
    assert {layer["compute"] for layer in layers} == {"float32"}
    assert session(tmp_path / "out").run(None, random_inputs(2, False))[0].shape == (2, 3, 8, 8)


def test_attention_bits_quantize_the_matmuls(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w8a8", "--attention-bits", "8")
    assert answer.code == 0, answer.err
    assert answer.stages["trajectories"]
    plan = open_bundle(tmp_path / "out").plan
    assert len(plan.attentions) > 0
    assert not any("attention" in reason for reason in plan.float_layers.values())


@pytest.mark.parametrize(
    ("arguments", "rows"), [(("--rows", "1"), 1), (("--set", "calibration.row_assignment=per-step"), 4)]
)
def test_rows_of_the_table(plain_bundle: Built, tmp_path: Path, arguments: tuple[str, ...], rows: int) -> None:
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w4a4", *arguments)
    assert answer.code == 0, answer.err
    opened = open_bundle(tmp_path / "out")
    assert opened.plan.rows == opened.manifest["rows"] == rows
    assert session(tmp_path / "out").run(None, random_inputs(3, False))[0].shape == (3, 3, 8, 8)


def test_a_bare_unet_becomes_a_pipeline(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model / "unet", tmp_path / "out", plain_bundle.work, "--bits", "w8a8")
    assert answer.code == 0, answer.err
    assert load_denoiser(tmp_path / "out").num_timesteps == 20
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"


# Resuming


class Times(SilentReporter):
    """Remembers what stages took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Remember."""
        self.seconds[stage] = seconds


def test_every_stage_runs_and_loading_is_timed(plain_bundle: Built, tmp_path: Path) -> None:
    assert not any(plain_bundle.answer.stages[stage] for stage in STAGES)
    times = Times()
    recipe = load_recipe(None, {"model": str(plain_bundle.model)}, [])
    Build(recipe, tmp_path / "out", Workspace(tmp_path / "work", times)).run(Stage.LOAD)
    assert times.seconds.keys() == {"load"}
    assert times.seconds["load"] > 0


def test_second_build_reuses_everything_and_replaces_the_bundle(plain_bundle: Built, tmp_path: Path) -> None:
    output = copy(plain_bundle.path, tmp_path / "out")
    before = (output / "dmqexport" / "manifest.json").read_bytes()
    answer = build(plain_bundle.model, output, plain_bundle.work, "--bits", "w8a8")
    assert answer.code == 0, answer.err
    assert all(answer.stages[stage] for stage in STAGES), answer.err
    assert (output / "dmqexport" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("metric", ["ssim+mse", "picture"])
def test_remainders_are_chosen_once_within_their_share(metric: str, tiny_plain: Path, tmp_path: Path) -> None:
    """The layer that reads the sample has one anyway; the others take no more of the work than the recipe grants."""
    arguments = ("--bits", "w8a8", "--set", "quantization.remainder_share=0.1", "--set", "allocation.entries=8")
    arguments = (*arguments, "--set", f"allocation.metric={metric}")
    answer = build(tiny_plain, tmp_path / "out", tmp_path / "work", *arguments)
    assert answer.code == 0, answer.err
    assert not answer.stages["remainders"]
    plan = open_bundle(tmp_path / "out").plan
    twice = {layer.name for layer in plan.layers if layer.has_remainder}
    (found,) = (tmp_path / "work").rglob("remainders.json")
    chosen = json.loads(found.read_text())
    assert twice == {"conv_in", *chosen["chosen"]} > {"conv_in"}
    assert 0 < chosen["share"] <= 0.1
    assert sum(gain["error"] for gain in chosen["gains"].values()) < 1, "conv_in's rounding is done with"
    layers = {layer["name"]: layer["nominal_bits"]["activation"] for layer in report(tmp_path / "out")["layers"]}
    assert {name for name, bits in layers.items() if bits == 16} == twice
    again = build(tiny_plain, tmp_path / "out", tmp_path / "work", *arguments)
    assert again.stages["remainders"]
    assert again.stages["plan"]
    assert (plan.allocation.average_activation_bits or 0) > 8


def test_other_bits_reuse_the_trajectories(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w6a8", verb="export")
    assert answer.code == 0, answer.err
    # Channel factors are chosen at the bits that are asked for, and everything behind them sees them.
    expected = {"trajectories": True, "scaling": False, "statistics": False, "plan": False, "export": False}
    assert {stage: answer.stages[stage] for stage in expected} == expected


_STUCK = """
import signal, sys, time
from dmqexport.workspace import Workspace
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
original = Workspace.stage
def stage(self, name, key, build, **options):
    def stuck(folder):
        (folder / "half").write_bytes(b"x")
        print("stuck", flush=True)
        time.sleep(600)
    return original(self, name, key, stuck if name == "export" else build, **options)
Workspace.stage = stage
from dmqexport.cli import main
main()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_stopped_build_loses_only_its_stage(tiny_plain: Path, tmp_path: Path, how: signal.Signals) -> None:
    output, work = tmp_path / "out", tmp_path / "work"
    arguments = ["build", "-m", tiny_plain, "-o", output, "--work", work, *SMALL, "--bits", "w8a8"]
    process = subprocess.Popen(
        [sys.executable, "-c", _STUCK, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "stuck\n", process.stderr.read()
    process.send_signal(how)
    _, err = process.communicate(timeout=300)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted; finished stages are kept, the same command resumes"
        assert list(work.glob(".*")) == []
    assert not output.exists()
    assert list(work.glob("export*")) == []
    answer = build(tiny_plain, output, work, "--bits", "w8a8", verb="plan")
    assert answer.code == 0, answer.err
    assert all(answer.stages[stage] for stage in ("trajectories", "statistics", "plan"))
    assert list(work.glob(".*")) == [], "what was half done is swept away"


def test_a_truncated_stage_is_built_again(plain_bundle: Built, tmp_path: Path) -> None:
    work = copy(plain_bundle.work, tmp_path / "work")
    for statistics in work.glob("statistics-*/statistics.safetensors"):
        statistics.write_bytes(statistics.read_bytes()[:-100])
    answer = build(plain_bundle.model, tmp_path / "out", work, "--bits", "w8a8", verb="plan")
    assert answer.code == 0, answer.err
    assert (answer.stages["trajectories"], answer.stages["statistics"]) == (True, False)
    assert "is damaged" in answer.err


# Gates


def test_failed_gates_exit_3_and_the_bundle_is_there(plain_bundle: Built, tmp_path: Path) -> None:
    gates = ("--bits", "w8a8", "--set", "validation.gates.eps_sqnr_db=99", "--set", "validation.gates.image_ssim=2")
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, *gates)
    assert answer.code == 3
    assert "below the recipe's thresholds: eps_sqnr_db, image_ssim" in answer.err
    assert "FAILED" in answer.out
    opened = open_bundle(tmp_path / "out", verify=True)
    assert opened.manifest["gates_passed"] is False
    only = build(plain_bundle.model, tmp_path / "other", plain_bundle.work, *gates, "--json", verb="validate")
    assert only.code == 3
    assert {gate["name"]: gate["passed"] for gate in only.json["gates"]} == {"eps_sqnr_db": False, "image_ssim": False}
    assert not (tmp_path / "other").exists()


def test_too_slow_exits_4(plain_bundle: Built, tmp_path: Path) -> None:
    gate = ("--bits", "w8a8", "--set", "validation.gates.latency_ratio=0.001")
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, *gate)
    assert answer.code == 4
    assert "slower than the recipe requires" in answer.err
    assert (tmp_path / "out" / "dmqexport" / "report.html").is_file()


# Refusals: nothing is calibrated, nothing is left behind


def refused_build(model: Path, tmp_path: Path, code: int, words: tuple[str, ...], *arguments: object) -> Answer:
    output, work = tmp_path / "refused", tmp_path / "refused.work"
    answer = build(model, output, work, *arguments)
    refused(answer, code, words)
    assert not output.exists()
    assert not work.exists(), "nothing was finished, so that nothing is left"
    return answer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rows", "21"), ("--rows", "21", "1 to 20")),
        (("--steps", "21"), ("--steps", "21", "1 to 20")),
        (("--set", "quantization.overrides={nothing*: w8a8}"), ("quantization.overrides", "'nothing*'", "conv_in")),
        (("--set", "quantization.boundary=[nothing]"), ("quantization.boundary", "'nothing'", "conv_in")),
        (("--set", "quantization.remainder=[nothing]"), ("quantization.remainder", "'nothing'", "conv_in")),
        (("--set", "quantization.keep_float=[nothing]"), ("quantization.keep_float", "'nothing'", "conv_in")),
        (("--scheduler", "euler"), ("EulerDiscreteScheduler", "ddim, ddpm, dpm-solver")),
        (("--scheduler", "dim"), ("unknown scheduler 'dim'", "did you mean 'ddim'")),
        (("--calib-prompts", __file__), ("--calib-prompts", "no text encoder")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else str(value),
)
def test_choices_that_the_model_has_not(
    tiny_plain: Path, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused_build(tiny_plain, tmp_path, 2, words, *arguments)


def test_prompt_files(tiny_text: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.txt"
    refused_build(tiny_text, tmp_path, 2, ("nowhere.txt", "cannot be read"), "--calib-prompts", nowhere)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    refused_build(tiny_text, tmp_path, 2, ("empty.txt", "no line with text"), "--calib-prompts", empty)


def test_damaged_models(tiny_plain: Path, tmp_path: Path) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    model = copy(tiny_plain, tmp_path / "model")
    content = (model / weights).read_bytes()
    (model / weights).write_bytes(content[:-1000])
    refused_build(model, tmp_path, 2, (weights, "truncated"))
    tensors = load_file(tiny_plain / weights)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, model / weights)
    refused_build(model, tmp_path, 2, ("conv_in.weight", "NaN"))
    (model / weights).unlink()
    refused_build(model, tmp_path, 2, ("unet", "no weights"))


def test_output_of_somebody_else(plain_bundle: Built, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    refused(build(plain_bundle.model, mine, tmp_path / "work"), 2, ("mine", "not a dmqexport bundle", "nothing was"))
    bundle = copy(plain_bundle.path, tmp_path / "bundle")
    (bundle / "unet" / "notes.txt").write_text("mine")
    refused(
        build(plain_bundle.model, bundle, tmp_path / "work"), 2, ("unet/notes.txt", "did not write", "move them away")
    )
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert (bundle / "unet" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "work").exists()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that even root cannot write to; needs the right to mount."""
    folder = tmp_path / "ro"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]).returncode
    ):
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_read_only_places_are_told_before_anything_is_computed(
    tiny_plain: Path, tmp_path: Path, read_only: Path
) -> None:
    words = ("ro: cannot be written, the file system is read-only", "choose another")
    refused(build(tiny_plain, read_only / "out", tmp_path / "work"), 5, words)
    assert not (tmp_path / "work").exists()
    refused(build(tiny_plain, tmp_path / "out", read_only / "work"), 5, ("ro/work: cannot be written",))


def test_a_kept_bundle_survives_a_failing_build(plain_bundle: Built, tmp_path: Path, monkeypatch: Any) -> None:
    """The disk fills up while the new bundle is written: the old one is still whole."""
    output = copy(plain_bundle.path, tmp_path / "out")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dmqexport.pipeline_bundle.write_manifest", full)
    refused_answer = build(plain_bundle.model, output, plain_bundle.work, "--bits", "w8a8")
    assert refused_answer.code == 5
    assert "the disk is full" in refused_answer.err
    open_bundle(output, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_float_model_is_untouched_by_a_build(plain_bundle: Built) -> None:
    """The folder that was read holds what it held, and loads."""
    torch.manual_seed(0)
    expected = unconditional_unet().state_dict()
    state = load_model(str(plain_bundle.model)).denoiser.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in expected.items())
    assert time.time() > plain_bundle.model.stat().st_mtime
