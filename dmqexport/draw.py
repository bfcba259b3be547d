"""Draw pictures with a bundle: prompts down, seeds across, into one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dmqexport.bundle import Bundle
from dmqexport.errors import RecipeError
from dmqexport.models.family import family_of
from dmqexport.models.loading import LoadedModel
from dmqexport.models.sampling import sample_images
from dmqexport.models.schedulers import build_scheduler
from dmqexport.runtime import load_pipeline
from dmqexport.workspace import file_errors


def draw_grid(
    bundle: Bundle,
    output: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    guidance: float | None,
    scheduler: str | None,
    scale: int,
    threads: int | None,
) -> int:
    """Write a PNG grid, one row a prompt, one column a seed; returns the number of pictures.

    Raises RecipeError when prompts are missing or not taken, BundleError for a broken bundle, ResourceError when the
    picture cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise RecipeError(f"{output}: pictures are written as PNG", hint="name the output something.png")
    loaded = _as_model(bundle, threads, scheduler)
    if loaded.default_prompts and not prompts:
        raise RecipeError("this model draws from text", hint='add --prompt "grinning face"')
    rows = list(prompts) or [""]
    sampling = bundle.manifest["sampling"]
    result = sample_images(
        loaded,
        [prompt for prompt in rows for _ in seeds] if prompts else None,
        [seed for _ in rows for seed in seeds],
        steps=steps or int(sampling["steps"]),
        guidance=float(sampling["guidance"]) if guidance is None else guidance,
        batch_size=8,
    )
    height, width = result.images.shape[1:3]
    grid = result.images.reshape(len(rows), len(seeds), height, width, 3).swapaxes(1, 2)
    picture = Image.fromarray(np.ascontiguousarray(grid.reshape(len(rows) * height, len(seeds) * width, 3)))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with file_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.tmp")
        picture.save(temporary, format="PNG")
        temporary.replace(output)
    return len(result.images)


def _as_model(bundle: Bundle, threads: int | None, scheduler: str | None) -> LoadedModel:
    """The bundle's pipeline, in the form that sampling takes."""
    pipeline = load_pipeline(bundle.path, threads=threads)
    if scheduler is not None:
        pipeline.register_modules(scheduler=build_scheduler(bundle.path / "scheduler", scheduler))
    family = family_of(str(bundle.manifest["model"]["family"]))
    return LoadedModel(
        name=str(bundle.manifest["model"]["name"]),
        source=str(bundle.path),
        folder=bundle.path,
        family=family,
        denoiser=pipeline.unet,
        pipeline=pipeline,
        tokens=None,
        num_train_timesteps=int(bundle.manifest["num_timesteps"]),
        fingerprint=str(bundle.manifest["model"]["fingerprint"]),
        default_prompts=("",) if "encoder_hidden_states" in family.input_names else (),
        default_guidance=float(bundle.manifest["sampling"]["guidance"]),
        default_steps=int(bundle.manifest["sampling"]["steps"]),
        preset=None,
    )
