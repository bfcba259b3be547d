"""Train the bundled model `emoji` again, or measure one: `python -m dmqexport.models.emoji_training --help`.

Two CPU cores take under two hours. An interrupted run goes on where it was when the same command is given again, and
ends in the same weights, bit for bit, as an uninterrupted one.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dmqexport.errors import DmqExportError, ModelError
from dmqexport.models import emoji
from dmqexport.models.emoji_stages import (
    Report,
    TrainingRecipe,
    build_tokenizer,
    encode,
    reconstruction_psnr,
    to_tensor,
    train_autoencoder,
    train_denoiser,
    write_pipeline,
)
from dmqexport.report.retrieval import retrieval_accuracy

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retrieval:
    """What one pipeline folder reached: the share of captions whose picture came back."""

    captions: int
    top1: float
    top5: float


def train(
    out: Path,
    recipe: TrainingRecipe,
    report: Report,
    *,
    device: str = "cpu",
    checkpoint_every: int = 200,
) -> Path:
    """Train, or go on training, in the folder `out`; returns the pipeline folder `out/pipeline`."""
    place = torch.device(device)
    captions = emoji.captions()
    # The vocabulary covers all captions even when a subset is trained, so that the shapes stay those of the real model.
    tokenizer = build_tokenizer(captions)
    pixels = to_tensor(emoji.images()[: recipe.pictures], place)
    autoencoder = train_autoencoder(pixels, recipe, out / "autoencoder.safetensors", checkpoint_every, report)
    _log.info("autoencoder: %.2f dB", reconstruction_psnr(autoencoder, pixels))
    latents = encode(autoencoder, pixels) * autoencoder.config.scaling_factor
    unet, text_encoder = train_denoiser(
        latents, captions[: recipe.pictures], tokenizer, recipe, out / "denoiser.safetensors", checkpoint_every, report
    )
    write_pipeline(out / "pipeline", autoencoder, text_encoder, tokenizer, unet)
    return out / "pipeline"


def evaluate(folder: Path, *, count: int = 200, batch: int = 50, device: str = "cpu") -> Retrieval:
    """Retrieval of `count` fixed captions: 20 DDIM steps, guidance 3, float32, one fixed seed a caption."""
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is no diffusers folder: it has no model_index.json",
            hint="give the folder that training wrote, OUT/pipeline",
        )
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.float()
    pipeline.to(device).set_progress_bar_config(disable=True)
    captions, rows = emoji.captions(), emoji.retrieval_indices(count)
    parts = []
    for first in range(0, count, batch):
        part = rows[first : first + batch].tolist()
        # The caption's row seeds its noise, so that neither batch size nor count changes a picture.
        generators = [torch.Generator().manual_seed(row) for row in part]
        images = pipeline(
            [captions[row] for row in part],
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=generators,
            output_type="np",
        ).images
        parts.append(np.round(images * 255.0).astype(np.uint8))
    generated, gallery = np.concatenate(parts), emoji.images()
    return Retrieval(
        captions=count,
        top1=retrieval_accuracy(generated, rows, gallery),
        top5=retrieval_accuracy(generated, rows, gallery, top_k=5),
    )


@contextmanager
def _progress(console: Console) -> Iterator[Report]:
    """A bar with the time left on a terminal; one log line every half minute elsewhere."""
    began: dict[str, tuple[float, int]] = {}
    spoke = time.monotonic()
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def report(stage: str, done: int, total: int, loss: float) -> None:
            nonlocal spoke
            now = time.monotonic()
            since, first = began.setdefault(stage, (now, done))
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, description=f"{stage}  loss {loss:.4f}")
            if not console.is_terminal and (now - spoke > 30 or done == total):
                spoke = now
                left = (now - since) / max(1, done - first) * (total - done)
                _log.info("%s %d/%d  loss %.4f  %.0f min left", stage, done, total, loss, left / 60)

        yield report


def _parser() -> argparse.ArgumentParser:
    recipe = TrainingRecipe()
    parser = argparse.ArgumentParser(
        prog="python -m dmqexport.models.emoji_training",
        description="Train the bundled text-to-image model on its 1,355 captioned pictures, or measure a trained one.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for checkpoints and, at the end, for pipeline/")
    what.add_argument("--evaluate", type=Path, metavar="DIR", help="only measure the diffusers folder DIR")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--pictures", type=int, default=recipe.pictures, help="train on the first ones only")
    parser.add_argument("--autoencoder-iterations", type=int, default=recipe.autoencoder_iterations)
    parser.add_argument("--denoiser-iterations", type=int, default=recipe.denoiser_iterations)
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="N", help="iterations (default: 200)")
    parser.add_argument("--captions", type=int, default=200, help="how many captions to measure (default: 200)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)  # vanishing gradients would otherwise slow a CPU down tenfold
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recipe = replace(
        TrainingRecipe(),
        seed=options.seed,
        pictures=options.pictures,
        autoencoder_iterations=options.autoencoder_iterations,
        denoiser_iterations=options.denoiser_iterations,
    )
    try:
        folder = options.evaluate
        if folder is None:
            with _progress(console) as report:
                folder = train(
                    options.out,
                    recipe,
                    report,
                    device=options.device,
                    checkpoint_every=options.checkpoint_every,
                )
            console.print(f"wrote {folder}")
        result = evaluate(folder, count=options.captions, device=options.device)
    except DmqExportError as error:
        console.print(f"[red]error:[/] {error}")
        return error.exit_code
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from the last checkpoint")
        return 130
    console.print(
        f"retrieval of {result.captions} captions: {result.top1:.1%} (top 5: {result.top5:.1%}); "
        "20 DDIM steps, guidance 3, nearest of all pictures in pixel space"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
