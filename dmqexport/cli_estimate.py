"""`--dry-run`: the recipe that would be built, and as comments below it what that will take."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from dmqexport.errors import ModelError, ResourceError
from dmqexport.recipe import Recipe


def print_dry_run(recipe: Recipe, *, as_json: bool) -> None:
    """Print the recipe as YAML, followed by the estimate as comments; as one JSON object with --json.

    The output is itself a recipe. Raises ResourceError when --max-ram or --max-disk would not be kept to.
    """
    from dmqexport.pipeline_limits import estimate_build, report_lines

    try:
        found = estimate_build(recipe, Path(tempfile.gettempdir()))
        lines = report_lines(found)
        document = {**asdict(found), "seconds": found.seconds, "memory": found.memory, "disk": found.disk}
    except ModelError as error:
        document, lines = {"missing": error.message}, [f"no estimate: {error.message}"]
    except ResourceError:
        if not as_json:
            print(recipe.to_yaml(), end="", flush=True)
        raise
    if as_json:
        print(json.dumps({"recipe": recipe.model_dump(mode="json"), "estimate": document}, indent=1))
        return
    print(recipe.to_yaml(), end="")
    print("# what `dmqexport build` of it takes on this machine, within a factor of about two:")
    for line in lines:
        print(f"#   {line}")
