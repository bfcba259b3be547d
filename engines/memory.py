"""How much memory a piece of work takes at its peak, on Linux."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """grown: bytes of resident memory at the peak above those at the start; None where the system does not say."""

    grown: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure what happens inside; not for two pieces of work at once, since a process has one peak.

    Writing 5 to /proc/self/clear_refs forgets the peak so far: https://docs.kernel.org/filesystems/proc.html
    """
    peak, before = Peak(), _bytes("VmRSS")
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        before = None
    yield peak
    after = _bytes("VmHWM")
    if before is not None and after is not None:
        peak.grown = max(0, after - before)


def _bytes(key: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else int(found[1]) * 1024
