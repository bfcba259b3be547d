"""Running a TensorRT engine: memory, shapes, judgement and clock, on a pretended GPU whose arithmetic is real."""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from dmqexport.errors import EngineError, GateError
from engines import trt_run, trt_standalone
from engines.ort import OrtRunner
from engines.trt import ShapeRange, TrtFlavor, TrtRunner, find_engine, write_finish_script
from engines.trt_run import EngineRunner, Gpu, RunError, bench, judge

PRETEND = Path(__file__).parent / "pretend_gpu"
VERSION = "10.99.1"
SIDE = 8
GRAPH = f"""
<ir_version: 10, opset_import: ["" : 21]>
unet (float[B,4,{SIDE},{SIDE}] sample, int64[B] timestep) => (float[B,4,{SIDE},{SIDE}] noise)
<float[4,1,1,1] table = {{0.5, 1.0, 1.5, 2.0}}> {{
    scale = Gather (table, timestep)
    scaled = Mul (sample, scale)
    noise = Tanh (scaled)
}}
"""
PROFILES = {
    "sample": ShapeRange((2, 4, SIDE, SIDE), (2, 4, SIDE, SIDE), (4, 4, SIDE, SIDE)),
    "timestep": ShapeRange((2,), (2,), (4,)),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The pretended driver, here and in children."""
    monkeypatch.syspath_prepend(str(PRETEND))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PRETEND), os.environ.get("PYTHONPATH", "")]))
    specification = importlib.util.spec_from_file_location("pretend_gpu", PRETEND / "sitecustomize.py")
    assert specification is not None
    assert specification.loader is not None
    monkeypatch.setattr(ctypes, "CDLL", ctypes.CDLL)  # put back afterwards
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    driver = module.PretendDriver()
    monkeypatch.setattr(trt_run, "load_driver", lambda: driver)
    yield driver
    sys.modules.pop("tensorrt", None)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return _engine(tmp_path, tmp_path / "engine.plan")


def _engine(folder: Path, place: Path) -> Path:
    graph = folder / "unet.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), graph)
    profiles = {name: {"min": shape.min, "opt": shape.opt, "max": shape.max} for name, shape in PROFILES.items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"onnx": str(graph), "profiles": profiles}))
    return place


def _inputs(batch: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "sample": random.standard_normal((batch, 4, SIDE, SIDE)).astype(np.float32),
        "timestep": random.integers(0, 4, batch),
    }


def _reference(path: Path, graph: Path, *, samples: int = 5, noise: float = 0.05, wrong: float = 0.0) -> Path:
    """What a build keeps: the graph's own answers as the exact ones, and float ones that `noise` sets apart."""
    inputs = _inputs(samples)
    runner = OrtRunner(graph)
    (name,) = runner.output_names
    exact = runner.run(inputs)[name]
    random = np.random.default_rng(1)
    target = exact + noise * exact.std() * random.standard_normal(exact.shape).astype(np.float32)
    exact = target + (exact - target) / (1 + wrong)  # a nearer "exact" answer makes the engine's the worse one
    kept = {f"input:{key}": value for key, value in inputs.items()}
    kept |= {f"float:{name}": target, f"exact:{name}": exact}
    np.savez(path, allow_pickle=False, **kept)
    return path


def test_answers_as_the_graph_does_at_every_batch(engine: Path, gpu: Any) -> None:
    runner, expected = EngineRunner("tensorrt", engine), OrtRunner(engine.with_name("unet.onnx"))
    assert runner.input_names == expected.input_names
    assert runner.output_names == expected.output_names
    assert runner.batch_sizes == (2, 2, 4)
    for batch in (2, 4, 3):  # grows, then shrinks into the room that is there
        answers = runner.run(_inputs(batch, batch))
        for name, value in expected.run(_inputs(batch, batch)).items():
            np.testing.assert_allclose(answers[name], value, rtol=1e-5, atol=1e-5)
    assert len(gpu.held) == len(runner.input_names) + len(runner.output_names), "one room a tensor, others are released"


def test_converts_inputs_to_the_engine_s_types(engine: Path, gpu: Any) -> None:
    runner, inputs = EngineRunner("tensorrt", engine), _inputs(2)
    backwards = inputs["sample"].astype(np.float64)[:, :, ::-1].copy()
    wide = {"sample": backwards[:, :, ::-1], "timestep": inputs["timestep"].astype(np.int32)}
    (name,) = runner.output_names
    np.testing.assert_array_equal(runner.run(wide)[name], runner.run(inputs)[name])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda inputs: inputs.pop("timestep"), r"takes the inputs \['sample', 'timestep'\], not \['sample'\]"),
        (
            lambda inputs: inputs.update(sample=inputs["sample"][:1]),
            r"'sample' has shape \(1, 4, 8, 8\).*\(2, 4, 8, 8\)",
        ),
    ],
)
def test_refuses_what_it_was_not_built_for(engine: Path, gpu: Any, change: Any, said: str) -> None:
    inputs = _inputs(2)
    change(inputs)
    with pytest.raises(RunError, match=said):
        EngineRunner("tensorrt", engine).run(inputs)


