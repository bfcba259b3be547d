"""Time a bundle's graph against the float graph it came from: the whole model, a trajectory, every layer."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dmqexport.bundle import RECIPE, Bundle
from dmqexport.errors import BundleError, DmqExportError, ModelError
from dmqexport.models.loading import LoadedModel
from dmqexport.pipeline import Build
from dmqexport.recipe import load_recipe
from dmqexport.runtime import check_machine, open_runner
from dmqexport.target import Target
from dmqexport.workspace import Reporter, Workspace
from engines import openvino_ir
from engines.bench import LatencyResult, interleaved, interleaved_trajectories
from engines.memory import peak_memory
from engines.openvino_ir import OpenVinoRunner, open_ir
from engines.openvino_profile import profile_network
from engines.ort import OrtRunner, available_cores
from engines.ort_half import half_computes_in, write_half
from engines.ort_profile import NodeTime, by_layer, by_operator, profile_nodes
from engines.roofline import measure_peaks, place
from engines.runner import Runner
from engines.trt import gpu_present

FP32, QUANTIZED = "fp32", "quantized"
ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
#: Rows of an operator table; the rest is below a hundredth of the time together.
_OPERATORS = 24


@dataclass(frozen=True)
class Contender:
    """One graph in one runtime. note: what its time means, where that is not plain."""

    key: str
    runtime: str
    precision: str
    open: Callable[[], Runner]
    note: str = ""


def bench_bundle(
    bundle: Bundle,
    batch: int,
    runs: int,
    threads: int | None,
    reporter: Reporter,
    *,
    model: str | None = None,
    work: Path | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """Median milliseconds of FP32 and quantized in the bundle's runtime, on the same random inputs, and their ratio.

    All samples of a batch have one timestep, as samplers call. The float graph is exported again from the model
    (`model`, else the one the recipe names), or reused from the work folder (`work`, else the one beside the bundle).
    It has every rewrite of the quantized one but the integers.

    details: also the float graph in float32 and in half precision in every runtime that is installed, why others are
    left out, peak memory, a batch of mixed timesteps, a whole trajectory, the time of every layer, and a roofline
    table of operators.

    Raises BundleError when that model is not the one the bundle was built from, ModelError when it is gone.
    """
    check_machine(bundle)
    folder = bundle.path.resolve()
    recipe = load_recipe(bundle.path / RECIPE, {"model": model}, ["scaling.method=none"])
    workspace = Workspace(folder.with_name(folder.name + ".work") if work is None else work, reporter)
    try:
        build = Build(recipe, bundle.path, workspace)
        if _load(build).fingerprint != bundle.manifest["model"]["fingerprint"]:
            raise BundleError(
                f"{bundle.path}: the model {recipe.model!r} is not the one the bundle was built from",
                hint="it has changed since: rebuild the bundle, or give the original with --model",
            )
        inputs = {name: value.numpy() for name, value in build.model.example_inputs(batch=batch).items()}
        inputs["timestep"] %= int(bundle.manifest["num_timesteps"])  # a short schedule has a short table
        mixed = {**inputs, "timestep": _spread(bundle, inputs["timestep"])}
        inputs["timestep"] = np.full_like(inputs["timestep"], inputs["timestep"][0])  # as samplers call
        baseline, floats = build.float_baseline, {ONNXRUNTIME: build.float_baseline, OPENVINO: build.float_graph}
    finally:
        workspace.close()
    own = OPENVINO if bundle.manifest["target"] == Target.OPENVINO else ONNXRUNTIME
    contenders = [
        Contender(FP32, own, FP32, lambda: _open_float(bundle, own, baseline, threads)),
        Contender(QUANTIZED, own, str(bundle.manifest["bits"]), lambda: open_runner(bundle, threads)),
    ]
    left_out: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if details:
            contenders += _others(bundle, own, floats, inputs, threads, Path(scratch), left_out)
        runners, peaks = _opened(contenders, inputs)
        result = interleaved(runners, inputs, runs=runs)
        document = {**_times(result), "batch": batch, "threads": threads or available_cores(), "runs": result.runs}
        if details:
            document["load"] = _load_average()
            document["runtimes"] = [
                {
                    "runtime": contender.runtime,
                    "precision": contender.precision,
                    "note": contender.note,
                    "median_ms": result.median_ms[contender.key],
                    "minimum_ms": result.minimum_ms[contender.key],
                    "processor_ms": result.processor_ms[contender.key],
                    "ratio": result.ratio(contender.key, FP32),
                    "peak_memory_bytes": peaks[contender.key],
                }
                for contender in contenders
            ]
            document["left_out"] = left_out
            pair = {name: runners[name] for name in (FP32, QUANTIZED)}
            document["mixed"] = {
                "rows": _rows(bundle, mixed["timestep"]),
                **_times(interleaved(pair, mixed, runs=runs)),
            }
            document["trajectory"] = _trajectory(bundle, pair, inputs)
            document |= _parts(bundle, own, baseline, inputs, threads)
    return document


def _others(
    bundle: Bundle,
    own: str,
    floats: Mapping[str, Path],
    inputs: Mapping[str, np.ndarray],
    threads: int | None,
    scratch: Path,
    left_out: list[dict[str, str]],
) -> Iterator[Contender]:
    """The float graph in the other runtimes and in half precision; what cannot be had goes to `left_out`."""

    def missing(runtime: str, precision: str, reason: str) -> None:
        left_out.append({"runtime": runtime, "precision": precision, "reason": reason})

    def plain(runtime: str) -> Contender:
        return Contender(
            f"{runtime} fp32", runtime, FP32, lambda: _open_float(bundle, runtime, floats[runtime], threads)
        )

    if own != ONNXRUNTIME:
        yield plain(ONNXRUNTIME)
    half = scratch / "half.onnx"
    try:
        write_half(floats[ONNXRUNTIME], half)
        computed = half_computes_in(half, inputs, threads)
    except DmqExportError as error:
        missing(ONNXRUNTIME, "fp16", error.message)
    else:
        note = "" if computed == "float16" else "no float16 kernels on this CPU: products in float32, between casts"
        yield Contender("onnxruntime fp16", ONNXRUNTIME, "fp16", lambda: OrtRunner(half, threads=threads), note)
    if openvino_ir.version() is None:
        missing(OPENVINO, FP32, "not installed: pip install 'dmqexport[openvino]'")
    else:
        if own != OPENVINO:
            yield plain(OPENVINO)
        yield from _half_in_openvino(bundle, floats[OPENVINO], threads, missing)
    if not gpu_present():
        missing("tensorrt", "fp16", "runs on NVIDIA GPUs, and there is none here")
    else:
        missing("tensorrt", "fp16", "engines are timed by what builds them, not by this command")


def _half_in_openvino(
    bundle: Bundle, graph: Path, threads: int | None, missing: Callable[[str, str, str], None]
) -> Iterator[Contender]:
    device = _device(bundle)
    for hint, name in (("bf16", "bf16"), ("f16", "fp16")):
        if hint not in openvino_ir.float_types(device):
            missing(OPENVINO, name, f"OpenVINO's {device} does not compute in it here")
            continue
        # Bound now: the loop goes on before the runner is opened.
        opener = partial(OpenVinoRunner, graph, device=device, threads=threads, precision=hint)
        yield Contender(f"openvino {name}", OPENVINO, name, opener)


def _opened(
    contenders: Sequence[Contender], inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, Runner], dict[str, int | None]]:
    """Runners that have run once, and the memory that opening and running took at its peak; by key."""
    runners: dict[str, Runner] = {}
    peaks: dict[str, int | None] = {}
    for contender in contenders:
        with peak_memory() as peak:
            runners[contender.key] = contender.open()
            runners[contender.key].run(inputs)
        peaks[contender.key] = peak.grown
    return runners, peaks


def _spread(bundle: Bundle, given: np.ndarray) -> np.ndarray:
    """Timesteps from the whole schedule, one a sample: what a server's batch may hold."""
    keys = np.linspace(0, int(bundle.manifest["num_timesteps"]) - 1, len(given)).round()
    return (keys / bundle.plan.timestep_scale).astype(given.dtype)


