"""The deployable folder: layout, manifest, hashes; opened and verified without any framework."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmqexport.errors import BundleError
from dmqexport.quant_plan import QuantPlan

SCHEMA_VERSION = 1
OWN_FOLDER = "dmqexport"
MANIFEST = f"{OWN_FOLDER}/manifest.json"
REPORT_JSON = f"{OWN_FOLDER}/report.json"
REPORT_HTML = f"{OWN_FOLDER}/report.html"
GRID = f"{OWN_FOLDER}/grid.png"
RECIPE = f"{OWN_FOLDER}/recipe.yaml"
GRAPH = "model.onnx"
#: Measurements differ from run to run; the manifest vouches for what is deployed, not for them.
_UNHASHED = (MANIFEST, REPORT_JSON, REPORT_HTML, GRID)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def component(self) -> str:
        """Folder of the denoiser: `unet` or `transformer`."""
        return str(self.manifest["component"])

    @property
    def graph(self) -> Path:
        """The deployed ONNX graph."""
        return self.path / self.component / GRAPH

    @property
    def plan(self) -> QuantPlan:
        """The quantization plan."""
        return QuantPlan.load(self.path / OWN_FOLDER)

    @property
    def session_config(self) -> dict[str, str]:
        """ONNX Runtime session options the graph needs."""
        return dict(self.manifest["session"]["config"])

    @property
    def report(self) -> dict[str, Any]:
        """The JSON report; raises BundleError when it is missing or broken."""
        return read_json(self.path / REPORT_JSON)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises BundleError saying which file and why."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint="is this a complete dmqexport bundle?") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} is not a JSON object")
    return document


def open_bundle(path: Path, *, verify: bool = False) -> Bundle:
    """Open a bundle; `verify` checks every file's size and sha256 (a missing or wrong size is always found).

    Raises BundleError.
    """
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path} is not a dmqexport bundle: {MANIFEST} is missing", hint="pass the -o folder of a build"
        )
    manifest = read_json(path / MANIFEST)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path}: manifest schema {version}, this version reads {SCHEMA_VERSION}", hint="rebuild it")
    missing = {"component", "files", "session", "model", "bits", "target"} - manifest.keys()
    if missing:
        raise BundleError(f"{path}: the manifest lacks {sorted(missing)}")
    problems = list(_problems(path, manifest["files"], verify))
    if problems:
        raise BundleError(
            f"{path}: {len(problems)} files differ from the manifest:\n  " + "\n  ".join(problems[:10]),
            hint="the bundle was truncated or changed after the build; rebuild or copy it again",
        )
    return Bundle(path, manifest)


def _problems(path: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> Iterator[str]:
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            yield f"{name}: missing"
        elif file.stat().st_size != entry["size"]:
            yield f"{name}: {file.stat().st_size} bytes, expected {entry['size']}"
        elif verify and sha256(file) != entry["sha256"]:
            yield f"{name}: content differs (sha256)"


def sha256(path: Path) -> str:
    """Streamed sha256 of a file, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Hash every file of `folder` and write the manifest; the same content gives the same bytes."""
    files = {
        name: {"sha256": sha256(file), "size": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and (name := file.relative_to(folder).as_posix()) not in _UNHASHED
    }
    document = {"schema_version": SCHEMA_VERSION, **fields, "files": files}
    (folder / MANIFEST).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def is_replaceable(path: Path) -> bool:
    """Whether a build may write here: nothing there, an empty folder, or an earlier bundle."""
    if not path.exists():
        return True
    return path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir()))
