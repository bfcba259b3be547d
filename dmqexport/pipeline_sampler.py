"""The last training stage: through the sampler, on where whole trajectories end."""

from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file

from calib.sampling import CalibrationSet
from calib.trajectory_distill import distill_trajectories
from dmqexport.errors import RecipeError
from dmqexport.pipeline_calibrate import STAGE_VERSIONS
from dmqexport.pipeline_train import Training
from dmqexport.workspace import StageRecord


class SamplerTraining(Training):
    """Calibration and training, the sampler's stage last."""

    @property
    def trained_plan(self) -> StageRecord:
        """The last stage that made a plan."""
        return self.sampler_trained if self.recipe.training.sampler.iterations else super().trained_plan

    def prepare_sampler(self, trains: bool) -> None:
        """Draw what is trained towards or judged by, if anything is; RecipeError for a scheduler that has noise of its
        own. trains: whether there will be training at all."""
        if self.reallocates and self.recipe.quantization.rounding != "second-order":
            raise RecipeError(
                "allocation.trajectories judges weights by the codes of second-order rounding, and "
                f"quantization.rounding is {self.recipe.quantization.rounding}",
                hint="--set quantization.rounding=second-order, or --set allocation.trajectories=0",
            )
        if self.reallocates or (trains and self.recipe.training.sampler.iterations):
            _ = self.trajectory_ends

    @cached_property
    def sampler_trained(self) -> StageRecord:
        """Plan and codes after training through the sampler; those before it when no trial was better."""
        sampler = self.recipe.training.sampler
        before = super().trained_plan
        key = {
            "version": STAGE_VERSIONS["sampler"],
            "plan": before.fingerprint,
            "data": self.trajectory_ends.fingerprint,
            "options": self.shared_options(),
            "sampler": sampler.model_dump(mode="json", exclude={"recompute"}),
            "seed": self.recipe.seed,
        }

        def build(folder: Path) -> None:
            starts = CalibrationSet.load(self.trajectory_ends.path / "starts.safetensors")
            finished = load_file(str(self.trajectory_ends.path / "finished.safetensors"))["finished"]
            options = self.train_options(sampler.weights, sampler.rank, sampler.rates, sampler.optimizer)
            with self.trainable(before, options) as model, self.workspace.partial("sampler", key) as scratch:
                result = distill_trajectories(
                    model,
                    starts,
                    finished,
                    self.finish,
                    names=None,
                    iterations=sampler.iterations,
                    batch_size=sampler.batch_size,
                    held_out=sampler.held_out,
                    seed=self.recipe.seed,
                    checkpoint=scratch / "checkpoint.pt",
                    progress=self.workspace.reporter.progress,
                    ranks=self.workspace.ranks,
                )
                document = {"kept": result.kept, "held_out_db": result.held_out, "losses": result.losses}
                self.keep_trained(model, folder / "sampler.json", document)

        return self.workspace.stage("sampler", key, build, shared=True)
