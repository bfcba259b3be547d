"""Pictures from a loaded model, and the denoiser inputs on the way, the same whatever the batch size."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calib.sampling import CalibrationSet, TrajectoryRecorder
from dmqexport.errors import DmqExportError, ModelError, RecipeError, ResourceError
from dmqexport.models.assemble import is_out_of_memory
from dmqexport.models.loading import LoadedModel
from dmqexport.models.quiet import quiet

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all) after each batch."""

_EMBEDDING_STREAM: Final = 0x9E3779B9
_LATENT_RANGE: Final = 4.0


@dataclass(frozen=True)
class SampleResult:
    """images: uint8 [N, H, W, 3], in the order of the seeds. calibration: what was recorded, None when not asked."""

    images: npt.NDArray[np.uint8]
    calibration: CalibrationSet | None


def sample_images(
    loaded: LoadedModel,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int,
    record: bool = False,
    progress: Progress | None = None,
) -> SampleResult:
    """One picture a seed; every picture has its own generator, so that `batch_size` changes only rounding.

    prompts: one a seed; None takes the model's default prompts in turn; unconditional models take None only.
    record: also return the inputs of every denoiser call, ordered by (trajectory, step), trajectory = index of the
    seed; one entry for each guidance half. Grey pictures are repeated over RGB. Without an autoencoder or a text
    encoder, the first three latent channels are shown, [-4, 4] mapped to [0, 255].

    Raises RecipeError for arguments that cannot be used, ModelError when the pipeline refuses them or produces NaN,
    ResourceError when memory runs out.
    """
    _check(loaded, prompts, seeds, steps, guidance, batch_size)
    texts = _texts(loaded, prompts, len(seeds))
    pictures: list[npt.NDArray[np.uint8]] = []
    recorded: list[CalibrationSet] = []
    for first in range(0, len(seeds), batch_size):
        chunk = list(seeds[first : first + batch_size])
        arguments = _arguments(loaded, texts[first : first + batch_size], chunk, steps, guidance)
        recorder = _recorder(loaded, len(chunk), first) if record else None
        with quiet(), torch.no_grad(), recorder or nullcontext():
            raw = _call(loaded.pipeline, arguments)
        pictures.append(_pictures(raw, chunk, latent=arguments["output_type"] == "latent"))
        if recorder is not None:
            recorded.append(recorder.result())
        if progress is not None:
            progress(first + len(chunk), len(seeds))
    return SampleResult(np.concatenate(pictures), _ordered(recorded) if record else None)


def set_denoiser(pipeline: Any, component: Any) -> None:
    """Put `component` in the place of the pipeline's denoiser; it must offer `config` and `dtype` like the original.

    Raises ModelError when the pipeline has no denoiser to replace or `component` cannot stand in for it.
    """
    if not hasattr(pipeline, "unet"):
        raise ModelError(f"{type(pipeline).__name__} has no component 'unet' to replace")
    for needed in ("config", "dtype"):
        if not hasattr(component, needed):
            raise ModelError(f"{type(component).__name__} cannot replace the denoiser: it has no `{needed}`")
    if not callable(component):
        raise ModelError(f"{type(component).__name__} cannot replace the denoiser: it is not callable")
    pipeline.register_modules(unet=component)


def _check(
    loaded: LoadedModel, prompts: Sequence[str] | None, seeds: Sequence[int], steps: int, guidance: float, batch: int
) -> None:
    if not seeds:
        raise RecipeError("no seeds: at least one picture must be sampled")
    if not 1 <= steps <= loaded.num_train_timesteps:
        raise RecipeError(
            f"steps is {steps}, expected 1 to {loaded.num_train_timesteps}, the training timesteps of {loaded.name}"
        )
    if batch < 1:
        raise RecipeError(f"batch_size is {batch}, expected at least 1")
    if not np.isfinite(guidance):
        raise RecipeError(f"guidance is {guidance}, expected a finite number")
    if prompts is None:
        return
    if not loaded.default_prompts:
        raise RecipeError(f"{loaded.name} takes no prompts: it has no text encoder", hint="leave the prompts out")
    if len(prompts) != len(seeds):
        raise RecipeError(f"{len(prompts)} prompts for {len(seeds)} seeds, expected one prompt for each seed")


