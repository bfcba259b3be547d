"""The work folder: what is reused, what is built again, and what is never touched."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmqexport.errors import ResourceError
from dmqexport.memory_watch import resident_bytes
from dmqexport.workspace import SilentReporter, Workspace, replacing, writable_folder


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class Stage:
    """Counts how often it is built."""

    def __init__(self, content: bytes = b"result") -> None:
        self.content = content
        self.built = 0

    def __call__(self, folder: Path) -> None:
        self.built += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "file.bin").write_bytes(self.content)


def workspace(root: Path, *, resume: bool = True) -> Workspace:
    return Workspace(root, SilentReporter(), resume=resume)


def test_a_stage_is_built_once_for_one_key(tmp_path: Path) -> None:
    stage = Stage()
    first = workspace(tmp_path).stage("plan", {"bits": 4}, stage)
    again = workspace(tmp_path).stage("plan", {"bits": 4}, stage)
    other = workspace(tmp_path).stage("plan", {"bits": 8}, stage)
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert first.path == again.path != other.path
    assert stage.built == 2
    assert (first.path / "sub" / "file.bin").read_bytes() == b"result"


def test_a_reused_stage_knows_what_it_cost(tmp_path: Path) -> None:
    first = workspace(tmp_path).stage("plan", {"bits": 4}, Stage())
    again = workspace(tmp_path).stage("plan", {"bits": 4}, Stage())
    assert again.cached
    assert again.built_seconds == first.built_seconds
    assert again.built_seconds is not None
    assert 0 < again.built_seconds <= first.seconds
    assert again.built_peak_rss_bytes == first.built_peak_rss_bytes
    assert (again.built_peak_rss_bytes or 0) > 2**20
    assert again.disk_bytes == first.disk_bytes == sum(p.stat().st_size for p in first.path.rglob("*.bin"))


def test_no_resume_builds_again(tmp_path: Path) -> None:
    stage = Stage()
    workspace(tmp_path).stage("plan", {}, stage)
    stage.content = b"another result"
    record = workspace(tmp_path, resume=False).stage("plan", {}, stage)
    assert not record.cached
    assert (record.path / "sub" / "file.bin").read_bytes() == b"another result"


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "sub" / "file.bin").write_bytes(b"resul"),
        lambda folder: (folder / "sub" / "file.bin").unlink(),
        lambda folder: shutil.rmtree(folder / "sub"),
        lambda folder: (folder / "stage.json").unlink(),
        lambda folder: (folder / "stage.json").write_text("{"),
        lambda folder: (folder / "stage.json").write_text("[]"),
    ],
    ids=["truncated", "file missing", "folder missing", "list missing", "list truncated", "list of a wrong kind"],
)
def test_a_damaged_stage_is_built_again(
    tmp_path: Path, harm: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    harm(workspace(tmp_path).stage("plan", {}, stage).path)
    record = workspace(tmp_path).stage("plan", {}, stage)
    assert not record.cached
    assert (record.path / "sub" / "file.bin").read_bytes() == b"result"
    assert "is damaged or of an older version" in caplog.text


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        workspace(tmp_path).stage("plan", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_sweeps_what_killed_builds_left_and_nothing_else(tmp_path: Path) -> None:
    name = ".plan-0123456789abcdef.tmp-"
    stale = tmp_path / f"{name}{dead_process()}"
    running = tmp_path / f"{name}{os.getpid()}"
    mine = tmp_path / f".notes.tmp-{dead_process()}"
    for folder in (stale, running, mine):
        folder.mkdir()
        (folder / "file").touch()
    workspace(tmp_path)
    assert (stale.exists(), running.exists(), mine.exists()) == (False, True, True)


def test_close_removes_only_an_empty_work_folder(tmp_path: Path) -> None:
    empty = workspace(tmp_path / "empty")
    empty.close()
    assert not empty.root.exists()
    used = workspace(tmp_path / "used")
    record = used.stage("plan", {}, Stage())
    used.close()
    assert record.path.is_dir()


def test_files_are_readable_by_those_whom_the_mask_allows(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        save_file({"x": np.zeros(3)}, folder / "x.safetensors")
        (folder / "x.safetensors").chmod(0o600)
        (folder / "tool").touch()
        (folder / "tool").chmod(0o700)

    mask = os.umask(0o022)
    try:
        path = workspace(tmp_path).stage("plan", {}, save).path
    finally:
        os.umask(mask)
    assert (path / "x.safetensors").stat().st_mode & 0o777 == 0o644
    assert (path / "tool").stat().st_mode & 0o700 == 0o700


# Places that cannot be written


def test_paths_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path / "file", "a file of that name"),
        (tmp_path / "file" / "below", "a part of the path is a file"),
        (Path("/proc/nowhere"), "cannot be written"),
        (tmp_path / ("x" * 300), "the name is too long"),
    ):
        with pytest.raises(ResourceError) as caught:
            writable_folder(path)
        assert says in str(caught.value)
        assert str(path) in str(caught.value)
        assert "choose another -o" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "quota"), "quota"),
        (OSError(errno.EROFS, "read-only", "/x/y"), "/x/y: cannot be written, the file system is read-only"),
        (PermissionError(errno.EACCES, "denied"), "permission denied"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_errors_of_the_disk_say_what_to_do(tmp_path: Path, error: Exception, says: str) -> None:
    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(ResourceError) as caught:
        workspace(tmp_path).stage("plan", {}, fail)
    assert says in str(caught.value)
    assert caught.value.hint is not None
    assert caught.value.__cause__ is error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder]).returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("writer", ["bytes", "numpy", "safetensors"])
def test_a_full_disk_is_told_whoever_writes(small_disk: Path, writer: str) -> None:
    def write(folder: Path) -> None:
        large = np.zeros(2**21, dtype=np.uint8)
        if writer == "bytes":
            (folder / "x").write_bytes(large.tobytes())
        elif writer == "numpy":
            np.save(folder / "x.npy", large)
        else:
            save_file({"x": large}, folder / "x.safetensors")

    place = workspace(small_disk / "work")
    kept = place.stage("export", {}, Stage())
    with pytest.raises(ResourceError, match="the disk is full"):
        place.stage("plan", {}, write)
    assert [path.name for path in place.root.iterdir()] == [kept.path.name]
    assert place.stage("export", {}, Stage()).cached


# Replacing a bundle


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with replacing(target) as folder:
        (folder / "file").write_text("one")

    def fail() -> None:
        with replacing(target) as folder:
            (folder / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "file").read_text() == "one"
    with replacing(target) as folder:
        (folder / "other").write_text("two")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_replacing_keeps_links(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "bundle"
    with replacing(real) as folder:
        (folder / "file").write_text("one")
    link = tmp_path / "link"
    link.symlink_to(real)
    with replacing(link) as folder:
        (folder / "file").write_text("two")
    assert link.is_symlink()
    assert (real / "file").read_text() == "two"


def test_killed_while_replacing(tmp_path: Path) -> None:
    """Between the two renames the old bundle has a hidden name; the next build puts it back before it starts."""
    process = dead_process()
    old, half = tmp_path / f".bundle.old-{process}", tmp_path / f".bundle.tmp-{process}"
    old.mkdir()
    (old / "file").write_text("old")
    half.mkdir()
    with pytest.raises(RuntimeError), replacing(tmp_path / "bundle"):
        raise RuntimeError
    assert (tmp_path / "bundle" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_replacing_fails_to_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    with replacing(target) as folder:
        (folder / "file").write_text("one")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EACCES, "denied", str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ResourceError), replacing(target) as folder:
        (folder / "file").write_text("two")
    assert (target / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_stage_that_takes_too_much_memory_ends_the_build_and_is_kept(tmp_path: Path) -> None:
    """--max-ram is kept to while a build runs: at the end of a stage, whose files stay, and where it tells progress."""
    workspace = Workspace(tmp_path, SilentReporter())
    built = []

    def build(folder: Path) -> None:
        block = bytearray(b"x") * 2**28
        built.append(len(block))
        (folder / "result").write_text("done", encoding="utf-8")

    def tells(folder: Path) -> None:
        block = bytearray(b"x") * 2**28
        workspace.reporter.progress(1, 2)
        built.append(len(block))

    workspace.memory_limit = resident_bytes(os.getpid()) + 2**27
    with pytest.raises(ResourceError, match=r"'large' uses .* --max-ram .*finished and kept") as caught:
        workspace.stage("large", {}, build)
    assert caught.value.exit_code == 5
    with pytest.raises(ResourceError, match=r"'telling' uses .*it was stopped"):
        workspace.stage("telling", {}, tells)
    assert len(built) == 1
    assert isinstance(workspace.reporter, SilentReporter)
    assert workspace.stage("large", {}, build).cached
    workspace.memory_limit = 2**20
    with pytest.raises(ResourceError, match=r"'next' uses .*it was not begun"):
        workspace.stage("next", {}, build)
    workspace.memory_limit = None
    assert not workspace.stage("telling", {}, tells).cached