def _rows(bundle: Bundle, timesteps: np.ndarray) -> int:
    """How many rows of the timestep table a batch takes."""
    keys = np.rint(timesteps.astype(np.float64) * bundle.plan.timestep_scale).astype(int)
    return len(set(np.asarray(bundle.plan.row_map)[keys].tolist()))


def _load_average() -> float | None:
    """Processes that wanted to run in the last minute, this one among them; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _times(result: LatencyResult) -> dict[str, Any]:
    def ratio(values: Mapping[str, float]) -> float:
        return values[QUANTIZED] / values[FP32]

    return {
        "fp32_ms": result.median_ms[FP32],
        "quantized_ms": result.median_ms[QUANTIZED],
        "ratio": result.ratio(QUANTIZED, FP32),
        "minimum_ratio": ratio(result.minimum_ms),
        "processor_ratio": ratio(result.processor_ms),
    }


def _trajectory(bundle: Bundle, runners: Mapping[str, Runner], inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One call a sampling step, every sample of the batch at the step's timestep, as pipelines call.

    With guidance, half of a call's samples are the unconditional halves of the others: pictures says how many come out.
    """
    sampling = bundle.manifest["sampling"]
    steps, last = int(sampling["steps"]), int(bundle.manifest["num_timesteps"]) - 1
    given = inputs["timestep"]
    calls = []
    for key in np.linspace(last, 0, steps):
        timestep = np.full(given.shape, round(float(key)) / bundle.plan.timestep_scale)
        calls.append({**inputs, "timestep": timestep.astype(given.dtype)})
    times = _times(interleaved_trajectories(runners, calls, runs=3))
    guidance = float(sampling["guidance"])
    # Continuous time means flow matching, whose guidance is an input of the network where there is any.
    halves = 2 if guidance > 1 and bundle.plan.timestep_scale == 1 else 1
    return {"steps": steps, "guidance": guidance, "pictures": len(given) / halves, **times}


