"""Peaks of memory: this process's own, and those of the processes that it starts."""

import subprocess
import sys

from dmqexport.memory_watch import MemoryWatch, resident_bytes

_SIZE = 200 * 2**20
_CHILD = f"import time; block = bytearray(b'x') * {_SIZE}; time.sleep(1.5)"


def test_a_peak_is_seen_after_it_is_over() -> None:
    with MemoryWatch() as before:
        pass
    with MemoryWatch() as during:
        block = bytearray(b"x") * _SIZE
        del block
    assert during.peak_bytes - before.peak_bytes > 0.8 * _SIZE


def test_an_earlier_peak_does_not_count() -> None:
    block = bytearray(b"x") * _SIZE
    with MemoryWatch() as high:
        pass
    del block
    with MemoryWatch() as low:
        pass
    assert high.peak_bytes - low.peak_bytes > 0.8 * _SIZE


def test_child_processes_count() -> None:
    with MemoryWatch() as alone:
        pass
    with MemoryWatch() as together:
        subprocess.run([sys.executable, "-c", _CHILD], check=True)
    assert together.peak_bytes - alone.peak_bytes > 0.8 * _SIZE


def test_a_process_that_is_gone_has_no_memory() -> None:
    assert resident_bytes(2**22 + 1) == 0
