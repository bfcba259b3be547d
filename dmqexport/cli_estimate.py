"""`--dry-run`: the recipe that would be built, and as comments below it what that will take."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmqexport.errors import ModelError, ResourceError
from dmqexport.recipe import Recipe


def print_dry_run(recipe: Recipe, output: Path, *, as_json: bool) -> None:
    """Print the recipe as YAML, followed by the estimate as comments; as one JSON object with --json.

    The output is itself a recipe. Where the bundle `output` was built from the same recipe, what its stages took stands
    beside the estimate. Raises ResourceError when --max-ram or --max-disk would not be kept to.
    """
    from dmqexport.pipeline_limits import estimate_build, measured_stages, report_lines

    measured = measured_stages(recipe, output)
    try:
        found = estimate_build(recipe, Path(tempfile.gettempdir()))
        lines = report_lines(found, measured)
        document: dict[str, Any] = asdict(found)
        document |= {"seconds": found.seconds, "memory": found.memory, "disk": found.disk}
    except ModelError as error:
        document, lines = {"missing": error.message}, [f"no estimate: {error.message}"]
    except ResourceError:
        if not as_json:
            print(recipe.to_yaml(), end="", flush=True)
        raise
    if as_json:
        taken = [stage.model_dump(mode="json") for stage in measured]
        print(json.dumps({"recipe": recipe.model_dump(mode="json"), "estimate": document, "measured": taken}, indent=1))
        return
    print(recipe.to_yaml(), end="")
    print("# what `dmqexport build` of it takes where nothing else runs on this machine, within a factor of about two:")
    if measured:
        print(f"# (beside it, from took on, what the stages of {output} did take)")
    for line in lines:
        print(f"#   {line}")
