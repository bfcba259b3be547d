"""The deployable folder: layout, manifest, hashes; opened and verified without any framework.

Two files vouch for the rest. The manifest holds what the recipe determines: built twice, it is the same to the byte.
The seal holds the hash of the manifest and of what differs from build to build: measurements, and built engines.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmqexport.errors import BundleError, RecipeError
from dmqexport.quant_plan import QuantPlan
from dmqexport.target import Target

SCHEMA_VERSION = 2
OWN_FOLDER = "dmqexport"
MANIFEST = f"{OWN_FOLDER}/manifest.json"
SEAL = f"{OWN_FOLDER}/seal.json"
REPORT_JSON = f"{OWN_FOLDER}/report.json"
REPORT_HTML = f"{OWN_FOLDER}/report.html"
GRID = f"{OWN_FOLDER}/grid.png"
RECIPE = f"{OWN_FOLDER}/recipe.yaml"
GRAPH = "model.onnx"
#: What an engine is built from, where that is not the deployed graph (bfloat16, which no CPU runs).
ENGINE_GRAPH = "engine.onnx"
#: Folder of built engines, in the denoiser's; a GPU host may add some, which no file vouches for.
ENGINES = "engines"
#: Inputs and answers that an engine's are compared with on the machine that runs it.
ANSWERS = f"{OWN_FOLDER}/answers.npz"
_MEASURED = (REPORT_JSON, REPORT_HTML, GRID, ANSWERS)
_FIELDS: dict[str, type] = {
    "component": str,
    "files": dict,
    "session": dict,
    "model": dict,
    "sampling": dict,
    "bits": str,
    "target": str,
    "num_timesteps": int,
}


_REBUILD = "the bundle was truncated or changed after the build; rebuild or copy it again"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Mapping[str, Any]
    sealed: Mapping[str, dict[str, Any]]

    @property
    def component(self) -> str:
        """Folder of the denoiser: `unet` or `transformer`."""
        return str(self.manifest["component"])

    @property
    def graph(self) -> Path:
        """The deployed ONNX graph."""
        return self.path / self.component / GRAPH

    @property
    def engine_folder(self) -> Path | None:
        """Where the built engine lies; None where the target has none, or it is still to be built."""
        engine = self.manifest.get("engine")
        return None if engine is None else self.path / str(engine["folder"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every file that is vouched for, by its relative name, with its size and sha256."""
        return {**self.manifest["files"], **self.sealed}

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
        document = read_json(self.path / REPORT_JSON)
        if not (isinstance(document.get("metrics"), dict) and isinstance(document.get("layers"), list)):
            raise BundleError(f"{self.path / REPORT_JSON} is no report of a build", hint=_REBUILD)
        return document


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
    """Open a bundle; `verify` checks every file's sha256, and that no file was added.

    A changed manifest, a missing file or one of another size is always found. Raises BundleError.
    """
    manifest = open_manifest(path)
    _check_fields(path, manifest)
    sealed = _sealed(path)
    problems = list(_problems(path, {**manifest["files"], **sealed}, verify))
    if problems:
        count = "1 file differs" if len(problems) == 1 else f"{len(problems)} files differ"
        rest = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise BundleError(
            f"{path}: {count} from the manifest:\n  " + "\n  ".join(problems[:10] + rest),
            hint=_REBUILD,
        )
    return Bundle(path, manifest, sealed)


def open_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the bundle at `path`; raises BundleError when it is missing, broken or of another version."""
    if not (path / MANIFEST).is_file():
        what = "is not a dmqexport bundle" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}: {MANIFEST} is missing", hint="pass the -o folder of a build")
    manifest = read_json(path / MANIFEST)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path}: manifest schema {version}, this version reads {SCHEMA_VERSION}", hint="rebuild it")
    return manifest


def _check_fields(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise BundleError unless the manifest has what every reader relies on."""
    missing = sorted(_FIELDS.keys() - manifest.keys())
    if missing:
        raise BundleError(f"{path / MANIFEST} lacks {', '.join(missing)}", hint=_REBUILD)
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest[name], kind)]
    if not wrong:
        entries, model = manifest["files"].values(), manifest["model"]
        checks = {
            "files": all(isinstance(e, dict) and {"size", "sha256"} <= e.keys() for e in entries),
            "model": {"name", "family", "fingerprint"} <= model.keys(),
            "sampling": {"steps", "guidance"} <= manifest["sampling"].keys(),
            "session": isinstance(manifest["session"].get("config"), dict),
            "target": manifest["target"] in list(Target),
            "engine": _is_engine(manifest.get("engine")),
        }
        wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise BundleError(f"{path / MANIFEST}: {', '.join(wrong)} cannot be understood", hint=_REBUILD)


