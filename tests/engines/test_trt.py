"""Real TensorRT-RTX builds (no GPU needed), a builder that dies, a backend that is missing, and the finish script."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmqexport.errors import BackendMissingError, EngineError, ResourceError
from engines import trt, trt_run, trt_standalone
from engines.precision import prove_int8, read_build_log
from engines.trt import (
    BuildOptions,
    EngineBuild,
    Hardware,
    ShapeRange,
    TrtFlavor,
    build_engine,
    flavor_version,
    write_finish_script,
)
from tests.engines.trt_graphs import EXPECTED, SIDE, crashing_graph, tiny_denoiser

PROFILES = {
    "sample": ShapeRange((1, 4, SIDE, SIDE), (2, 4, SIDE, SIDE), (8, 4, SIDE, SIDE)),
    "timestep": ShapeRange((1,), (2,), (8,)),
}


def _build(onnx: Path, folder: Path, **options: object) -> EngineBuild:
    settings = {"flavor": TrtFlavor.RTX, "profiles": PROFILES, "log_path": folder / "build.log", **options}
    return build_engine(onnx, folder / "out" / "unet.engine", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> EngineBuild:
    folder = tmp_path_factory.mktemp("built")
    return _build(tiny_denoiser(folder / "unet.onnx", external=True), folder)


def test_builds_an_engine_without_a_gpu(built: EngineBuild) -> None:
    assert built.engine_path.stat().st_size == built.size_bytes > 100_000
    assert built.version == flavor_version(TrtFlavor.RTX)
    assert built.seconds > 0
    assert built.peak_rss_bytes is None or built.peak_rss_bytes > 50e6
    assert [p.name for p in built.engine_path.parent.iterdir()] == ["unet.engine"], "no partial file is left"
    assert list(built.layers) == read_build_log(built.log_path)


def test_proves_int8_of_a_whole_graph(built: EngineBuild) -> None:
    proofs = prove_int8(built.layers, EXPECTED)
    assert len(proofs) == len(EXPECTED)
    merged = {proof.engine_layer for proof in proofs if proof.layer in ("attn.to_q", "attn.to_k", "attn.to_v")}
    assert len(merged) == 1, "q, k and v share one GEMM"


@pytest.mark.parametrize("node", ["node_qk", "node_pv", "node_temb", "node_gn"])
def test_does_not_prove_what_stays_in_float(built: EngineBuild, node: str) -> None:
    with pytest.raises(EngineError, match=rf"1 of 8 .*\n.*float.layer .node '{node}'"):
        prove_int8(built.layers, {**EXPECTED, "float.layer": [node]})


@pytest.mark.parametrize(
    ("broken", "layer"),
    [
        pytest.param("rank1", "down_blocks.0.resnets.0.conv1", id="activation scale of shape [1]"),
        pytest.param("float", "down_blocks.0.resnets.0.conv1", id="layer without quantizers"),
        pytest.param("weight-only", "down_blocks.0.resnets.0.conv1", id="layer with a quantized weight only"),
        pytest.param("float-k", "attn.to_k", id="one of three merged projections in float"),
    ],
)
def test_catches_one_layer_that_fell_back_to_float(tmp_path: Path, broken: str, layer: str) -> None:
    build = _build(tiny_denoiser(tmp_path / "unet.onnx", broken=broken), tmp_path)
    with pytest.raises(EngineError) as caught:
        prove_int8(build.layers, EXPECTED)
    assert f"1 of {len(EXPECTED)} quantized operators" in str(caught.value)
    assert f"{layer} (node" in str(caught.value)
    assert "takes Float x Float" in str(caught.value)


def test_a_crashing_builder_leaves_the_caller_alive_and_teaches(tmp_path: Path) -> None:
    graph, profiles = crashing_graph(tmp_path / "crash.onnx")
    with pytest.raises(EngineError, match="died") as caught:
        _build(graph, tmp_path, profiles={name: ShapeRange(*shapes) for name, shapes in profiles.items()})
    assert "signal 11" in str(caught.value)
    assert "Segmentation fault" in str(caught.value), "the last log lines are quoted"
    assert "debug reduce" in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def test_a_graph_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot be parsed"):
        _build(bad, tmp_path)
    with pytest.raises(EngineError, match="there is no ONNX graph"):
        _build(tmp_path / "missing.onnx", tmp_path)


def test_ranges_must_fit_the_inputs(tmp_path: Path) -> None:
    graph = tiny_denoiser(tmp_path / "unet.onnx")
    ranges = {"sample": PROFILES["sample"], "latents": PROFILES["timestep"]}
    with pytest.raises(EngineError, match=r"unknown \['latents'\], dynamic without a range \['timestep'\]"):
        _build(graph, tmp_path, profiles=ranges)
    with pytest.raises(EngineError, match="input 'timestep' has shape"):
        _build(graph, tmp_path, profiles={**PROFILES, "timestep": ShapeRange((1, 1), (1, 1), (1, 1))})


@pytest.mark.parametrize("shapes", [((1,), (1, 1), (1,)), ((2,), (1,), (8,)), ((0,), (1,), (8,)), ((1,), (9,), (8,))])
def test_a_range_is_ordered(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(EngineError, match="1 <= min <= opt <= max"):
        ShapeRange(*shapes)


def test_time_and_memory_limits_end_the_child(tmp_path: Path) -> None:
    graph = tiny_denoiser(tmp_path / "unet.onnx")
    with pytest.raises(EngineError, match=r"still running after 0\.01 s"):
        _build(graph, tmp_path, timeout_s=0.01)
    if sys.platform == "linux":
        with pytest.raises(ResourceError, match="more than the 1 MiB allowed"):
            _build(graph, tmp_path, max_ram_bytes=1 << 20)
    assert not list(tmp_path.glob("out/*"))


def test_a_timing_cache_is_written_and_read(tmp_path: Path) -> None:
    graph, cache = tiny_denoiser(tmp_path / "unet.onnx"), tmp_path / "kernels.cache"
    options = BuildOptions(timing_cache=cache, hardware=Hardware.AMPERE_PLUS)
    _build(graph, tmp_path, options=options)
    assert cache.read_bytes()
    _build(graph, tmp_path, options=options)
    assert cache.read_bytes()


def test_an_option_that_a_version_lacks_is_refused() -> None:
    with pytest.raises(trt_standalone.BuildError, match=r"old_trt 1\.0 has no BuilderFlag\.REFIT"):
        trt_standalone._apply_options(
            SimpleNamespace(__version__="1.0"), SimpleNamespace(set_flag=int), {"module": "old_trt", "refit": True}
        )


def test_an_engine_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match="cannot be written"):
        _build(tiny_denoiser(tmp_path / "unet.onnx"), tmp_path)


def test_a_missing_backend_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_denoiser(tmp_path / "unet.onnx")
    monkeypatch.setattr(trt.importlib.util, "find_spec", lambda _: None)
    assert flavor_version(TrtFlavor.TRT) is None
    with pytest.raises(BackendMissingError, match=r"needs the Python package tensorrt, .*\n.*finish_on_gpu.py"):
        _build(graph, tmp_path, flavor=TrtFlavor.TRT)
    monkeypatch.setattr(trt.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(trt_run, "gpu_arch", lambda: None)
    assert not trt.gpu_present()
    with pytest.raises(BackendMissingError, match="only where an NVIDIA GPU is"):
        _build(graph, tmp_path, flavor=TrtFlavor.TRT)


def test_a_broken_vendor_package_is_no_version_and_a_missing_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("raise OSError('libnvinfer.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert flavor_version(TrtFlavor.RTX) is None
    with pytest.raises(BackendMissingError, match=r"libnvinfer\.so"):
        _build(tiny_denoiser(tmp_path / "unet.onnx"), tmp_path)


# --- the finish script ------------------------------------------------------------------------------------------------


def _finish(tmp_path: Path, expected: dict[str, tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
    """Write the script for TensorRT-RTX, and run it, alone, as if the machine had a GPU."""
    (tmp_path / "unet").mkdir()
    tiny_denoiser(tmp_path / "unet" / "model.onnx", external=True)
    script = write_finish_script(
        tmp_path,
        "unet/model.onnx",
        flavor=TrtFlavor.RTX,
        profiles=PROFILES,
        expected={name: ("Int8", nodes) for name, nodes in expected.items()},
        engines_relpath="unet/engines",
    )
    assert script.command == "python finish_on_gpu.py"
    with_gpu = (
        "import runpy, sys, ctypes\n"
        "class Driver:\n"
        "    def __init__(self, name): pass\n"
        "    def cuInit(self, flags): return 0\n"
        "    def cuDeviceGet(self, device, index): return 0\n"
        "    def cuDeviceGetAttribute(self, value, key, device):\n"
        "        value._obj.value = {75: 8, 76: 9}[key]\n"
        "        return 0\n"
        "ctypes.CDLL = Driver\n"
        "runpy.run_path(sys.argv.pop(), run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", with_gpu, "--no-run", str(script.path)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        env={"PATH": "", "HOME": str(tmp_path)},
    )


def test_the_finish_script_builds_proves_and_places_the_engine(tmp_path: Path) -> None:
    done = _finish(tmp_path, {**EXPECTED})
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "unet" / "engines" / f"trt-rtx-sm89-{flavor_version(TrtFlavor.RTX)}"
    assert sorted(p.name for p in folder.iterdir()) == ["build.log", "engine.plan", "result.json"]
    record = json.loads((folder / "result.json").read_text())
    assert record["products"] == {"Int8 x Int8": len(EXPECTED)}
    assert record["layers_from"] == "log", "without a real GPU the inspector cannot be asked"
    assert record["size_bytes"] == (folder / "engine.plan").stat().st_size
    assert "7 take Int8 x Int8" in done.stdout


def test_the_finish_script_places_no_engine_that_is_not_proven(tmp_path: Path) -> None:
    done = _finish(tmp_path, {**EXPECTED, 'mid.it\'s "odd" \\ name': ("node_qk",)})
    assert done.returncode == 1
    assert "1 of 8 quantized operators do not run in int8" in done.stderr
    assert 'mid.it\'s "odd" \\ name' in done.stderr
    (folder,) = (tmp_path / "unet" / "engines").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["build.log", "result.json"]


@pytest.mark.skipif(trt.gpu_present(), reason="says what happens without a GPU")
def test_the_finish_script_says_what_is_missing(tmp_path: Path) -> None:
    script = write_finish_script(tmp_path, "model.onnx", flavor=TrtFlavor.TRT, profiles=PROFILES, expected={})
    compile(script.path.read_text(), str(script.path), "exec")
    done = subprocess.run([sys.executable, str(script.path)], capture_output=True, text=True, check=False)
    assert done.returncode == BackendMissingError.exit_code
    assert "no NVIDIA GPU" in done.stderr


def test_the_finish_script_stays_in_its_bundle(tmp_path: Path) -> None:
    for path in ("../model.onnx", "/model.onnx"):
        with pytest.raises(EngineError, match="leaves the bundle"):
            write_finish_script(tmp_path, path, flavor=TrtFlavor.TRT, profiles={}, expected={})


def test_the_finish_script_needs_only_the_standard_library(tmp_path: Path) -> None:
    script = write_finish_script(tmp_path, "model.onnx", flavor=TrtFlavor.TRT, profiles=PROFILES, expected={})
    assert "from engines" not in script.path.read_text()
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1])\n"
        "print([m for m in sys.modules if m.split('.')[0] not in sys.stdlib_module_names and not m.startswith('__')])"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(script.path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_exit_codes_agree_with_the_error_tree() -> None:
    assert EngineError.exit_code == trt_standalone.EXIT_FAILED
    assert ResourceError.exit_code == trt_standalone.EXIT_RESOURCE
    assert BackendMissingError.exit_code == trt_standalone.EXIT_BACKEND
