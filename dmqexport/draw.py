"""Draw pictures with a bundle: prompts down, seeds across, into one PNG."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dmqexport.bundle import Bundle
from dmqexport.errors import RecipeError
from dmqexport.models.loading import LoadedModel
from dmqexport.models.pipeline_kinds import kind_of
from dmqexport.models.sampling import sample_images
from dmqexport.models.schedulers import build_scheduler
from dmqexport.runtime import QuantizedDenoiser, load_pipeline
from dmqexport.workspace import Reporter, file_errors, writable_folder

_BATCH = 8


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
    reporter: Reporter,
) -> int:
    """Write a PNG grid, one row a prompt, one column a seed; returns the number of pictures.

    Raises RecipeError when prompts are missing or not taken, BundleError for a broken bundle, ResourceError when the
    picture cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise RecipeError(f"{output}: pictures are written as PNG", hint="name the output something.png")
    if output.is_dir():
        raise RecipeError(f"{output} is a folder", hint="give a file, such as pictures.png")
    writable_folder(output.parent)
    start = time.perf_counter()
    reporter.started("load")
    loaded = _as_model(bundle, threads, scheduler)
    if loaded.default_prompts and not prompts:
        raise RecipeError("this model draws from text, and no prompt is given", hint='add --prompt "grinning face"')
    if prompts and not loaded.default_prompts:
        raise RecipeError(f"{loaded.name} takes no prompts: it has no text encoder", hint="leave --prompt out")
    reporter.finished("load", time.perf_counter() - start, False)
    start = time.perf_counter()
    reporter.started("sample")
    rows = list(prompts) or [""]
    sampling = bundle.manifest["sampling"]
    result = sample_images(
        loaded,
        [prompt for prompt in rows for _ in seeds] if prompts else None,
        [seed for _ in rows for seed in seeds],
        steps=int(sampling["steps"]) if steps is None else steps,
        guidance=float(sampling["guidance"]) if guidance is None else guidance,
        batch_size=_BATCH,
        progress=reporter.progress,
    )
    reporter.finished("sample", time.perf_counter() - start, False)
    height, width = result.images.shape[1:3]
    grid = result.images.reshape(len(rows), len(seeds), height, width, 3).swapaxes(1, 2)
    picture = Image.fromarray(np.ascontiguousarray(grid.reshape(len(rows) * height, len(seeds) * width, 3)))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with file_errors(output):
        temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
        try:
            picture.save(temporary, format="PNG")
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    return len(result.images)


def _as_model(bundle: Bundle, threads: int | None, scheduler: str | None) -> LoadedModel:
    """The bundle's pipeline, in the form that sampling takes."""
    pipeline = load_pipeline(bundle.path, threads=threads)
    if scheduler is not None:
        pipeline.register_modules(scheduler=build_scheduler(bundle.path / "scheduler", scheduler))
    name = str(bundle.manifest["component"])
    denoiser: QuantizedDenoiser = getattr(pipeline, name)
    kind = kind_of(type(pipeline).__name__)
    return LoadedModel(
        name=str(bundle.manifest["model"]["name"]),
        source=str(bundle.path),
        folder=bundle.path,
        family=denoiser.family,
        denoiser=denoiser,
        pipeline=pipeline,
        tokens=None,
        num_train_timesteps=int(bundle.manifest["num_timesteps"]),
        fingerprint=str(bundle.manifest["model"]["fingerprint"]),
        default_prompts=("",) if kind is None or kind.conditions != "none" else (),
        default_guidance=float(bundle.manifest["sampling"]["guidance"]),
        default_steps=int(bundle.manifest["sampling"]["steps"]),
        preset=None,
    )
