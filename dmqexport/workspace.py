"""The work folder: one directory a stage, named by the content of what went in, complete or absent.

Nothing that a user wrote is ever removed: only directories whose names this module invents.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dmqexport.errors import CalibrationError, ResourceError
from dmqexport.memory_watch import MemoryWatch, resident_bytes
from dmqexport.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

_DISK_ERRORS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_ACCESS_ERRORS = {errno.EROFS: "the file system is read-only", errno.EACCES: "permission denied", errno.EPERM: "denied"}
#: What making a folder can end in besides; elsewhere these mean a bug, not a wrong path.
_PATH_ERRORS = {
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "there is a file of that name",
    errno.ENOENT: "no folder can be made there",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links go in circles",
    errno.EINVAL: "the file system takes no such name",
}
#: Beside the files of a finished stage: their sizes, so that a truncated one is found before it is used.
_CONTENTS = "stage.json"
_FREE = "free space or choose another -o/--output or --work; finished stages are kept and the build resumes"
_LITTLE = 2**24
_CHOOSE = "choose another -o/--output or --work"
_LEFT_BEHIND = re.compile(r"\.[a-z-]+-[0-9a-f]{16}\.tmp-(\d+)")


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


class _Watching:
    """Passes everything on, and looks at something whenever there is progress."""

    def __init__(self, told: Reporter, look: Callable[[], None]) -> None:
        self.started, self.finished = told.started, told.finished
        self._told, self._look = told, look

    def progress(self, done: int, total: int) -> None:
        """Look, and pass it on."""
        self._look()
        self._told.progress(done, total)


@dataclass(frozen=True)
class StageRecord:
    """One finished stage: where its files lie and what it cost.

    seconds, peak_rss_bytes: of this call, so next to nothing for a reused stage. built_seconds, built_peak_rss_bytes:
    of the run that made the files; None for stages of older versions. cpu_seconds: processor time of that run, its
    child processes included. forwards: samples that the float denoiser answered in it. disk_bytes: of its files.
    """

    name: str
    path: Path
    fingerprint: str
    seconds: float
    cached: bool
    peak_rss_bytes: int
    built_seconds: float | None = None
    built_peak_rss_bytes: int | None = None
    cpu_seconds: float | None = None
    forwards: int | None = None
    disk_bytes: int | None = None


def content_key(parts: Mapping[str, Any]) -> str:
    """sha256 over canonical JSON, hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Workspace:
    """Stages are built in a temporary directory and renamed when complete: a killed build resumes at its last stage.

    Several processes (`ranks`) may work in one folder: each asks for the same stages, rank 0 looks them up and builds
    them, and the others wait, or lend a hand where a stage is shared.
    """

    def __init__(self, root: Path, reporter: Reporter, *, resume: bool = True, ranks: Ranks = ALONE) -> None:
        """Use `root` (created). resume=False ignores finished stages. Raises ResourceError when it is not writable.

        While a stage is built, the attribute `ranks` holds those that build it: all for a shared one, else one.
        """
        self.root = root
        self.reporter = reporter
        self.records: list[StageRecord] = []
        self.ranks = ranks
        self.forwards = 0
        #: Bytes of resident memory, child processes included, that stages must keep to; None: as much as there is.
        self.memory_limit: int | None = None
        self._resume = resume
        writable_folder(root)
        if ranks.rank == 0:
            self._sweep()

    def close(self) -> None:
        """Remove the work folder if no stage was finished in it: a mistyped command leaves nothing behind."""
        with contextlib.suppress(OSError):
            self.root.rmdir()

    def go_on_alone(self) -> bool:
        """Let the other ranks go once they are here; returns whether this one goes on (rank 0), and now by itself."""
        rank = self.ranks.rank
        self.ranks.meet("the end of the shared stages")
        self.ranks = ALONE
        return rank == 0

    def stage(
        self, name: str, key: Mapping[str, Any], build: Callable[[Path], None], *, shared: bool = False
    ) -> StageRecord:
        """Return the finished stage for `key`, running `build(directory)` unless it is there already and undamaged.

        shared: every rank runs `build`, on one directory that rank 0 fills from the parts of all (see `partial`).
        Raises ResourceError when the disk is full or cannot be written, and when more memory than `memory_limit` is
        used: before the stage, while it reports progress, or at its end, when its files are kept. Raises RankError when
        another rank failed, CalibrationError when the ranks do not agree what to build, and whatever `build` raises.
        """
        fingerprint = content_key({"stage": name, **key})
        final = self.root / f"{name}-{fingerprint[:16]}"
        self.reporter.started(name)
        start = time.perf_counter()
        everyone = self.ranks
        leads = everyone.rank == 0
        cached = leads and self._resume and final.is_dir() and _undamaged(final)
        temporary = self.root / f".{name}-{fingerprint[:16]}.tmp-{os.getpid()}"
        decided = everyone.tell(name, json.dumps([fingerprint, cached, temporary.name]))
        agreed, cached, chosen = json.loads(decided)
        if agreed != fingerprint:
            raise CalibrationError(
                f"rank {everyone.rank} asks for another {name!r} than rank 0: {fingerprint[:16]}, not {agreed[:16]}",
                hint="give every process the same command, files, packages and kind of processor",
            )
        if not cached:
            self.ranks = everyone if shared else ALONE
            try:
                with file_errors(self.root):
                    if leads:
                        self._build(temporary, final, build, start)
                    elif shared:
                        build(self.root / chosen)
            finally:
                self.ranks = everyone
            everyone.meet(name)
        seconds = time.perf_counter() - start
        built = _built(final)
        peak = resident_bytes(os.getpid()) if cached else built.get("peak_rss_bytes", 0)
        record = StageRecord(
            name,
            final,
            fingerprint,
            seconds,
            cached,
            peak,
            built_seconds=built.get("seconds"),
            built_peak_rss_bytes=built.get("peak_rss_bytes"),
            cpu_seconds=built.get("cpu_seconds"),
            forwards=built.get("forwards"),
            disk_bytes=sum(built["files"].values()),
        )
        self.records.append(record)
        self.reporter.finished(name, record.seconds, cached)
        if not cached and leads:
            self._check_memory(name, peak, "it is finished and kept")
        return record

    def _check_memory(self, stage: str, used: int, state: str) -> None:
        limit = self.memory_limit
        if limit is not None and used > limit:
            raise ResourceError(
                f"stage {stage!r} uses {used / 1e9:.2f} GB of memory, and --max-ram (max_ram) is {limit / 1e9:.2f} GB; "
                f"{state}",
                hint="the same command with a larger --max-ram goes on from the finished stages",
            )

    def _build(self, temporary: Path, final: Path, build: Callable[[Path], None], start: float) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            forwards, cpu = self.forwards, _cpu_seconds()
            self._check_memory(final.name.rpartition("-")[0], resident_bytes(os.getpid()), "it was not begun")
            with MemoryWatch() as watch, self._watched(watch, final.name.rpartition("-")[0]):
                build(temporary)
            _ordinary_modes(temporary)
            cost = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": _cpu_seconds() - cpu,
                "peak_rss_bytes": watch.peak_bytes,
                "forwards": self.forwards - forwards,
            }
            _write_contents(temporary, cost)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _watched(self, watch: MemoryWatch, stage: str) -> Iterator[None]:
        """Whenever the running stage says how far it is, look what memory it has taken."""
        if self.memory_limit is None:
            yield
            return
        told = self.reporter

        def look() -> None:
            used = max(watch.peak_bytes, resident_bytes(os.getpid()))
            self._check_memory(stage, used, "it was stopped")

        self.reporter = _Watching(told, look)
        try:
            yield
        finally:
            self.reporter = told

    @contextmanager
    def partial(self, name: str, key: Mapping[str, Any]) -> Iterator[Path]:
        """A folder for unfinished work of stage `name` with `key`: it survives a kill, and goes when all is done.

        Of a shared stage every rank must enter and leave it; nobody goes on before all have, nor is it removed before.
        """
        folder = self.root / f".{name}-{content_key({'stage': name, **key})[:16]}.partial"
        if self.ranks.rank == 0:
            if not self._resume:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        self.ranks.meet(name)
        yield folder
        self.ranks.meet(name)
        if self.ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed builds left behind; a directory of a live process is left alone."""
        for path in self.root.glob(".*.tmp-*"):
            match = _LEFT_BEHIND.fullmatch(path.name)
            if match is not None and not _alive(int(match[1])):
                shutil.rmtree(path, ignore_errors=True)


def _write_contents(folder: Path, cost: Mapping[str, float]) -> None:
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    document = {"files": sizes, **cost}
    (folder / _CONTENTS).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _built(folder: Path) -> dict[str, Any]:
    """What the run that finished the stage cost, and its files."""
    document: dict[str, Any] = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
    return document


def _cpu_seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _undamaged(folder: Path) -> bool:
    """Whether every file has the size it was finished with; a stage of a disk that lost data is built again."""
    try:
        expected = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))["files"]
        intact = all((folder / name).stat().st_size == size for name, size in expected.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        logger.warning("%s is damaged or of an older version; the stage is built again", folder)
    return intact


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _ordinary_modes(folder: Path) -> None:
    """Give files the permissions that `open` would: safetensors makes its files private, which breaks deployment."""
    mask = os.umask(0)
    os.umask(mask)
    for path in _files(folder):
        if not path.is_symlink():
            path.chmod((path.stat().st_mode & 0o111 | 0o666) & ~mask)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def writable_folder(path: Path) -> None:
    """Make `path` and its parents, and prove that a file can be written there; raises ResourceError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = {**_PATH_ERRORS, **_ACCESS_ERRORS, **_DISK_ERRORS}.get(error.errno or 0)
        if reason is None:
            raise
        raise ResourceError(f"{path}: cannot be written, {reason}", hint=_CHOOSE) from error


