"""Time a bundle's graph against the float graph it came from: the whole model, a trajectory, every layer."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dmqexport.bundle import RECIPE, Bundle
from dmqexport.errors import BundleError, ModelError
from dmqexport.models.loading import LoadedModel
from dmqexport.pipeline import Build
from dmqexport.recipe import load_recipe
from dmqexport.runtime import check_machine, open_runner
from dmqexport.target import Target
from dmqexport.workspace import Reporter, Workspace
from engines import openvino_ir
from engines.bench import LatencyResult, interleaved, interleaved_trajectories
from engines.memory import peak_memory
from engines.openvino_ir import OpenVinoRunner
from engines.ort import OrtRunner, available_cores
from engines.ort_profile import NodeTime, by_layer, by_operator, profile_nodes
from engines.runner import Runner

FP32, QUANTIZED = "fp32", "quantized"
#: Rows of an operator table; the rest is below a hundredth of the time together.
_OPERATORS = 24


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

    The float graph is exported again from the model (`model`, else the one the recipe names), or reused from the work
    folder (`work`, else the one beside the bundle). It has every rewrite of the quantized one but the integers.

    details: also the float graph in every other runtime that is installed, peak memory, a whole trajectory, and in
    ONNX Runtime the time of every layer and a roofline table of operators.

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
        baseline, floats = build.float_baseline, {"onnxruntime": build.float_baseline, "openvino": build.float_graph}
    finally:
        workspace.close()
    peaks: dict[str, int | None] = {}
    runners: dict[str, Runner] = {}
    own = "openvino" if bundle.manifest["target"] == Target.OPENVINO else "onnxruntime"
    others = [name for name in _runtimes() if name != own] if details else []
    for name in (FP32, QUANTIZED, *others):
        with peak_memory() as peak:
            if name == QUANTIZED:
                runners[name] = open_runner(bundle, threads)
            elif name == FP32:
                runners[name] = _open_float(bundle, own, baseline, threads)
            else:
                runners[name] = _open_float(bundle, name, floats[name], threads)
            runners[name].run(inputs)
        peaks[name] = peak.grown
    result = interleaved(runners, inputs, runs=runs)
    document = {**_times(result), "batch": batch, "threads": threads or available_cores(), "runs": result.runs}
    if details:
        document["runtimes"] = [
            {
                "runtime": own if name in (FP32, QUANTIZED) else name,
                "precision": str(bundle.manifest["bits"]) if name == QUANTIZED else FP32,
                "median_ms": result.median_ms[name],
                "minimum_ms": result.minimum_ms[name],
                "processor_ms": result.processor_ms[name],
                "ratio": result.ratio(name, FP32),
                "peak_memory_bytes": peaks[name],
            }
            for name in runners
        ]
        document["trajectory"] = _trajectory(bundle, {name: runners[name] for name in (FP32, QUANTIZED)}, inputs)
        document |= (
            _parts(bundle, baseline, inputs, threads) if own == "onnxruntime" else {"layers": [], "operators": {}}
        )
    return document


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
    """One call a sampling step, every sample of the batch at the step's timestep, as pipelines call."""
    steps, last = int(bundle.manifest["sampling"]["steps"]), int(bundle.manifest["num_timesteps"]) - 1
    given = inputs["timestep"]
    calls = []
    for key in np.linspace(last, 0, steps):
        timestep = np.full(given.shape, round(float(key)) / bundle.plan.timestep_scale)
        calls.append({**inputs, "timestep": timestep.astype(given.dtype)})
    return {"steps": steps, **_times(interleaved_trajectories(runners, calls, runs=3))}


def _parts(
    bundle: Bundle, baseline: Path, inputs: Mapping[str, np.ndarray], threads: int | None
) -> dict[str, list[dict[str, Any]] | dict[str, list[dict[str, Any]]]]:
    """Time by layer and by operator, in both graphs; None where the runtime gave a layer's node another name.

    The convolution that makes the graph's output is such a one: it is named after that.
    """
    names = [layer.name for layer in bundle.plan.layers]
    nodes: dict[str, list[NodeTime]] = {
        FP32: profile_nodes(baseline, inputs, runs=5, threads=threads),
        QUANTIZED: profile_nodes(bundle.graph, inputs, runs=5, threads=threads, config=bundle.session_config),
    }
    times = {side: by_layer(found, names) for side, found in nodes.items()}
    layers = []
    for name in names:
        fp32, quantized = times[FP32][name] or None, times[QUANTIZED][name] or None
        ratio = None if fp32 is None or quantized is None else quantized / fp32
        layers.append({"layer": name, "fp32_ms": fp32, "quantized_ms": quantized, "ratio": ratio})
    return {
        "layers": layers,
        "operators": {side: [asdict(row) for row in by_operator(found)[:_OPERATORS]] for side, found in nodes.items()},
    }


def _runtimes() -> list[str]:
    """Names of the installed runtimes."""
    return ["onnxruntime"] + (["openvino"] if openvino_ir.version() is not None else [])


def _open_float(bundle: Bundle, runtime: str, graph: Path, threads: int | None) -> Runner:
    """The float graph in one runtime, on the device that the bundle runs on."""
    if runtime == "onnxruntime":
        return OrtRunner(graph, threads=threads)
    engine = bundle.manifest.get("engine")
    device = str(engine["arch"]).upper() if engine and bundle.manifest["target"] == Target.OPENVINO else "CPU"
    return OpenVinoRunner(graph, device=device, threads=threads)


def _load(build: Build) -> LoadedModel:
    try:
        return build.model
    except ModelError as error:
        raise ModelError(
            f"the float model of {build.output} cannot be loaded: {error.message}",
            hint="say with --model where it is now",
        ) from error