def _parts(
    bundle: Bundle, own: str, baseline: Path, inputs: Mapping[str, np.ndarray], threads: int | None
) -> dict[str, Any]:
    """Time by layer and by operator, in both graphs; None where the runtime gave a layer's node another name.

    In ONNX Runtime operators are placed under the machine's peaks, as it reaches them here.

    The convolution that makes the graph's output is such a one: it is named after that.
    """
    names = [layer.name for layer in bundle.plan.layers]
    nodes: dict[str, list[NodeTime]]
    if own == OPENVINO:
        counted = OpenVinoRunner(baseline, device=_device(bundle), threads=threads, counting=True)
        engine = bundle.engine_folder
        assert engine is not None, "a bundle for OpenVINO holds its network"
        nodes = {
            FP32: profile_network(counted, inputs, runs=5),
            QUANTIZED: profile_network(open_ir(engine, threads=threads, counting=True), inputs, runs=5),
        }
    else:
        nodes = {
            FP32: profile_nodes(baseline, inputs, runs=5, threads=threads),
            QUANTIZED: profile_nodes(bundle.graph, inputs, runs=5, threads=threads, config=bundle.session_config),
        }
    times = {side: by_layer(found, names) for side, found in nodes.items()}
    layers = []
    for name in names:
        fp32, quantized = times[FP32][name] or None, times[QUANTIZED][name] or None
        ratio = None if fp32 is None or quantized is None else quantized / fp32
        layers.append({"layer": name, "fp32_ms": fp32, "quantized_ms": quantized, "ratio": ratio})
    # Peaks are ONNX Runtime's, and so is the way that integer operators are told from others.
    peaks = measure_peaks(threads) if own == ONNXRUNTIME else None
    return {
        "layers": layers,
        "peaks": None if peaks is None else asdict(peaks),
        "operators": {
            side: [
                asdict(row) | ({} if peaks is None else place(row, peaks)) for row in by_operator(found)[:_OPERATORS]
            ]
            for side, found in nodes.items()
        },
    }


def _open_float(bundle: Bundle, runtime: str, graph: Path, threads: int | None) -> Runner:
    """The float graph in one runtime, on the device that the bundle runs on."""
    if runtime == ONNXRUNTIME:
        return OrtRunner(graph, threads=threads)
    return OpenVinoRunner(graph, device=_device(bundle), threads=threads)


def _device(bundle: Bundle) -> str:
    """The device that the bundle's network was built for; the CPU for every other bundle."""
    engine = bundle.manifest.get("engine")
    return str(engine["arch"]).upper() if engine and bundle.manifest["target"] == Target.OPENVINO else "CPU"


def _load(build: Build) -> LoadedModel:
    try:
        return build.model
    except ModelError as error:
        raise ModelError(
            f"the float model of {build.output} cannot be loaded: {error.message}",
            hint="say with --model where it is now",
        ) from error
