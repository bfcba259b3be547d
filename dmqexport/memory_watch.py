"""How much memory a stretch of work takes, processes that it starts included."""

import os
import resource
import threading
from pathlib import Path

_INTERVAL_S = 0.2
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class MemoryWatch:
    """Context manager; afterwards `peak_bytes` is the largest resident set of this process and its descendants.

    On Linux the process's own peak is exact and that of descendants is sampled; elsewhere it is the process's own since
    its start.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        _forget_own_peak()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, own_peak_bytes())

    def _watch(self) -> None:
        while not self._end.wait(_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, resident_bytes(os.getpid()))


def resident_bytes(process: int) -> int:
    """Resident set of a process and its descendants now; 0 where the system does not say."""
    total, open_ids = 0, [process]
    while open_ids:
        current = open_ids.pop()
        try:
            total += int(Path(f"/proc/{current}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
            for thread in Path(f"/proc/{current}/task").iterdir():
                open_ids += [int(child) for child in (thread / "children").read_text(encoding="ascii").split()]
        except (OSError, ValueError, IndexError):
            continue  # it has just ended, or this is no Linux
    return total


def own_peak_bytes() -> int:
    """Largest resident set of this process since `_forget_own_peak`, or since its start where that does not work."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _forget_own_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark; see proc(5)
    except OSError:
        return
