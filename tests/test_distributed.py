"""Builds by several processes under torchrun: the plan of one process, one bundle, clean failures, and resuming."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dmqexport.bundle import open_bundle
from dmqexport.quant_plan import QuantPlan
from tests.command_line import SMALL, build, dmqexport, refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

# Several batches of trajectories, statistics, sensitivities and targets; blocks are trained.
SHARED = (
    *("--calib-size", "6", "--set", "calibration.batch_size=2", "--bits", "w4a4", "--target", "onnx", "--mixed"),
    *("--set", "allocation.entries=8", "--set", "training.trajectories=4", "--set", "training.blocks.iterations=2"),
    *("--set", "training.blocks.entries=12", "--set", "training.blocks.held_out=4"),
    *("--set", "quantization.row_bits=measured", "--set", "calibration.row_assignment=per-step"),
)
# Four batches of trajectories, of which each of two processes samples two.
KILLED = ("--calib-size", "8", "--set", "calibration.batch_size=2", "--bits", "w4a4")
TRAINED = ("blocks", "passes", "reference", "validate")  # what training changes in its last bits, and what follows


def torchrun(size: int, *arguments: object, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node SIZE -m dmqexport ARGUMENTS`, or a script in its place."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)),
            *((str(script),) if script is not None else ("-m", "dmqexport")),
            *map(str, arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def contents(work: Path) -> dict[str, bytes]:
    """Every file of the finished stages that do not depend on training; `stage.json` says how long they took."""
    return {
        str(file.relative_to(work)): file.read_bytes()
        for file in sorted(work.rglob("*"))
        if file.is_file() and file.name != "stage.json" and not file.relative_to(work).parts[0].startswith(TRAINED)
    }


def test_two_processes_make_what_one_makes(tiny_plain: Path, tmp_path: Path) -> None:
    alone = build(tiny_plain, tmp_path / "alone", tmp_path / "alone.work", *SHARED)
    assert alone.code == 0, alone.err
    options = ["-m", tiny_plain, "-o", tmp_path / "two", "--work", tmp_path / "two.work", *SMALL, *SHARED]
    shared = torchrun(2, "build", *options)
    assert shared.returncode == 0, shared.stderr
    # Trajectories, factors, statistics, candidates, sensitivities, allocation, plan and targets to the last byte.
    one, two = contents(tmp_path / "alone.work"), contents(tmp_path / "two.work")
    stages = {name.rpartition("-")[0] for name in (path.split("/")[0] for path in one)}
    expected = "trajectories statistics candidates step-errors sensitivity allocation row-bits plan training-set"
    assert set(expected.split()) <= stages
    assert one.keys() == two.keys()
    assert [name for name, data in one.items() if two[name] != data] == []
    # Trained blocks may differ where a float sum fell otherwise: the same layers at the same widths.
    plans = [QuantPlan.load(open_bundle(tmp_path / name).path / "dmqexport") for name in ("alone", "two")]
    widths = [{layer.name: layer.segments[0].weight.bits for layer in plan.layers} for plan in plans]
    assert widths[0] == widths[1]
    # One process speaks, and nothing half done is left.
    assert shared.stdout.count("for onnx") == 1
    assert len(re.findall(r"^statistics ", shared.stderr, flags=re.MULTILINE)) == 1
    assert list((tmp_path / "two.work").glob(".*")) == []


_KILLING = """
import os, sys
from dmqexport import pipeline_calibrate
original, calls = pipeline_calibrate.sample_images, []
def sample(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        {stop}
    return original(*args, **kwargs)
pipeline_calibrate.sample_images = sample
from dmqexport.cli import main
main()
"""


def test_a_killed_process_stops_the_build_and_one_process_finishes_it(
    tiny_plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, work = tmp_path / "out", tmp_path / "work"
    options = ["-m", tiny_plain, "-o", output, "--work", work, *SMALL, *KILLED]
    script = tmp_path / "killing.py"
    script.write_text(_KILLING.format(stop="open('killed', 'w').close(); os.kill(os.getpid(), 9)"))
    monkeypatch.chdir(tmp_path)
    failed = torchrun(2, "build", *options, script=script)
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 30
    assert failed.returncode != 0
    assert re.search(r"error: rank 1 of 2 \(process \d+ on .*\) died without a word", failed.stderr), failed.stderr
    assert "the same command resumes" in failed.stderr
    assert "exitcode  : -9" in failed.stderr, "torchrun names the culprit"
    assert not output.exists()
    assert [path.name for path in work.iterdir() if not path.name.endswith(".partial")] == []
    kept = sorted(path.name for path in next(work.glob(".trajectories-*.partial")).iterdir())
    parts = [name for name in kept if name.endswith(".safetensors")]
    assert 1 <= len(parts) <= 3

    from dmqexport import pipeline_calibrate

    sampled: list[Any] = []
    original = pipeline_calibrate.sample_images
    monkeypatch.setattr(pipeline_calibrate, "sample_images", lambda *a, **k: (sampled.append(a), original(*a, **k))[1])
    answer = build(tiny_plain, output, work, *KILLED, verb="plan")
    assert answer.code == 0, answer.err
    assert len(sampled) == 4 - len(parts), "finished parts are not sampled again"
    assert list(work.glob(".*")) == []


def test_what_is_wrong_on_one_process_is_said_once_and_stops_all(tiny_plain: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(_KILLING.format(stop="from dmqexport.errors import ModelError; raise ModelError('torn weights')"))
    options = ["-m", tiny_plain, "-o", tmp_path / "out", *SMALL, *KILLED]
    failed = torchrun(2, "plan", *options, script=script)
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "error: rank 1: torn weights" in errors
    assert all("torn weights" in line for line in errors), errors


def test_a_fault_of_the_command_is_said_by_one_process(tmp_path: Path) -> None:
    failed = torchrun(2, "build", "-m", tmp_path / "no-such-folder", "-o", tmp_path / "out")
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, failed.stderr
    assert "no-such-folder" in errors[0]


def test_commands_that_are_the_work_of_one_refuse_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from dmqexport.cli_log import Session

    monkeypatch.setattr(Session, "rank", 0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refused(dmqexport("doctor"), 2, ["2 processes were started", "`dmqexport doctor`", "without torchrun"])
