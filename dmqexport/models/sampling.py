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
from dmqexport.models.family import bind_call
from dmqexport.models.loading import LoadedModel
from dmqexport.models.pipeline_kinds import class_labels
from dmqexport.models.quiet import quiet

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all) after each batch."""

_EMBEDDING_STREAM: Final = 0x9E3779B9
_LATENT_RANGE: Final = 4.0
_PIXEL_RANGE: Final = 1.0


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
    encoder, the first three latent channels are shown, [-4, 4] mapped to [0, 255]; one or three channels are pixels,
    [-1, 1].

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
            raw = _call(loaded, arguments)
        decoded = "output_type" in arguments or getattr(loaded.pipeline, "decodes", False)
        pictures.append(_pictures(raw, chunk, latent=not decoded))
        if recorder is not None:
            recorded.append(recorder.result())
        if progress is not None:
            progress(first + len(chunk), len(seeds))
    return SampleResult(np.concatenate(pictures), _ordered(recorded) if record else None)


def set_denoiser(pipeline: Any, component: Any) -> None:
    """Put `component` in the place of the pipeline's denoiser; it must offer `config` and `dtype` like the original.

    Raises ModelError when the pipeline has no denoiser to replace or `component` cannot stand in for it.
    """
    name = next((name for name in ("unet", "transformer", "denoiser") if hasattr(pipeline, name)), None)
    if name is None:
        raise ModelError(f"{type(pipeline).__name__} has no component 'unet' or 'transformer' to replace")
    for needed in () if name == "denoiser" else ("config", "dtype"):
        if not hasattr(component, needed):
            raise ModelError(f"{type(component).__name__} cannot replace the denoiser: it has no `{needed}`")
    if not callable(component):
        raise ModelError(f"{type(component).__name__} cannot replace the denoiser: it is not callable")
    pipeline.register_modules(**{name: component})


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
    }
    if loaded.family.returns_tensor:
        return {"seeds": seeds, "num_inference_steps": steps, "guidance_scale": guidance}
    kind = loaded.kind
    if kind is not None:
        arguments["output_type"] = "np"
        return {**arguments, **kind.arguments(loaded.pipeline, texts, len(seeds), guidance, loaded.size)}
    if len(loaded.family.input_names) == 2:
        return {**arguments, "output_type": "np", "batch_size": len(seeds)}
    sample = loaded.example_inputs(1)[loaded.family.input_names[0]]
    return {
        **arguments,
        "conditions": _conditions(loaded, texts, seeds),
        # The unconditional half is one fixed vector, as the embedding of the empty prompt would be.
        "null_conditions": None if guidance <= 1 else _conditions(loaded, [], [0] * len(seeds)),
        "shape": tuple(sample.shape[1:]),
        "guidance_scale": guidance,
    }


def _conditions(loaded: LoadedModel, texts: list[str], seeds: list[int]) -> dict[str, Tensor]:
    """What a denoiser without its pipeline is conditioned on: classes from `texts`, noise for what would be encoded.

    Without texts the class is "none". Noise is unit-normal, from a stream apart from the one that draws the picture's.
    """
    family, pipeline = loaded.family, loaded.pipeline
    shapes = loaded.example_inputs(1)
    conditions: dict[str, Tensor] = {}
    for name in family.input_names[1:]:
        if name == "timestep":
            continue
        if name == "class_labels":
            labels = class_labels(pipeline, texts) if texts else [family.null_class] * len(seeds)
            conditions[name] = torch.tensor(labels)
        elif name in family.embeddings:
            drawn = [_random(shapes[name].shape[1:], seed, name) for seed in seeds]
            conditions[name] = torch.stack(drawn)
        else:
            conditions[name] = shapes[name].expand(len(seeds), *shapes[name].shape[1:])
    return conditions


def _random(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    stream = _EMBEDDING_STREAM + (0 if name == "encoder_hidden_states" else 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed ^ stream))


def _recorder(loaded: LoadedModel, pictures: int, first: int) -> TrajectoryRecorder:
    denoiser = getattr(loaded.pipeline, loaded.family.component)
    if not isinstance(denoiser, nn.Module):
        raise ModelError(
            f"cannot record the inputs of {type(denoiser).__name__}: it is no torch module",
            hint="record with the float denoiser in the pipeline",
        )
    family = loaded.family
    return TrajectoryRecorder(
        denoiser, lambda args, kwargs: bind_call(family, args, kwargs), pictures, first, family.timestep_scale
    )


def _call(loaded: LoadedModel, arguments: dict[str, Any]) -> npt.NDArray[np.float32]:
    """The pipeline's pictures, float [n, H, W, C] in [0, 1], or latents [n, C, H, W] as channels last."""
    pipeline = loaded.pipeline
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
        images = loaded.family.planes(images).permute(0, 2, 3, 1).float().cpu().numpy()
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
        raw = raw / (2 * (_PIXEL_RANGE if channels in (1, 3) else _LATENT_RANGE)) + 0.5
    return (np.clip(raw, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def _ordered(parts: list[CalibrationSet]) -> CalibrationSet:
    """Join the batches in an order that does not depend on how the pictures were batched."""
    joined = CalibrationSet.concatenate(parts)
    # Two stable sorts: by trajectory, within it by step, and within that the unconditional half stays first.
    order = torch.argsort(joined.step, stable=True)
    order = order[torch.argsort(joined.trajectory[order], stable=True)]
    return joined.at(order)
