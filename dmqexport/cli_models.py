"""The verbs for models: which have a name, and how to convert those that diffusers has no folder of."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmqexport.cli_log import start_logging
from dmqexport.cli_options import JsonOption, QuietOption, VerboseOption

if TYPE_CHECKING:
    from dmqexport.models.preset_table import Preset


def models(as_json: JsonOption = False) -> None:
    """List the model presets: where they come from, how they are sampled, and what their licences forbid."""
    from dmqexport.cli_console import columns
    from dmqexport.models.preset_table import TABLE

    if as_json:
        print(json.dumps([{**asdict(preset), "source": preset.source} for preset in TABLE], indent=1))
    elif sys.stdout.isatty():
        _print_table(TABLE)
    else:
        # One line a model, never wrapped, for `grep`.
        print(columns([(*_cells(preset), preset.note) for preset in TABLE], indent=""))


_TITLES = ("preset", "source", "sampling", "pictures", "denoiser", "licence", "it forbids")


def _cells(preset: "Preset") -> tuple[str, ...]:
    guidance = f", guidance {preset.guidance:g}" if preset.guidance > 1 else ""
    asked = {"text": "text", "class": "class", "none": "no prompt"}[preset.conditions]
    latent = "×".join(str(side) for side in preset.latent)
    return (
        preset.name,
        preset.source + (" (gated)" if preset.gated else ""),
        f"{preset.scheduler}, {preset.steps} step{'' if preset.steps == 1 else 's'}{guidance}",
        f"{preset.picture[0]}×{preset.picture[1]} from {asked}, latent {latent}",
        preset.denoiser,
        preset.licence,
        preset.forbids or "nothing of note",
    )


def _print_table(table: "tuple[Preset, ...]") -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(show_lines=True)
    for title in _TITLES:
        drawn.add_column(title, overflow="fold")  # hub ids are for copying: folded, not cut
    for preset in table:
        drawn.add_row(*_cells(preset))
    console = Console()
    console.print(drawn)
    console.print(
        "gated: log in to the hub and accept the authors' terms first. convert: download the authors' checkpoint and "
        "run `dmqexport convert`. --json also gives notes and addresses.",
        markup=False,
    )


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The authors' .ckpt, .pth or .safetensors.")],
    model: Annotated[str, typer.Option("-m", "--model", metavar="PRESET", help="The preset it is a checkpoint of.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The diffusers folder to write.")],
    averaged: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Take the moving average of the weights where there is one.")
    ] = True,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert an original checkpoint of CompVis latent-diffusion or ermongroup/ddim to a diffusers folder.

    \b
      dmqexport convert lsun_bedrooms/model.ckpt -m ldm-bedroom -o models/ldm-bedroom
      dmqexport build -m models/ldm-bedroom -o out/bedroom

    Pickles are opened for tensors alone; one that holds anything else is refused.
    """
    start_logging(verbose=verbose, quiet=quiet)
    from dmqexport.models.convert import convert as run

    made = run(checkpoint, model, output, averaged=averaged)
    if as_json:
        print(json.dumps({"folder": str(made.folder), "parameters": made.parameters, "averaged": made.averaged}))
    else:
        average = ", moving average" if made.averaged else ""
        print(f"{made.folder}: {model}, denoiser of {made.parameters / 1e6:.1f} M parameters{average}")