def _texts(loaded: LoadedModel, prompts: Sequence[str] | None, count: int) -> list[str]:
    if prompts is not None:
        return list(prompts)
    defaults = loaded.default_prompts
    return [defaults[index % len(defaults)] for index in range(count)] if defaults else []


def _arguments(loaded: LoadedModel, texts: list[str], seeds: list[int], steps: int, guidance: float) -> dict[str, Any]:
    """The pipeline's keyword arguments for one batch."""
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "np",
    }
    if texts:
        return {**arguments, "prompt": texts, "guidance_scale": guidance}
    if not loaded.random_embeddings:
        return {**arguments, "batch_size": len(seeds)}
    arguments.update(
        prompt_embeds=torch.stack([_random_embedding(loaded, seed) for seed in seeds]),
        guidance_scale=guidance,
        output_type="latent",
    )
    if guidance > 1:
        # The unconditional half is one fixed vector, as the embedding of the empty prompt would be.
        arguments["negative_prompt_embeds"] = _random_embedding(loaded, 0).expand(len(seeds), -1, -1)
    return arguments


def _random_embedding(loaded: LoadedModel, seed: int) -> Tensor:
    """Unit-normal [tokens, D], from a stream apart from the one that draws the picture's noise."""
    generator = torch.Generator().manual_seed(seed ^ _EMBEDDING_STREAM)
    config: Any = loaded.denoiser.config
    return torch.randn((loaded.tokens or 1, int(config.cross_attention_dim)), generator=generator)


def _recorder(loaded: LoadedModel, pictures: int, first: int) -> TrajectoryRecorder:
    denoiser = getattr(loaded.pipeline, loaded.family.component)
    if not isinstance(denoiser, nn.Module):
        raise ModelError(
            f"cannot record the inputs of {type(denoiser).__name__}: it is no torch module",
            hint="record with the float denoiser in the pipeline",
        )
    return TrajectoryRecorder(denoiser, loaded.family.input_names, pictures, first)


def _call(pipeline: Any, arguments: dict[str, Any]) -> npt.NDArray[np.float32]:
    """The pipeline's pictures, float [n, H, W, C] in [0, 1], or latents [n, C, H, W] as channels last."""
    try:
        images = pipeline(**arguments).images
    except DmqExportError:
        raise
    except (MemoryError, ValueError, TypeError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise ResourceError("not enough memory to sample", hint="lower the batch size") from error
        raise ModelError(
            f"{type(pipeline).__name__} failed while sampling: {type(error).__name__}: {error}",
            hint="try fewer pictures a batch or another scheduler",
        ) from error
    if isinstance(images, Tensor):
        images = images.permute(0, 2, 3, 1).float().cpu().numpy()
    return np.asarray(images, dtype=np.float32)


def _pictures(raw: npt.NDArray[np.float32], seeds: list[int], *, latent: bool) -> npt.NDArray[np.uint8]:
    bad = [seed for seed, picture in zip(seeds, raw, strict=True) if not np.isfinite(picture).all()]
    if bad:
        raise ModelError(
            f"the pipeline produced NaN or infinity in the picture of seed {bad[0]} ({len(bad)} of {len(seeds)})",
            hint="check the weights, the scheduler and the number of steps",
        )
    channels = raw.shape[-1]
    if channels == 1:
        raw = np.repeat(raw, 3, axis=-1)
    elif channels == 2:
        raw = np.concatenate([raw, np.zeros_like(raw[..., :1])], axis=-1)
    raw = raw[..., :3]
    if latent:
        raw = raw / (2 * _LATENT_RANGE) + 0.5
    return (np.clip(raw, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def _ordered(parts: list[CalibrationSet]) -> CalibrationSet:
    """Join the batches in an order that does not depend on how the pictures were batched."""
    joined = CalibrationSet.concatenate(parts)
    # Two stable sorts: by trajectory, within it by step, and within that the unconditional half stays first.
    order = torch.argsort(joined.step, stable=True)
    order = order[torch.argsort(joined.trajectory[order], stable=True)]
    return CalibrationSet(joined.select(order), joined.trajectory[order], joined.step[order])
