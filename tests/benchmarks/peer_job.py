"""One quantizer in a process of its own: what it is given, what it leaves, and how it says that it failed.

`peers.py` starts `PYTHON peer_NAME.py job.json`. Beside the job, in the shared folder, lie the float model and the
samples (`peer_judge.prepare`); only torch peers need diffusers, and nobody but the judge needs dmqexport installed:
its sources are on the path for what imports the standard library alone.
"""

import contextlib
import importlib
import io
import json
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dmqexport.memory_watch import MemoryWatch
from dmqexport.target import cpu_has_vnni

FLOAT, FLOAT_FAST, UNET = "float.onnx", "float_fast.onnx", "unet"
CALIBRATION, MODEL = "calibration.npz", "model.json"
Arrays = dict[str, np.ndarray]
_LONGEST_REASON = 240


@dataclass(frozen=True)
class Job:
    """shared: the folder with the model and the samples; output: the peer's own; setting: which way to quantize."""

    shared: Path
    output: Path
    bits: str
    setting: Mapping[str, Any]
    judge: Mapping[str, Any]

    @property
    def float_graph(self) -> Path:
        """The float UNet as dmqexport exports it: opset 21, dynamic batch, nothing fused."""
        return self.shared / FLOAT

    def calibration(self, batch: int, most: int | None = None) -> Iterator[Arrays]:
        """Batches of the points that everyone calibrates on, in one mixed order; at most `most` points of them."""
        with np.load(self.shared / CALIBRATION) as stored:
            arrays = {name: stored[name] for name in stored.files}
        count = len(next(iter(arrays.values())))
        order = np.random.default_rng(0).permutation(count)[:most]
        for start in range(0, len(order), batch):
            yield {name: value[order[start : start + batch]] for name, value in arrays.items()}

    @property
    def points(self) -> int:
        """How many points there are."""
        with np.load(self.shared / CALIBRATION) as stored:
            return len(stored[stored.files[0]])


@dataclass(frozen=True)
class Result:
    """What a peer left.

    runtime: who executes `artefact` (onnxruntime, openvino), or where there is none, simulation. seconds and
    peak_bytes: of quantizing, the process tree's; None takes what the process measured around it. metrics: of a
    simulation, which only this process can judge. note: what a reader of the table must know.
    """

    runtime: str
    artefact: Path | None
    seconds: float | None = None
    peak_bytes: int | None = None
    metrics: Mapping[str, Any] | None = None
    note: str = ""
    later: Callable[[], Mapping[str, Any]] | None = field(default=None, repr=False)


class RefusedError(Exception):
    """The peer has no such thing; the message says so in a table."""


def main(work: Callable[[Job], Result], packages: Mapping[str, str]) -> None:
    """Run the job that is named on the command line. packages: import name → name to install, needed and reported."""
    path = Path(sys.argv[1])
    given = json.loads(path.read_text(encoding="utf-8"))
    job = Job(Path(given["shared"]), Path(given["output"]), given["bits"], given["setting"], given["judge"])
    warnings.simplefilter("ignore")  # of frameworks that are absent, or newer than a peer knows
    try:
        document = _run(job, work, packages)
    except Exception as error:  # whatever a peer raises is a row of the table
        traceback.print_exc()
        document = {"failure": _reason(error, job)}
    document["versions"] = _versions(packages)
    path.with_name("result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """Kind of processor, cores, and the instructions that decide about int8."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, {'with' if cpu_has_vnni() else 'without'} VNNI"


def _run(job: Job, work: Callable[[Job], Result], packages: Mapping[str, str]) -> dict[str, Any]:
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            if package in _versions(packages):
                raise RefusedError(f"installed here, and does not load: {error}") from error
            missing = getattr(error, "name", None) or module
            raise RefusedError(f"not installed here ({missing}): pip install {package}") from error
    with MemoryWatch() as memory:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # they count aloud; the table says it all
            result = work(job)
        seconds = time.perf_counter() - start
    metrics = result.metrics if result.later is None else result.later()
    return {
        "runtime": result.runtime,
        "artefact": None if result.artefact is None else str(result.artefact),
        "build_seconds": seconds if result.seconds is None else result.seconds,
        "peak_bytes": memory.peak_bytes if result.peak_bytes is None else result.peak_bytes,
        "metrics": metrics,
        "note": result.note,
    }


def _reason(error: Exception, job: Job) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, RefusedError):
        text = f"{type(error).__name__}: {text}"
    for folder in (job.output, job.shared, Path(sys.prefix)):
        text = text.replace(str(folder), "…")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


def _versions(packages: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for package in packages.values():
        name = package.partition("[")[0]
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name).partition("+")[0]
    return found
