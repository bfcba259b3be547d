"""The command line as a stranger meets it: help, results for people and for scripts, refusals, exit codes."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.models import CommandInfo

import dmqexport as package
from dmqexport import cli_console
from dmqexport.cli import app, main
from dmqexport.errors import DmqExportError
from tests.command_line import SMALL, build, dmqexport, refused
from tests.conftest import Built
from tests.models.tiny_pipelines import copy

STAGE_VERBS = ("build", "calibrate", "plan", "train", "export", "compile", "validate")
VERBS = (
    *STAGE_VERBS, "run", "inspect", "bench", "doctor", "models", "convert", "package", "ablate", "verify-reproducible",
)  # fmt: skip
HEAVY = {"torch", "numpy", "onnx", "onnx_ir", "onnxruntime", "diffusers", "transformers", "pydantic", "rich", "yaml"}


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str) -> None:
    answer = dmqexport(verb, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert f"dmqexport {verb}" in answer.out
    for noise in ("list[", "<path>]", "DMQEXPORT_", "\\b", "\b"):
        assert noise not in answer.out


def _verb(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__.replace("_", "-")


def test_help_lists_every_verb_and_exit_code() -> None:
    answer = dmqexport("--help")
    assert [_verb(command) for command in app.registered_commands] == list(VERBS)
    for verb in VERBS:
        assert f"\n  {verb} " in answer.out
    assert "..." not in answer.out.split("Commands:")[1], "summaries fit their lines"
    described = " ".join(answer.out.split())
    for error in DmqExportError.__subclasses__():
        assert f"{error.exit_code} " in described
    assert dmqexport("--version").out == f"dmqexport {package.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = "import sys; sys.argv = ['dmqexport', *sys.argv[1:]]\nfrom dmqexport.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    print('LOADED', *sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in answer.stdout.split("LOADED")[1].split()}
    # typer itself checks the options of a verb with pydantic.
    assert loaded & HEAVY <= ({"pydantic"} if "build" in arguments else set())


def test_nothing_asked_shows_the_help() -> None:
    answer = dmqexport()
    assert answer.code == 2
    assert answer.err.startswith("Usage: dmqexport")


# Refusals that need no model


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("build",), 2, ("Missing option '-o' / '--output'", "dmqexport build --help")),
        (("buidl",), 2, ("No such command 'buidl'", "build")),
        (("build", "--frobnicate"), 2, ("No such option: --frobnicate",)),
        (("build", "-o", "x"), 2, ("no model given", "-m emoji")),
        (("build", "-o", "x", "-m", "emojii"), 2, ("'emojii'", "did you mean 'emoji'")),
        (("build", "-o", "x", "-m", "./nowhere"), 2, ("./nowhere does not exist",)),
        (("build", "-o", "x", "-m", "emoji", "--rows", "two"), 2, ("--rows", "integer")),
        (("build", "-o", "x", "-m", "emoji", "--bits", "w9a4"), 2, ("w9a4", "2 to 8")),
        (("build", "-o", "x", "-m", "emoji", "--target", "tpu"), 2, ("--target", "'tpu'", "ort-cpu")),
        (("build", "-o", "x", "-m", "emoji", "--set", "calibration.row=3"), 2, ("did you mean 'calibration.rows'",)),
        (("build", "-o", "x", "--recipe", "nowhere.yaml"), 2, ("recipe nowhere.yaml cannot be read",)),
        (("build", "-o", ".", "-m", "emoji"), 2, ("--output '.' names no folder of its own",)),
        (("build", "-o", "", "-m", "emoji"), 2, ("names no folder of its own",)),
        (("build", "-o", "/", "-m", "emoji"), 2, ("--output '/' names no folder of its own",)),
        (("build", "-o", "..", "-m", "emoji"), 2, ("--output '..' names no folder of its own",)),
        (("build", "-o", "x", "--work", "x", "-m", "emoji"), 2, ("--work x lies in --output x",)),
        (("build", "-o", "x", "--work", "x/w", "-m", "emoji"), 2, ("--work x/w lies in --output x",)),
        (("build", "-o", "file/x", "-m", "emoji"), 5, ("file/x.work: cannot be written", "a part of the path is a")),
        (("build", "-o", "file", "-m", "emoji"), 2, ("file exists and is not a dmqexport bundle",)),
        (("build", "-o", "/proc/x", "-m", "emoji"), 5, ("/proc/x.work: cannot be written",)),
        (("inspect", "nowhere"), 6, ("nowhere does not exist", "pass the -o folder")),
        (("inspect", "."), 6, ("not a dmqexport bundle",)),
        (("run", "nowhere", "-o", "x.png"), 6, ("nowhere does not exist",)),
        (("bench", "nowhere"), 6, ("nowhere does not exist",)),
        (("bench", "nowhere", "--runs", "1"), 2, ("--runs", "3")),
        (("run", "nowhere", "-o", "x.png", "--seed", "-1"), 2, ("--seed", "0")),
        (("run", "nowhere", "-o", "x.png", "--steps", "0"), 2, ("--steps", "1")),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else str(value),
)
def test_refusals(
    arguments: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    refused(dmqexport(*arguments), code, words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"
    assert (tmp_path / "file").read_text() == "mine"


def test_dry_run_prints_a_recipe_that_can_be_read(tmp_path: Path) -> None:
    answer = dmqexport("build", "-m", "emoji", "-o", tmp_path / "x", *SMALL, "--bits", "w4a4", "--dry-run")
    assert (answer.code, answer.err) == (0, "")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(answer.out)
    assert yaml.safe_load(answer.out)["calibration"]["rows"] == 3
    again = dmqexport("build", "--recipe", recipe, "-o", tmp_path / "x", "--dry-run")
    # The estimate, in comments, scales with how fast the machine is at that moment.
    keys, keys_again = (
        [line for line in out.splitlines() if not line.startswith("#")] for out in (answer.out, again.out)
    )
    assert keys == keys_again
    assert list(tmp_path.iterdir()) == [recipe]


# Unexpected ends


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), 5, "batch_size"),
        (KeyError("x"), 1, "internal: KeyError: 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_unexpected_ends(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("dmqexport.doctor.examine", fail)
    answer = dmqexport("doctor")
    assert answer.code == code
    assert says in answer.err
    assert "Traceback" not in answer.err


def test_verbose_shows_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("dmqexport.recipe.load_recipe", fail)
    answer = dmqexport("build", "-m", "emoji", "-o", tmp_path / "x", "-v")
    assert answer.code == 1
    assert "Traceback" in answer.err
    assert "Traceback" not in dmqexport("build", "-m", "emoji", "-o", tmp_path / "x").err


# Verbs without a bundle


def test_doctor() -> None:
    answer = dmqexport("doctor", "--json")
    assert answer.code == 0
    assert answer.json["targets"].keys() == {"onnx", "ort-cpu", "openvino", "trt-rtx", "trt"}
    for entry in answer.json["targets"].values():
        assert entry.keys() >= {"build", "run", "notes"}
    assert "onnx " in dmqexport("doctor").out


def test_models() -> None:
    answer = dmqexport("models", "--json")
    assert answer.json[0]["name"] == "emoji"
    assert {row["name"]: row["gated"] for row in answer.json}["flux-dev"] is True
    lines = dmqexport("models").out.splitlines()
    assert lines[0].startswith("emoji ")
    assert len(lines) == len(answer.json)  # one line a model, whatever the width
    (dit,) = (line for line in lines if line.startswith("dit-xl-2-256 "))
    assert "CC-BY-NC-4.0" in dit
    assert "commercial use" in dit


def test_convert(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"no checkpoint")
    answer = dmqexport("convert", tmp_path / "model.ckpt", "-m", "ldm-bedroom", "-o", tmp_path / "out")
    assert answer.code == 2
    assert "hint:" in answer.err
    assert not (tmp_path / "out").exists()
    answer = dmqexport("convert", tmp_path / "model.ckpt", "-m", "sd14", "-o", tmp_path / "out")
    assert answer.code == 2
    assert "ldm-church" in answer.err


# Stages


@pytest.mark.slow
def test_stage_verbs_say_where_their_artifacts_are(plain_bundle: Built, tmp_path: Path) -> None:
    expected = {
        "calibrate": {"trajectories", "statistics"},
        "plan": {"quant_plan", "quant_plan_arrays", "weight_codes"},
        "export": {"float_graph", "canonical_graph", "deployed_graph"},
        "compile": {"deployed_graph"},
    }
    for verb, names in expected.items():
        arguments = (plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w8a8")
        answer = build(*arguments, "--json", verb=verb)
        assert (answer.code, answer.err) == (0, "")
        assert answer.json["artifacts"].keys() == names
        assert all(Path(path).is_file() for path in answer.json["artifacts"].values())
        assert all(stage["cached"] for stage in answer.json["stages"])
        text = build(*arguments, verb=verb)
        assert all(path in text.out for path in answer.json["artifacts"].values())
    assert "needs no engine" in text.out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_validate_prints_metrics_and_gates(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w8a8", verb="validate")
    assert answer.code == 0, answer.err
    labels = [line[:18].strip() for line in answer.out.splitlines()]
    assert labels == ["predicted noise", "pictures", "gate"]


@pytest.mark.slow
def test_summary_is_in_columns(text_bundle: Built) -> None:
    first, *rest = text_bundle.answer.out.splitlines()
    assert first == "tiny-text w4a4 for ort-cpu"
    assert {line[:2] for line in rest} == {"  "}
    assert {line[17:19].strip() == "" for line in rest} == {True}
    assert rest[-3].split() == ["bundle", str(text_bundle.path)]
    assert Path(rest[-2].split()[1]).is_file()


# Finished bundles


@pytest.mark.slow
def test_inspect(text_bundle: Built, tmp_path: Path) -> None:
    answer = dmqexport("inspect", text_bundle.path, "--layers", "--verify")
    assert (answer.code, answer.err) == (0, "")
    assert "in float" in answer.out
    header = next(line for line in answer.out.splitlines() if line.startswith("layer "))
    assert header.split() == ["layer", "weight", "activation", "storage", "compute", "SQNR"]
    assert "conv_in" in answer.out
    assert "files are as they were built" in answer.out
    document = dmqexport("inspect", text_bundle.path, "--layers", "--json").json
    assert document["manifest"]["bits"] == "w4a4"
    assert len(document["layers"]) > 50
    damaged = copy(text_bundle.path, tmp_path / "damaged")
    with (damaged / "unet" / "model.onnx").open("r+b") as handle:
        handle.seek(5000)
        handle.write(b"\xff\xff\xff")
    assert dmqexport("inspect", damaged).code == 0
    words = ("unet/model.onnx: content differs",)
    refused(dmqexport("inspect", damaged, "--verify"), 6, words)
    refused(dmqexport("run", damaged, "-o", tmp_path / "x.png", "-p", "a", "--verify"), 6, words)


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(text_bundle: Built) -> None:
    inspect = f"'{sys.executable}' -m dmqexport.cli inspect '{text_bundle.path}' --layers"
    command = f"{inspect} | head -1; echo ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert answer.stderr == ""
    assert answer.stdout.splitlines()[-1] in ("0", "141")
    # A reader that is gone before anything is written.
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        gone = subprocess.run(
            [sys.executable, "-m", "dmqexport.cli", "inspect", text_bundle.path, "--layers"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (gone.returncode, gone.stderr) == (141, "")


@pytest.mark.slow
def test_run_draws_a_grid(text_bundle: Built, tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "grid.png"
    prompts = ("-p", "a", "-p", "b", "--seed", "1", "--seed", "2", "--seed", "3")
    arguments = ("run", text_bundle.path, "-o", picture, *prompts, "--steps", "2", "--scale", "2")
    answer = dmqexport(*arguments, "--threads", "1")
    assert answer.code == 0, answer.err
    assert answer.out == f"{picture}: 6 pictures\n"
    with Image.open(picture) as image:
        assert image.size[0] * 2 == image.size[1] * 3
    before = picture.read_bytes()
    again = dmqexport(*arguments, "-q")
    assert (again.code, again.err) == (0, "")
    assert picture.read_bytes() == before
    assert list(picture.parent.iterdir()) == [picture]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-o", "a.jpg", "-p", "x"), 2, ("a.jpg", "PNG")),
        (("-o", "a.png"), 2, ("draws from text", "--prompt")),
        (("-o", "file/a.png", "-p", "x"), 5, ("file: cannot be written", "there is a file of that name")),
        (("-o", "folder.png", "-p", "x"), 2, ("folder.png is a folder",)),
        (("-o", "/proc/nowhere/a.png", "-p", "x"), 5, ("/proc/nowhere", "cannot be written")),
        (("-o", "a.png", "-p", "x", "--steps", "5000"), 2, ("5000", "1 to 1000")),
        (("-o", "a.png", "-p", "x", "--scheduler", "dim"), 2, ("unknown scheduler 'dim'", "did you mean 'ddim'")),
        (("-o", "a.png", "-p", "x", "--guidance", "nan"), 2, ("guidance", "finite")),
    ],
)
def test_run_refuses(
    text_bundle: Built,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    refused(dmqexport("run", text_bundle.path, "-q", *arguments), code, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.slow
def test_run_without_text(plain_bundle: Built, tmp_path: Path) -> None:
    arguments = ("run", plain_bundle.path, "-o", tmp_path / "a.png", "-q")
    assert dmqexport(*arguments, "--seed", "3").code == 0
    refused(dmqexport(*arguments, "-p", "a face"), 2, ("takes no prompts", "leave --prompt out"))


@pytest.mark.slow
def test_bench(plain_bundle: Built, tmp_path: Path) -> None:
    arguments = ("bench", plain_bundle.path, "--work", plain_bundle.work, "--batch", "2", "--runs", "3")
    answer = dmqexport(*arguments, "--json")
    assert (answer.code, answer.err) == (0, "")
    times = {"fp32_ms", "quantized_ms", "ratio", "minimum_ratio", "processor_ratio"}
    assert answer.json.keys() == {*times, "batch", "threads", "runs"}
    slow = dmqexport(*arguments, "--max-ratio", "0.0001")
    assert slow.code == 4
    assert "above --max-ratio 0.0001" in slow.err
    nowhere = dmqexport(*arguments, "--plot", tmp_path / "gone" / "a.svg")
    refused(nowhere, nowhere.code, ("a.svg cannot be written",))


@pytest.mark.slow
def test_bench_in_detail(plain_bundle: Built, tmp_path: Path) -> None:
    written, drawn = tmp_path / "bench.json", tmp_path / "bench.svg"
    options = ("--work", plain_bundle.work, "--batch", "2", "--runs", "3", "--threads", "1")
    answer = dmqexport("bench", plain_bundle.path, *options, "-o", written, "--plot", drawn)
    assert answer.code == 0, answer.err
    document = json.loads(written.read_text(encoding="utf-8"))
    names = [layer["layer"] for layer in document["layers"]]
    assert "conv_in" in names
    assert {layer["layer"] for layer in document["layers"] if layer["ratio"] is None} <= {"conv_out"}
    assert document["trajectory"]["steps"] > 1
    assert document["trajectory"]["fp32_ms"] > document["fp32_ms"]
    measured = {(row["runtime"], row["precision"]) for row in document["runtimes"]}
    assert {("onnxruntime", "fp32"), ("onnxruntime", "w8a8"), ("onnxruntime", "fp16"), ("openvino", "fp32")} <= measured
    named = measured | {(row["runtime"], row["precision"]) for row in document["left_out"]}
    assert {("openvino", "bf16"), ("openvino", "fp16"), ("tensorrt", "fp16")} <= named, "none is dropped silently"
    assert all(row["reason"] for row in document["left_out"])
    assert document["mixed"]["rows"] == 2
    assert any(row["op"] == "MatMulIntegerToFloat" for row in document["operators"]["quantized"])
    assert not any(row["op"] == "MatMulIntegerToFloat" for row in document["operators"]["fp32"])
    assert "<svg" in drawn.read_text(encoding="utf-8")
    assert "trajectory of" in answer.out


@pytest.mark.slow
def test_bench_of_a_model_that_is_gone_or_another(plain_bundle: Built, tmp_path: Path) -> None:
    bundle = copy(plain_bundle.path, tmp_path / "bundle")
    other = copy(plain_bundle.model, tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.5}))
    refused(dmqexport("bench", bundle, "-m", other), 6, ("is not the one the bundle was built from", "--model"))
    refused(dmqexport("bench", bundle, "-m", tmp_path / "gone"), 2, ("cannot be loaded", "gone", "--model"))
    assert not (tmp_path / "bundle.work").exists()


# Progress


def test_progress_on_a_terminal_is_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import time
from dmqexport.cli_console import console_reporter
with console_reporter(quiet=False) as reporter:
    reporter.started("statistics")
    for done in range(1, 9):
        reporter.progress(done, 10)
        time.sleep(0.06)
    reporter.finished("statistics", 75.0, False)
    print("result")
"""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=follower, env=environment, text=True
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(leader)
    out, _ = process.communicate(timeout=60)
    text = shown.decode()
    assert out == "result\n", "results do not mix with the bar"
    assert re.search(r" [5-8]/10 .*left", text)
    assert "statistics    1 min 15 s" in text


def test_progress_elsewhere_is_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_console, "_LINE_SECONDS", 0.0)
    with cli_console.console_reporter(quiet=False) as reporter:
        reporter.started("plan")
        reporter.progress(1, 2)
        reporter.finished("plan", 0.25, False)
        reporter.finished("export", 0.0, True)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *rest = captured.err.splitlines()
    assert first.startswith("plan          1/2, about ")
    assert rest == ["plan          0.2 s", "export        reused"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with cli_console.console_reporter(quiet=True) as reporter:
        reporter.started("plan")
        reporter.finished("plan", 1.0, False)
    assert capsys.readouterr() == ("", "")


def test_main_is_the_entry_point() -> None:
    assert main.__module__ == "dmqexport.cli"
