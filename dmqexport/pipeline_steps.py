"""What each sampling step's quantization error does to the finished picture, measured with the error itself.

An error of the predicted noise counts differently at every step, and real quantization errors otherwise than white
noise: they repeat from step to step and from picture to picture. So every step in turn is answered by the quantized
model, all others by the float model; the pictures tell the rest. On the bundled model, the last step but one does
more harm than all others together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from calib.probe import removing
from calib.quantizer import simulate
from dmqexport.errors import CalibrationError
from dmqexport.models.loading import LoadedModel
from dmqexport.models.sampling import sample_images
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_weights import QuantWeights
from dmqexport.ranks import ALONE, Ranks, share

_ROUNDING = 1 / 12  # variance of rounding to the 8 bits of a picture: an error below that is not seen at all


@dataclass(frozen=True)
class StepErrors:
    """pictures: squared error of the pictures (0 to 255) with only that step quantized, [steps], the geometric mean
    over pictures, as in a mean PSNR: a single picture that tips into another one would drown all others. noise: mean
    squared error of the predicted noise, guided where the model is, [steps]."""

    pictures: list[float]
    noise: list[float]

    @property
    def weights(self) -> list[float]:
        """Error of the pictures for one unit of squared error of the predicted noise, [steps], mean 1."""
        return _mean_one(
            [
                max(picture - _ROUNDING, 0.1 * _ROUNDING) / noise
                for picture, noise in zip(self.pictures, self._noise, strict=True)
            ]
        )

    @property
    def shares(self) -> list[float]:
        """How much of the finished picture's error each step is answerable for, [steps], sum 1.

        Amplitudes, not squares: errors of a picture's steps are alike and add up, so that what a step's error costs
        is its own amplitude times that of all.
        """
        amplitudes = [max(picture - _ROUNDING, 0.1 * _ROUNDING) ** 0.5 for picture in self.pictures]
        return [amplitude / sum(amplitudes) for amplitude in amplitudes]

    @property
    def training_weights(self) -> list[float]:
        """What a step's squared error counts when it is trained, [steps]: by `shares`, each step's error measured in
        what it is untrained, so that the weighted sum over steps begins near 1."""
        count = len(self.pictures)
        return [share * count / noise for share, noise in zip(self.shares, self._noise, strict=True)]

    @property
    def _noise(self) -> list[float]:
        return [max(noise, 1e-12) for noise in self.noise]


def _mean_one(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value / mean for value in values]


def measure_step_errors(
    loaded: LoadedModel,
    plan: QuantPlan,
    codes: QuantWeights,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> StepErrors:
    """Sample the pictures of `seeds` as one batch, once in float and once for each call of the denoiser, quantized.

    A step is a call here, as in recorded trajectories: multi-step samplers make more calls than `steps`. ranks:
    processes that share the steps. Raises CalibrationError when the sampler calls the denoiser another number of times
    with a quantized step.
    """
    state = {"calls": 0, "quantized": -1, "inside": 0}
    noise: list[float] = []  # of the steps that this rank quantizes

    def replace(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if state["inside"]:
            return output
        current, state["calls"] = state["calls"], state["calls"] + 1
        if current != state["quantized"]:
            return output
        state["inside"] = 1
        try:
            with simulate(module, plan, codes):
                answer = module(*args, **kwargs)
        finally:
            state["inside"] = 0
        noise.append(_guided_error(answer[0] - output[0].to(answer[0].device), len(seeds), guidance))
        return answer

    def sample(quantized: int) -> np.ndarray[Any, Any]:
        state.update(calls=0, quantized=quantized)
        texts = None if prompts is None else list(prompts)
        result = sample_images(loaded, texts, seeds, steps=steps, guidance=guidance, batch_size=len(seeds))
        if quantized >= 0 and state["calls"] != calls:
            raise CalibrationError(
                f"the sampler called its denoiser {state['calls']} times with step {quantized} quantized, "
                f"{calls} times in float",
                hint="steps of such a sampler cannot be weighed: --set training.network.step_weights=equal"
                " --set quantization.row_bits=even",
            )
        return result.images.astype(np.float64)

    calls = 0
    with removing([loaded.denoiser.register_forward_hook(replace, with_kwargs=True)]):
        reference = sample(-1)
        calls = state["calls"]
        found = np.zeros((2, calls))  # pictures, noise
        for done, step in enumerate(share(ranks, range(calls)), start=1):
            error = ((sample(step) - reference) ** 2).mean(axis=(1, 2, 3)) + _ROUNDING
            found[:, step] = np.exp(np.log(error).mean()), noise[-1]
            if progress is not None:
                progress(min(done * ranks.size, calls), calls)
    pictures, errors = ranks.total(found).tolist()
    return StepErrors(pictures, errors)


def _guided_error(error: Tensor, pictures: int, guidance: float) -> float:
    if len(error) == 2 * pictures:
        unconditional, conditional = error.chunk(2)
        error = unconditional + guidance * (conditional - unconditional)
    return float(error.square().mean())
