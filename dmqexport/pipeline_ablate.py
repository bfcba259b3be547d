"""One run of an ablation: plan as a recipe says, judge the simulated plan beside the float model, write what was found.

Simulation is deployment here: the tests prove that the graph computes the codes that `calib.quantizer` simulates, so
that a method is judged without exporting it. `dmqexport.ablate` starts `python -m dmqexport.pipeline_ablate JOB`.
"""

import json
import logging
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.quantizer import simulate
from dmqexport.errors import DmqExportError, RecipeError
from dmqexport.memory_watch import own_peak_bytes
from dmqexport.models.sampling import sample_images, set_denoiser
from dmqexport.pipeline import Build
from dmqexport.pipeline_validate import Array, Validation, sqnr_db
from dmqexport.recipe import Recipe
from dmqexport.report.ablation import save_strip
from dmqexport.workspace import SilentReporter, StageRecord, Workspace

SHOWN_PICTURES = 8
_NOISE_VERSION = 1
#: Stages that judge; everything else is the method's own cost.
_JUDGING = ("reference", "features", "noise")


class Judge:
    """Compares a denoiser with the float model on the validation's pictures and trajectory points."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        """recipe: which model, sampling and validation; `work` keeps the float model's side of it."""
        # The bundle is never written; its name only has to be free.
        build = Build(recipe, work / "ablation-bundle", Workspace(work, SilentReporter()))
        self.build = build
        self.validation = Validation(build)

    def prepare(self) -> None:
        """Compute the float side, before any method's factors are folded into the model's weights."""
        _ = self.validation.reference, self.noise
        if self.validation.judges_frechet:
            _ = self.validation.training_features

    @cached_property
    def noise(self) -> Tensor:
        """The float model's predicted noise on every evaluation point, float32 [entries, ...]."""
        build, validation = self.build, self.validation
        entries = validation.reference.entries
        key = {
            "version": _NOISE_VERSION,
            "reference": validation.referenced.fingerprint,
            "entries": validation.size.entries,
            "seed": build.recipe.seed,
        }

        def run(folder: Path) -> None:
            np.save(folder / "noise.npy", self.predict(build.model.denoiser).numpy())

        assert len(entries)
        return torch.from_numpy(np.load(build.workspace.stage("noise", key, run).path / "noise.npy"))

    def predict(self, denoiser: nn.Module) -> Tensor:
        """Predicted noise of `denoiser` on every evaluation point, float32 [entries, ...]."""
        build, entries = self.build, self.validation.reference.entries
        with torch.no_grad():
            parts = [
                build.model.family.call(denoiser, inputs)
                for _, inputs in entries.batches(self.validation.size.batch_size)
            ]
        return torch.cat(parts)

    def judge(self, denoiser: Any) -> tuple[dict[str, Any], Array]:
        """(metrics, pictures uint8 [n, H, W, 3]) of `denoiser`, which takes the place of the pipeline's for the while.

        It is called as diffusers calls a UNet, and needs `config` and `dtype` as one.
        """
        build, validation = self.build, self.validation
        reference, expected = validation.reference, self.noise.double()
        error = self.predict(denoiser).double() - expected
        pipeline = build.model.pipeline
        original = getattr(pipeline, build.model.family.component)
        set_denoiser(pipeline, denoiser)
        try:
            images = sample_images(
                build.model,
                reference.prompts or None,
                reference.seeds,
                steps=build.steps,
                guidance=build.guidance,
                batch_size=validation.size.batch_size,
            ).images
        finally:
            set_denoiser(pipeline, original)
        sqnr = sqnr_db(float(expected.square().sum()), float(error.square().sum()))
        return {"eps_sqnr_db": sqnr, **validation.picture_metrics(reference, images)}, images


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Do one run. job: as `dmqexport.ablate` writes it; returns the result's document, and writes the picture strip."""
    recipe, judged_by = Recipe.model_validate(job["recipe"]), Recipe.model_validate(job["judged_by"])
    work, result = Path(job["work"]), Path(job["result"])
    for key in ("model", "revision", "lora", "sampling"):
        own, expected = getattr(recipe, key), getattr(judged_by, key)
        if own != expected:
            raise RecipeError(
                f"recipe key {key!r} is {own!r}, but pictures are judged by {expected!r}",
                hint="every method must quantize the same model and sample it alike: leave the key out of the method",
            )
    judge = Judge(judged_by, work)
    judge.prepare()
    pictures = result.with_suffix(".png")
    document: dict[str, Any] = {name: job[name] for name in ("key", "method", "bits", "seed")}
    document["pictures"] = pictures.name
    if job["method"] is None:
        reference = judge.validation.reference
        save_strip(reference.images[:SHOWN_PICTURES], pictures)
        captions = reference.prompts[:SHOWN_PICTURES] or [f"seed {seed}" for seed in reference.seeds[:SHOWN_PICTURES]]
        metrics = judge.validation.picture_metrics(reference, reference.images)
        return {**document, "metrics": metrics, "captions": captions, "seconds": 0.0, "peak_rss_bytes": None}
    build = Build(recipe, work / "ablation-bundle", Workspace(work, SilentReporter()))
    build.model = judge.build.model  # one copy in memory; its float side was measured before the folds of `plan`
    plan = build.plan
    with simulate(build.model.denoiser, plan, build.weights):
        metrics, images = judge.judge(build.model.denoiser)
    save_strip(images[:SHOWN_PICTURES], pictures)
    seconds, peak = cost(build.workspace.records)
    allocation = plan.allocation
    return {
        **document,
        "metrics": metrics,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "average_bits": {
            "weight": allocation.average_weight_bits if allocation is not None else None,
            "activation": allocation.average_activation_bits if allocation is not None else None,
        },
        "quantized_layers": len(plan.layers),
        "float_layers": dict(plan.float_layers),
        "plan_fingerprint": plan.fingerprint,
        "stages": [
            {"name": record.name, "seconds": record.built_seconds, "cached": record.cached}
            for record in build.workspace.records
        ],
        "recipe": job["recipe"],
    }


def cost(records: Sequence[StageRecord]) -> tuple[float | None, int | None]:
    """(seconds, peak of the resident set in bytes) of a method from the bare model to its plan.

    Shared stages count in full, as if the method had been run alone; None where a stage does not know its cost.
    """
    own = {record.fingerprint: record for record in records if record.name not in _JUDGING}
    seconds = [record.built_seconds for record in own.values()]
    peaks = [record.built_peak_rss_bytes for record in own.values()]
    return (
        sum(value for value in seconds if value is not None) if seconds and None not in seconds else None,
        max((value for value in peaks if value is not None), default=None),
    )


def main(arguments: Sequence[str]) -> int:
    """Run the job file that is named, write its result; errors go to standard error, `error: ...`."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        document = run_job(job)
    except DmqExportError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    document["process_peak_rss_bytes"] = own_peak_bytes()
    result = Path(job["result"])
    partial = result.with_name(result.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
