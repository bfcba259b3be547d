"""dmqexport beside the peers: a bundle, as `dmqexport build` writes it, and what it cost."""

from pathlib import Path

from peer_job import Job, Result, main

PACKAGES = {"dmqexport": "dmqexport"}


def build(job: Job) -> Result:
    """setting: recipe, target, and further keys of the recipe. The stages that judge are not counted."""
    from dmqexport.pipeline import Build
    from dmqexport.pipeline_ablate import cost
    from dmqexport.pipeline_bundle import run_build
    from dmqexport.recipe import load_recipe
    from dmqexport.workspace import SilentReporter, Workspace

    keys = {"model": job.judge["model"], "bits": job.bits, "target": job.setting["target"]}
    # The judge of the comparison does the judging.
    quick = ("validation.retrieval=0", "validation.images=1", "validation.entries=16", "validation.layer_entries=16")
    own = [item for item in job.judge["settings"] if not item.startswith("validation.")]
    recipe = load_recipe(job.setting["recipe"], keys, [*own, *job.setting.get("set", ()), *quick])
    workspace = Workspace(Path(job.judge["work"]), SilentReporter())
    try:
        result = run_build(Build(recipe, job.output / "bundle", workspace))
        seconds, peak = cost([record for record in workspace.records if record.name != "validate"])
    finally:
        workspace.close()
    runtime = "openvino" if job.setting["target"] == "openvino" else "onnxruntime"
    return Result(runtime, result.path, seconds=seconds, peak_bytes=peak, note=job.setting.get("note", ""))


if __name__ == "__main__":
    main(build, PACKAGES)