@contextmanager
def file_errors(where: Path) -> Iterator[None]:
    """Turn full disks and missing permissions into a ResourceError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise ResourceError(
                f"{where}: {_DISK_ERRORS[error.errno]}",
                hint=_FREE,
            ) from error
        if error.errno in _ACCESS_ERRORS:
            raise ResourceError(
                f"{error.filename or where}: cannot be written, {_ACCESS_ERRORS[error.errno]}",
                hint=_CHOOSE,
            ) from error
        if _says_disk_full(error, where):
            raise ResourceError(f"{where}: {_DISK_ERRORS[errno.ENOSPC]}", hint=_FREE) from error
        raise
    except Exception as error:
        if _says_disk_full(error, where):
            raise ResourceError(f"{where}: {_DISK_ERRORS[errno.ENOSPC]}", hint=_FREE) from error
        raise


def _says_disk_full(error: Exception, where: Path) -> bool:
    """Libraries report a full disk in exceptions of their own; numpy says only how much it could write."""
    text = str(error)
    if "No space left" in text or "os error 28" in text:
        return True
    folder = next((path for path in (where, *where.parents) if path.is_dir()), Path())
    return "requested and" in text and "written" in text and shutil.disk_usage(folder).free < _LITTLE


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that takes the place of `target` when the block succeeds.

    When it fails or is killed, `target` is what it was. Raises ResourceError for disks and permissions.
    """
    target = target.resolve()  # what a link points to is replaced, not the link
    writable_folder(target.parent)
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    retired = target.parent / f".{target.name}.old-{os.getpid()}"
    with file_errors(target):
        _recover(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _ordinary_modes(temporary)
            if target.exists():
                target.rename(retired)
            try:
                temporary.rename(target)
            except BaseException:
                if retired.exists():
                    retired.rename(target)
                raise
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)


def _recover(target: Path) -> None:
    """Clean up after killed builds: put a retired bundle back if it was not replaced, remove half-written ones."""
    for kind in ("old", "tmp"):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            owner = path.name.rpartition("-")[2]
            if not owner.isdigit() or _alive(int(owner)):
                continue
            if kind == "old" and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)
