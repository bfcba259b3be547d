"""Build a recipe twice, each time in a process of its own that shares nothing with the other, and compare the bundles.

The two processes hash strings differently, so that an order taken from a set shows up as a difference.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dmqexport
from dmqexport.bundle import MANIFEST, open_bundle, open_manifest, read_json
from dmqexport.errors import (
    BackendMissingError,
    BundleError,
    DmqExportError,
    GateError,
    PerformanceGateError,
    RecipeError,
)
from dmqexport.recipe import Recipe

#: Ends of a build that leave a whole bundle behind.
_BUILT = (0, GateError.exit_code, PerformanceGateError.exit_code, BackendMissingError.exit_code)
_NAMES = ("first", "second")
_SHOWN = 5


class ReproductionError(DmqExportError):
    """One of the two builds failed, for a reason that its message gives."""


@dataclass(frozen=True)
class Comparison:
    """Two builds of one recipe. same, different: relative names of files; details: where a JSON file differs."""

    same: tuple[str, ...]
    different: tuple[str, ...]
    details: Mapping[str, tuple[str, ...]]

    def require_equal(self) -> None:
        """Raise BundleError naming every file that differs, and where."""
        if not self.different:
            return
        lines = []
        for name in self.different:
            where = self.details.get(name, ())
            shown = ", ".join(where[:_SHOWN]) + (f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else "")
            lines.append(f"{name}{': ' if shown else ''}{shown}")
        raise BundleError(
            f"two builds of one recipe differ in {len(lines)} of {len(lines) + len(self.same)} files:\n  "
            + "\n  ".join(lines),
            hint="give both the same number of threads (OMP_NUM_THREADS); --keep keeps the bundles to look at",
        )


def build_twice(recipe: Recipe, folder: Path) -> Comparison:
    """Build `recipe` in `folder`/first and `folder`/second, and compare every file that a manifest vouches for.

    What the seal vouches for, measurements and engines, is not compared: it differs by nature.
    Raises RecipeError when `folder` holds either already, ReproductionError when a build fails, BundleError when one is
    not what its own manifest says.
    """
    for name in (*_NAMES, "recipe.yaml"):
        if (folder / name).exists():
            raise RecipeError(f"{folder / name} exists; nothing was touched", hint="choose another --keep")
    source = folder / "recipe.yaml"
    source.write_text(recipe.to_yaml(), encoding="utf-8")
    for seed, name in enumerate(_NAMES, start=1):
        _build(source, folder / name, seed)
    return compare_bundles(*(folder / name / "bundle" for name in _NAMES))


def compare_bundles(first: Path, second: Path) -> Comparison:
    """Compare two bundles file by file, manifest included; raises BundleError when one is damaged."""
    for path in (first, second):
        open_bundle(path, verify=True)
    left, right = (open_manifest(path)["files"] for path in (first, second))
    different = [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    if (first / MANIFEST).read_bytes() != (second / MANIFEST).read_bytes():
        different.append(MANIFEST)
    details = {
        name: tuple(_differences(read_json(first / name), read_json(second / name)))
        for name in different
        if name.endswith(".json") and all((path / name).is_file() for path in (first, second))
    }
    same = [name for name in sorted({*left, *right, MANIFEST}) if name not in different]
    return Comparison(tuple(same), tuple(different), details)


def _build(recipe: Path, folder: Path, hash_seed: int) -> None:
    folder.mkdir()
    # The child finds the very package that runs here, wherever the command was started.
    paths = [str(Path(dmqexport.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in paths if part),
        "PYTHONHASHSEED": str(hash_seed),
    }
    options = ["--recipe", recipe, "-o", folder / "bundle", "--work", folder / "work", "--quiet"]
    command = [sys.executable, "-m", "dmqexport.cli", "build", *map(str, options)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode not in _BUILT or not (folder / "bundle" / MANIFEST).is_file():
        words = ended.stderr.strip().removeprefix("error: ") or f"exit code {ended.returncode}"
        raise ReproductionError(f"the {folder.name} of the two builds failed: {words}")


def _differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            yield from _differences(left.get(key), right.get(key), f"{where}.{key}" if where else str(key))
    elif json.dumps(left) != json.dumps(right):
        yield where or "the whole"
