"""A sampling loop for a denoiser without its pipeline: bare denoisers, classes, and modules of the user's own.

It does what diffusers pipelines do between encoding the prompt and decoding the latents, in the same order, so that a
float trajectory comes out right for any family.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from dmqexport.models.family import Family


class DenoisingLoop(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Classifier-free guided sampling of latents from ready-made conditions."""

    def __init__(self, family: Family, denoiser: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, **{family.component: denoiser})
        self._family = family

    def __call__(
        self,
        conditions: Mapping[str, Tensor],
        null_conditions: Mapping[str, Tensor] | None,
        shape: tuple[int, ...],
        generator: list[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput:
        """Latents of `len(generator)` samples, each from its own noise; `.images` is float32 [batch, *shape].

        conditions: the denoiser's inputs beside sample and timestep, [batch, ...]; null_conditions: those of the
        unguided half, None for models that take no classifier-free guidance.
        """
        family, scheduler = self._family, self.scheduler
        guided = guidance_scale > 1 and null_conditions is not None
        noise = [torch.randn(shape, generator=one) for one in generator]
        latents = torch.stack(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
        every = dict(conditions)
        if guided and null_conditions is not None:
            every = {name: torch.cat([null_conditions[name], value]) for name, value in conditions.items()}
        extra = {"generator": generator} if type(scheduler).__name__ in ("DDPMScheduler", "LCMScheduler") else {}
        call = partial(family.call, getattr(self, family.component))
        latents = self.denoise(latents, every, num_inference_steps, guidance_scale if guided else None, call, **extra)
        return ImagePipelineOutput(images=latents)

    def denoise(
        self,
        latents: Tensor,
        conditions: Mapping[str, Tensor],
        steps: int,
        guidance: float | None,
        call: Callable[[Mapping[str, Tensor]], Tensor],
        **extra: Any,
    ) -> Tensor:
        """Finished latents, [batch, ...], from those of the first step; differentiable where `call` is.

        conditions: [batch, ...], or [2 batch, ...], the unguided half first, when `guidance` is given; call: the
        denoiser, from its inputs by name; extra: what the scheduler's steps take beyond their three arguments.
        """
        family, scheduler = self._family, self.scheduler
        self._set_timesteps(steps, tuple(latents.shape[1:]))
        for t in self.progress_bar(scheduler.timesteps):
            model_input = latents if guidance is None else torch.cat([latents, latents])
            if hasattr(scheduler, "scale_model_input"):
                model_input = scheduler.scale_model_input(model_input, t)
            timestep = torch.as_tensor(t).reshape(1).expand(len(model_input))
            if family.timestep_scale != 1.0:
                timestep = timestep / family.timestep_scale
            prediction = call({family.input_names[0]: model_input, "timestep": timestep, **conditions})
            if family.prediction_channels is not None:
                prediction = prediction[:, : family.prediction_channels]
            if guidance is not None:
                without, with_condition = prediction.chunk(2)
                prediction = without + guidance * (with_condition - without)
            latents = scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]
        return latents

    def _set_timesteps(self, steps: int, shape: tuple[int, ...]) -> None:
        config = self.scheduler.config
        if config.get("use_dynamic_shifting"):
            # The shift of the noise schedule grows with the number of image tokens (FLUX, SD 3.5).
            patch = int(getattr(getattr(self, self._family.component).config, "patch_size", 2))
            tokens = shape[0] if len(shape) == 2 else shape[1] * shape[2] // patch**2
            keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            mu = calculate_shift(tokens, *(config.get(key) for key in keys))
            self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
        else:
            self.scheduler.set_timesteps(steps)
