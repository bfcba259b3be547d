"""Time a bundle's graph against the float graph it came from."""

from pathlib import Path
from typing import Any

from dmqexport.bundle import RECIPE, Bundle
from dmqexport.errors import BundleError, ModelError
from dmqexport.models.loading import LoadedModel
from dmqexport.pipeline import Build
from dmqexport.recipe import load_recipe
from dmqexport.runtime import check_machine, open_runner
from dmqexport.target import Target
from dmqexport.workspace import Reporter, Workspace
from engines.bench import interleaved
from engines.openvino_ir import OpenVinoRunner
from engines.ort import OrtRunner, available_cores
from engines.runner import Runner


def bench_bundle(
    bundle: Bundle,
    batch: int,
    runs: int,
    threads: int | None,
    reporter: Reporter,
    *,
    model: str | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """Median milliseconds of FP32 and quantized in the bundle's runtime, on the same random inputs, and their ratio.

    The float graph is exported again from the model (`model`, else the one the recipe names), or reused from the work
    folder (`work`, else the one beside the bundle). Raises BundleError when that model is not the one the bundle was
    built from, ModelError when it is gone.
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
        runners = {
            "fp32": _open_float(bundle, build.float_baseline, threads),
            "quantized": open_runner(bundle, threads),
        }
    finally:
        workspace.close()
    result = interleaved(runners, inputs, runs=runs)
    return {
        "fp32_ms": result.median_ms["fp32"],
        "quantized_ms": result.median_ms["quantized"],
        "ratio": result.ratio("quantized", "fp32"),
        "batch": batch,
        "threads": threads or available_cores(),
        "runs": result.runs,
    }


def _open_float(bundle: Bundle, graph: Path, threads: int | None) -> Runner:
    """The float graph in the runtime that the bundle runs in."""
    if bundle.manifest["target"] == Target.OPENVINO:
        return OpenVinoRunner(graph, device=str(bundle.manifest["engine"]["arch"]).upper(), threads=threads)
    return OrtRunner(graph, threads=threads)


def _load(build: Build) -> LoadedModel:
    try:
        return build.model
    except ModelError as error:
        raise ModelError(
            f"the float model of {build.output} cannot be loaded: {error.message}",
            hint="say with --model where it is now",
        ) from error
