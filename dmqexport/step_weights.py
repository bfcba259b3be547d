"""How much each sampling step's error counts in the finished picture, measured on the float model.

Distillation with equal weights spends most of its effort where the predicted noise is hardest, not where the picture
suffers. Here every step in turn gets the same small disturbance of its predicted noise; what that does to the pictures
is the step's weight. On the bundled model the last step but one weighs nine times the mean.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.probe import removing
from dmqexport.errors import CalibrationError
from dmqexport.models.loading import LoadedModel
from dmqexport.models.sampling import sample_images

_DISTURBANCE = 0.15  # of the predicted noise's own size: what 4-bit quantization does to it
_ROUNDING = 1 / 12  # variance of rounding to the 8 bits of a picture: an error below that is not seen at all


def measure_step_weights(
    loaded: LoadedModel,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Mean squared error of the pictures for equal disturbances of each step, divided by its mean over steps.

    Both guidance halves get the same disturbance, so that the guided combination gets exactly it. Returns `steps`
    values of mean 1. Raises CalibrationError when the sampler calls the denoiser another number of times.
    """
    calls, disturbed = 0, -1

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        current, calls = calls % steps, calls + 1
        if current != disturbed:
            return output
        predicted: Tensor = output[0]
        halves = max(1, len(predicted) // max(1, batch))
        generator = torch.Generator().manual_seed(current)
        noise = torch.randn(predicted[: len(predicted) // halves].shape, generator=generator)
        return (predicted + _DISTURBANCE * predicted.std() * noise.repeat(halves, *[1] * (noise.ndim - 1)), *output[1:])

    batch = min(batch_size, len(seeds))
    seeds = seeds[: len(seeds) - len(seeds) % batch]  # whole batches: a call is told by its number

    def sample() -> np.ndarray[Any, Any]:
        nonlocal calls
        calls = 0
        texts = None if prompts is None else list(prompts[: len(seeds)])
        images = sample_images(loaded, texts, seeds, steps=steps, guidance=guidance, batch_size=batch).images
        if calls != steps * (len(seeds) // batch):
            raise CalibrationError(
                f"the sampler called its denoiser {calls} times for {len(seeds) // batch} batches of {steps} steps",
                hint="multi-step samplers cannot be weighed: --set training.network.step_weights=equal",
            )
        return images.astype(np.float64)

    weights = []
    with removing([loaded.denoiser.register_forward_hook(disturb)]):
        reference = sample()
        for disturbed in range(steps):
            weights.append(float(((sample() - reference) ** 2).mean()) + _ROUNDING)
            if progress is not None:
                progress(disturbed + 1, steps)
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]
