"""The verb that proves a build repeatable."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dmqexport.cli_log import start_logging
from dmqexport.cli_options import (
    BitsOption,
    JsonOption,
    ModelOption,
    RecipeOption,
    SeedOption,
    SetOption,
    TargetOption,
    VerboseOption,
)


def verify_reproducible(
    model: ModelOption = None,
    bits: BitsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = None,
    assignments: SetOption = None,
    seed: SeedOption = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="FOLDER", help="Build there and leave both bundles.")
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Build a recipe twice, from nothing, and compare the bundles byte for byte.

    \b
      dmqexport verify-reproducible -m emoji --bits w4a4
      dmqexport verify-reproducible --recipe out/emoji/dmqexport/recipe.yaml

    ONNX, plan, manifest and every other file that the manifest vouches for must be the same: exit code 6 when not. What
    is measured (the report) and built engines are not compared. Takes twice the time of a build.
    """
    start_logging(verbose=verbose)
    from dmqexport.recipe import load_recipe
    from dmqexport.reproduce import build_twice
    from dmqexport.workspace import file_errors, writable_folder

    options = {"model": model, "bits": bits, "target": target, "seed": seed}
    resolved = load_recipe(recipe, options, assignments or [])
    with tempfile.TemporaryDirectory(prefix="dmqexport-") as temporary:
        folder = Path(temporary) if keep is None else keep
        if keep is not None:
            writable_folder(folder)
        with file_errors(folder):
            compared = build_twice(resolved, folder)
    if as_json:
        print(json.dumps(asdict(compared), indent=1))
    compared.require_equal()
    if not as_json:
        print(f"reproducible: {len(compared.same)} files of both builds are the same to the byte")
