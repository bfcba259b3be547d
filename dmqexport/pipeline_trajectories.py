"""Whole trajectories of the float model, and the loop that draws them again with a gradient."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calib.network_distill import guidance_pairs
from calib.sampling import CalibrationSet
from calib.trajectory_distill import first_calls
from dmqexport.errors import RecipeError
from dmqexport.pipeline_calibrate import Calibration
from dmqexport.pipeline_parts import make_parts
from dmqexport.workspace import StageRecord

TRAINING_SEED = 2_000_000  # far from those of calibration and of evaluation

#: Of the latents' own size: how far the loop that is run through may be from the pipeline it stands for.
_REPLAYED = 1e-3


class Drawing(Calibration):
    """Calibration that can draw whole trajectories with a gradient through every step of the sampler."""

    @property
    def kept_stride(self) -> int | None:
        """Of the calls along `trajectory_ends`, every so many-th is kept to fit or train on; None: none is."""
        return None

    @cached_property
    def trajectory_ends(self) -> StageRecord:
        """First calls of float trajectories, `starts.safetensors`, what they end in, `finished.safetensors`, and with a
        `kept_stride` calls along them, `calibration.safetensors`."""
        recipe, stride = self.recipe, self.kept_stride
        count = recipe.training.trajectories
        prompts = self.prompts_for(count)
        key = {
            **self.base_key("trajectory-ends"),
            "prompts": prompts,
            "size": count,
            "seed": recipe.seed,
            **({} if stride is None else {"stride": stride}),
        }

        def build(folder: Path) -> None:
            ranks, batch = self.workspace.ranks, self.batch_size
            first_seed = TRAINING_SEED + recipe.seed * 100_003

            def make(number: int, path: Path) -> None:
                start, stop = number * batch, min((number + 1) * batch, count)
                with self.computing():  # what is trained towards is float32, whatever calibration.dtype says
                    with _last_step(self.model.pipeline.scheduler) as ends:
                        data = self.recorded(start, stop, prompts, first_seed)
                    starts = data.at(torch.nonzero(data.step == 0).flatten())
                    finished = ends[-1].cpu()
                    if number == 0:
                        self._check_replay(data, starts, finished)
                starts.save(path.with_suffix(".starts"))
                if stride is not None:
                    data.thinned(stride).save(path.with_suffix(".calls"))
                save_file({"finished": finished.contiguous()}, str(path))

            with self.workspace.partial("trajectory-ends", key) as scratch:
                progress = self.workspace.reporter.progress
                parts = make_parts(ranks, scratch, f"by-{batch}", -(-count // batch), make, progress)
                if ranks.rank == 0:
                    pieces = [CalibrationSet.load(part.with_suffix(".starts")) for part in parts]
                    CalibrationSet.concatenate(pieces).save(folder / "starts.safetensors")
                    finished = torch.cat([load_file(str(part))["finished"] for part in parts])
                    save_file({"finished": finished}, str(folder / "finished.safetensors"))
                    if stride is not None:
                        pieces = [CalibrationSet.load(part.with_suffix(".calls")) for part in parts]
                        CalibrationSet.concatenate(pieces).save(folder / "calibration.safetensors")

        return self.workspace.stage("trajectory-ends", key, build, shared=True)

    def finish(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Draw whole trajectories from the inputs of their first calls, with a gradient where one is asked for."""
        return self._draw(inputs, [])

    def _draw(self, inputs: Mapping[str, Tensor], seen: list[Tensor]) -> Tensor:
        """As `finish`; `seen` receives what every call gets as its sample."""
        family = self.model.family
        sample = family.input_names[0]
        guided = self._guided(inputs)
        count = len(inputs[sample]) // (2 if guided else 1)
        # Late: it loads a whole pipeline of diffusers, whose notices the loading of a model keeps quiet.
        from dmqexport.models.denoising_loop import DenoisingLoop

        loop = DenoisingLoop(family, self.model.denoiser, copy.deepcopy(self.model.pipeline.scheduler))
        loop.set_progress_bar_config(disable=True)
        answer = partial(family.call, self.model.denoiser)

        def call(named: Mapping[str, Tensor]) -> Tensor:
            seen.append(named[sample].detach())
            if self.recipe.training.sampler.recompute and torch.is_grad_enabled():
                found: Tensor = checkpoint(answer, named, use_reentrant=False)
                return found
            return answer(named)

        return loop.denoise(
            inputs[sample][:count],
            {name: value for name, value in inputs.items() if name not in (sample, "timestep")},
            self.steps,
            self.guidance if guided else None,
            call,
        )

    def _guided(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the first half of a batch is the unguided one of the second: they start from the same noise."""
        sample = inputs[self.model.family.input_names[0]]
        half = len(sample) // 2
        return self.guidance > 1 and len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])

    def _check_replay(self, data: CalibrationSet, starts: CalibrationSet, finished: Tensor) -> None:
        """RecipeError when the loop that is trained through does not draw what the pipeline drew, call by call.

        A sampler that adds noise on the way, scales its input, or changes the prediction in a way of its own cannot be
        trained through.
        """
        seen: list[Tensor] = []
        with torch.no_grad():
            found = self._draw(first_calls(starts, guidance_pairs(starts)), seen)
        sample = self.model.family.input_names[0]
        calls = [data.at(torch.nonzero(data.step == step).flatten()) for step in range(len(seen))]
        expected = [first_calls(at, guidance_pairs(at))[sample] if len(at) else seen[0][:0] for at in calls]
        for step, (own, other) in enumerate(zip([*seen, found], [*expected, finished], strict=True)):
            apart = _distance(own, other)
            if not apart < _REPLAYED:
                pipeline, scheduler = (type(it).__name__ for it in (self.model.pipeline, self.model.pipeline.scheduler))
                raise RecipeError(
                    f"training.sampler, allocation.trajectories: {pipeline} with {scheduler} draws otherwise than a "
                    f"plain loop over the scheduler's steps: {apart:.2g} of the latents' size apart before step {step}",
                    hint="it takes a scheduler without noise of its own and without scaled inputs, such as ddim, "
                    "dpmsolver++ or a flow-matching one; or set both to 0, training.sampler by its iterations",
                )


@contextmanager
def _last_step(scheduler: Any) -> Iterator[list[Tensor]]:
    """What the scheduler's latest step gave, in a list of one, while a pipeline draws."""
    ends: list[Tensor] = []
    original = scheduler.step

    @wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = original(*args, **kwargs)
        ends[:] = [given[0]]
        return given

    scheduler.step = step
    try:
        yield ends
    finally:
        del scheduler.step


def _distance(found: Tensor, expected: Tensor) -> float:
    """Root of the squared distance by that of the expected; infinite when shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    power: Any = expected.double().square().sum().clamp_min(1e-20)
    return float(((found.double() - expected.double()).square().sum() / power).sqrt())