def test_says_what_cannot_be_loaded(engine: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = EngineRunner("tensorrt", engine)
    with pytest.raises(RunError, match=r"no outputs \['nothing'\]"):
        runner.run(_inputs(2), ["nothing"])
    engine.write_bytes(engine.read_bytes()[:-9])
    with pytest.raises(RunError, match=rf"tensorrt {VERSION} does not load .*damaged, or was built by another version"):
        EngineRunner("tensorrt", engine)
    with pytest.raises(EngineError, match=r"does not load(.|\n)*--rebuild"):
        TrtRunner(engine, TrtFlavor.TRT)
    with pytest.raises(RunError, match="no_such_vendor cannot be imported"):
        EngineRunner("no_such_vendor", engine)
    with pytest.raises(RunError, match="cuMemFree_v2 failed: invalid argument"):
        Gpu().release(7)
    monkeypatch.setattr(trt_run, "load_driver", lambda: None)
    with pytest.raises(RunError, match="no NVIDIA GPU"):
        EngineRunner("tensorrt", engine)


def test_the_gate_compares_with_the_exact_graph(engine: Path, gpu: Any, tmp_path: Path) -> None:
    runner, graph = EngineRunner("tensorrt", engine), engine.with_name("unet.onnx")
    good = judge(runner, _reference(tmp_path / "good.npz", graph), 1.0)
    assert good["passed"]
    assert good["samples"] == 5, "five samples through an engine that takes two to four"
    assert good["sqnr_db"] == pytest.approx(26.0, abs=0.5), "noise of 0.05 of the answers' deviation"
    assert good["distance_db"] > 80
    bad = judge(runner, _reference(tmp_path / "bad.npz", graph, wrong=1.0), 1.0)
    assert not bad["passed"]
    assert bad["exact_sqnr_db"] - bad["sqnr_db"] == pytest.approx(6.0, abs=0.1)
    assert judge(runner, tmp_path / "bad.npz", 6.5)["passed"]
    (tmp_path / "torn.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:100])
    with pytest.raises(RunError, match=r"torn\.npz cannot be read"):
        judge(runner, tmp_path / "torn.npz", 1.0)


def test_answers_that_are_no_numbers_fail(engine: Path, gpu: Any, tmp_path: Path) -> None:
    path = _reference(tmp_path / "answers.npz", engine.with_name("unet.onnx"))
    stored = dict(np.load(path))
    stored["input:sample"][0] = np.inf
    np.savez(path, **stored)
    judged = judge(EngineRunner("tensorrt", engine), path, 1.0)
    assert not judged["passed"]
    json.dumps(judged, allow_nan=False)


def test_times_every_batch_size(engine: Path, gpu: Any) -> None:
    rows = bench(EngineRunner("tensorrt", engine), runs=3, warmup=1)
    assert [row["batch"] for row in rows] == [2, 4]
    for row in rows:
        assert 0 < row["median_ms"] <= row["p90_ms"]
        assert row["samples_per_second"] == pytest.approx(1000 * row["batch"] / row["median_ms"])


# --- the script in a bundle -------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with an engine for the pretended machine, answers, and the script."""
    _engine(tmp_path, tmp_path / "unet" / "engines" / f"trt-sm89-{VERSION}" / "engine.plan")
    _reference(tmp_path / "answers.npz", tmp_path / "unet.onnx")
    _script(tmp_path, "answers.npz")
    return tmp_path


def _script(bundle: Path, answers: str | None) -> None:
    write_finish_script(
        bundle, "unet.onnx", flavor=TrtFlavor.TRT, profiles=PROFILES, expected={}, engines_relpath="unet/engines",
        reference_relpath=answers,
    )  # fmt: skip


def _run(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", str(bundle / "finish_on_gpu.py"), "--runs", "3", *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        env={"PATH": "", "HOME": str(bundle), "PYTHONPATH": str(PRETEND)},
    )


def test_the_script_judges_and_times_the_engine(bundle: Path) -> None:
    done = _run(bundle)
    assert done.returncode == 0, done.stderr
    assert "was there already" in done.stdout
    assert "dB from the float model's" in done.stdout
    assert "batch 4: " in done.stdout
    assert "samples a second on Pretended GPU" in done.stdout
    (folder,) = (bundle / "unet" / "engines").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["judged"]["passed"]
    assert [row["runs"] for row in record["latency"]] == [3, 3]
    assert _engine_of(bundle) == folder / "engine.plan"


def _engine_of(bundle: Path) -> Path:
    """The engine that the script ran, by its own folder's name."""
    (engine,) = (bundle / "unet" / "engines").glob("*/engine.plan")
    return engine


def test_the_script_fails_where_the_engine_errs_too_much(bundle: Path) -> None:
    _reference(bundle / "answers.npz", bundle / "unet.onnx", wrong=1.0)
    done = _run(bundle)
    assert done.returncode == GateError.exit_code == trt_standalone.EXIT_GATE
    assert "failed (gate)" in done.stderr
    assert "--tolerance-db" in done.stderr
    (folder,) = (bundle / "unet" / "engines").iterdir()
    assert not json.loads((folder / "run.json").read_text())["judged"]["passed"], "what was measured is kept"
    assert _run(bundle, "--tolerance-db", "7").returncode == 0


def test_the_script_runs_without_answers_and_not_at_all_if_asked(bundle: Path) -> None:
    _script(bundle, None)
    done = _run(bundle)
    assert done.returncode == 0, done.stderr
    assert "not judged" in done.stdout
    assert "batch 2: " in done.stdout
    quick = _run(bundle, "--no-run")
    assert quick.returncode == 0
    assert "batch" not in quick.stdout


@pytest.mark.parametrize("arguments", [("--runs", "0"), ("--runs", "many"), ("--tolerance-db", "some")])
def test_the_script_refuses_nonsense(bundle: Path, arguments: tuple[str, str]) -> None:
    done = _run(bundle, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_script_leaves_other_folders_alone(bundle: Path, tmp_path: Path) -> None:
    done = _run(bundle, "--bundle", str(tmp_path / "nowhere"))
    assert done.returncode == 5
    assert "lacks unet.onnx: --bundle takes the folder" in done.stderr
    assert not (tmp_path / "nowhere").exists()
    (engine,) = (bundle / "unet" / "engines").glob("*/engine.plan")
    (engine.parent / "run.json").mkdir()
    done = _run(bundle)
    assert done.returncode == 5
    assert "run.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_says_what_it_could_not_do(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "answers.npz").unlink()
    done = _run(bundle)
    assert done.returncode == 1
    assert "failed (run)" in done.stderr
    assert "answers.npz cannot be read" in done.stderr
    monkeypatch.setattr(trt_standalone.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(trt_standalone.BuildError, match="numpy is not installed") as raised:
        trt_standalone.run_here({})
    assert raised.value.kind == "backend"


def test_finds_the_engine_of_this_machine(bundle: Path, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = bundle / "unet" / "engines"
    assert find_engine(engines, TrtFlavor.TRT) == _engine_of(bundle)
    monkeypatch.setattr(trt_run, "gpu_arch", lambda: "sm120")
    assert find_engine(engines, TrtFlavor.TRT) is None
    next(engines.iterdir()).rename(engines / f"trt-any-{VERSION}")
    assert find_engine(engines, TrtFlavor.TRT) == _engine_of(bundle)
