"""Time a bundle's graph against the float graph it came from."""

from pathlib import Path
from typing import Any

from dmqexport.bundle import RECIPE, Bundle
from dmqexport.errors import BundleError
from dmqexport.pipeline import Build
from dmqexport.recipe import load_recipe
from dmqexport.runtime import check_machine
from dmqexport.workspace import Reporter, Workspace
from engines.bench import interleaved
from engines.ort import OrtRunner, available_cores


def bench_bundle(bundle: Bundle, batch: int, runs: int, threads: int | None, reporter: Reporter) -> dict[str, Any]:
    """Median milliseconds of FP32 and quantized ONNX Runtime on the same random inputs, interleaved, and their ratio.

    The float graph is exported again from the model the recipe names, or reused from the build's work folder. Raises
    BundleError when that model is no longer the one the bundle was built from.
    """
    check_machine(bundle)
    work = bundle.path.with_name(bundle.path.name + ".work")
    build = Build(load_recipe(bundle.path / RECIPE, {}, []), bundle.path, Workspace(Path(work), reporter))
    if build.model.fingerprint != bundle.manifest["model"]["fingerprint"]:
        raise BundleError(
            f"{bundle.path}: the model {build.model.source!r} has changed since the build",
            hint="rebuild the bundle from the present model",
        )
    inputs = {name: value.numpy() for name, value in build.model.example_inputs(batch=batch).items()}
    runners = {
        "fp32": OrtRunner(build.float_graph, threads=threads),
        "quantized": OrtRunner(bundle.graph, threads=threads, config=bundle.session_config),
    }
    result = interleaved(runners, inputs, runs=runs)
    return {
        "fp32_ms": result.median_ms["fp32"],
        "quantized_ms": result.median_ms["quantized"],
        "ratio": result.ratio("quantized", "fp32"),
        "batch": batch,
        "threads": threads or available_cores(),
        "runs": result.runs,
    }
