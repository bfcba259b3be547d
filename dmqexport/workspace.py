"""The work folder: one directory a stage, named by the content of what went in, complete or absent."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dmqexport.errors import ResourceError

_DISK_ERRORS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_ACCESS_ERRORS = {errno.EROFS: "the file system is read-only", errno.EACCES: "permission denied", errno.EPERM: "denied"}


class Reporter(Protocol):
    """Hears how a build goes; the command line draws it."""

    def started(self, stage: str) -> None:
        """A stage begins."""
        ...

    def progress(self, done: int, total: int) -> None:
        """The running stage has finished `done` of `total` units."""
        ...

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """A stage is done, or was found done."""
        ...


class SilentReporter:
    """Says nothing."""

    def started(self, stage: str) -> None:
        """Ignored."""

    def progress(self, done: int, total: int) -> None:
        """Ignored."""

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Ignored."""


@dataclass(frozen=True)
class StageRecord:
    """One finished stage: where its files lie and what it cost."""

    name: str
    path: Path
    fingerprint: str
    seconds: float
    cached: bool
    peak_rss_bytes: int


def content_key(parts: Mapping[str, Any]) -> str:
    """sha256 over canonical JSON, hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Workspace:
    """Stages are built in a temporary directory and renamed when complete: a killed build resumes at its last stage."""

    def __init__(self, root: Path, reporter: Reporter, *, resume: bool = True) -> None:
        """Use `root` (created). resume=False ignores finished stages. Raises ResourceError when it is not writable."""
        self.root = root
        self.reporter = reporter
        self.records: list[StageRecord] = []
        self._resume = resume
        with file_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".write-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            self._sweep()

    def stage(self, name: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> StageRecord:
        """Return the finished stage for `key`, running `build(directory)` unless it is there already."""
        fingerprint = content_key({"stage": name, **key})
        final = self.root / f"{name}-{fingerprint[:16]}"
        self.reporter.started(name)
        start = time.perf_counter()
        cached = final.is_dir() and self._resume
        if not cached:
            temporary = self.root / f".{name}-{fingerprint[:16]}.tmp-{os.getpid()}"
            with file_errors(self.root):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                try:
                    build(temporary)
                    shutil.rmtree(final, ignore_errors=True)
                    temporary.rename(final)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        record = StageRecord(name, final, fingerprint, time.perf_counter() - start, cached, peak_rss_bytes())
        self.records.append(record)
        self.reporter.finished(name, record.seconds, cached)
        return record

    def _sweep(self) -> None:
        """Remove what killed builds left behind; a directory of a live process is left alone."""
        for path in self.root.glob(".*.tmp-*"):
            owner = path.name.rsplit("-", 1)[-1]
            if owner.isdigit() and not _alive(int(owner)):
                shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def file_errors(where: Path) -> Iterator[None]:
    """Turn full disks and missing permissions into a ResourceError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise ResourceError(
                f"{where}: {_DISK_ERRORS[error.errno]}",
                hint="free space or choose another -o/--work; finished stages are kept and the build resumes",
            ) from error
        if error.errno in _ACCESS_ERRORS:
            raise ResourceError(
                f"{error.filename or where}: cannot be written, {_ACCESS_ERRORS[error.errno]}",
                hint="choose another -o/--output or --work folder",
            ) from error
        raise
    except Exception as error:
        # safetensors and onnx report a full disk in their own exceptions; the free space tells.
        text = str(error)
        if "No space left" in text or "os error 28" in text:
            raise ResourceError(
                f"{where}: {_DISK_ERRORS[errno.ENOSPC]}", hint="free space; the build resumes"
            ) from error
        raise


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that takes the place of `target` when the block succeeds."""
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    with file_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            retired = target.parent / f".{target.name}.old-{os.getpid()}"
            if target.exists():
                target.rename(retired)
            temporary.rename(target)
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