def _is_engine(engine: object) -> bool:
    """Whether the manifest's `engine` is none, or names a folder inside the bundle."""
    if engine is None:
        return True
    folder = engine.get("folder") if isinstance(engine, dict) else None
    return isinstance(folder, str) and not Path(folder).is_absolute() and ".." not in Path(folder).parts


def _sealed(path: Path) -> dict[str, dict[str, Any]]:
    """The files that the seal vouches for; BundleError where it is missing, broken, or of another manifest."""
    if not (path / SEAL).is_file():
        raise BundleError(f"{path}: {SEAL} is missing", hint=_REBUILD)
    seal = read_json(path / SEAL)
    files = seal.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise BundleError(f"{path / SEAL}: files cannot be understood", hint=_REBUILD)
    if seal.get("manifest") != sha256(path / MANIFEST):
        raise BundleError(f"{path}: {MANIFEST} is not the one that was sealed", hint=_REBUILD)
    return files


def _problems(path: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> Iterator[str]:
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            yield f"{name}: missing"
        elif file.stat().st_size != entry["size"]:
            yield f"{name}: {file.stat().st_size} bytes, expected {entry['size']}"
        elif verify and sha256(file) != entry["sha256"]:
            yield f"{name}: content differs (sha256)"
    if verify:
        known = {*files, MANIFEST, SEAL}
        yield from (f"{name}: not part of the build" for name in _names(path) if name not in known and not _built(name))


def _names(path: Path) -> list[str]:
    """Relative names of all files below `path`, sorted; links count as files, wherever they lead."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() or file.is_symlink())


def _built(name: str) -> bool:
    """Whether a file is part of a built engine, whose bytes another build need not repeat."""
    return ENGINES in Path(name).parts[:-1]


def sha256(path: Path) -> str:
    """Streamed sha256 of a file, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Hash every file of `folder`, write the manifest, and seal it; the same content gives the same manifest."""
    names = [name for name in _names(folder) if name not in (MANIFEST, SEAL)]
    hashed = {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}
    sealed = {name: entry for name, entry in hashed.items() if name in _MEASURED or _built(name)}
    files = {name: entry for name, entry in hashed.items() if name not in sealed}
    _write(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, **fields, "files": files})
    _write(folder / SEAL, {"manifest": sha256(folder / MANIFEST), "files": sealed})


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def is_replaceable(path: Path) -> bool:
    """Whether a build may write here: nothing there, an empty folder, or an earlier bundle."""
    if not path.exists():
        return True
    return path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir()))


def check_replaceable(path: Path) -> None:
    """Raise RecipeError unless a build may replace `path`: it would destroy nothing but what a build wrote."""
    if not is_replaceable(path):
        raise RecipeError(
            f"{path} exists and is not a dmqexport bundle; nothing was touched",
            hint="choose another -o/--output, or remove it yourself",
        )
    if not (path / MANIFEST).is_file():
        return
    try:
        ours = {*read_json(path / MANIFEST)["files"], *_MEASURED, MANIFEST, SEAL}
        if (path / SEAL).is_file():  # bundles of the first schema have none
            ours |= {*read_json(path / SEAL)["files"]}
    except (BundleError, KeyError, TypeError):
        ours = set()
    foreign = [name for name in _names(path) if name not in ours]
    if foreign:
        listed = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise RecipeError(
            f"{path} holds files that its build did not write: {listed}; nothing was touched",
            hint="move them away, or choose another -o/--output",
        )
