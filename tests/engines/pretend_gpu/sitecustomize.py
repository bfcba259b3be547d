# ruff: noqa: N802 - the driver's own names
"""With this folder in PYTHONPATH a machine without a GPU has one: its memory is the host's, its vendor `tensorrt` here.

Python imports this module before anything else, in children too, so the script that travels in bundles runs as it is.
Only what the vendors own is pretended: the driver checks what it is given (sizes, freed memory), the engine computes.
"""

import ctypes
import time
from typing import Any

INVALID_VALUE = 1


class PretendDriver:
    """The calls of libcuda that are made; every one returns its status, as the library's do."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.marks: dict[int, float] = {}
        self.peak = 0

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value: Any, key: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[key]
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"Pretended GPU"
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0 if context.value == 1 else INVALID_VALUE

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream._obj.value = 2
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        return 0 if stream.value == 2 else INVALID_VALUE

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.held[ctypes.addressof(block)] = block
        self.peak = max(self.peak, sum(len(held) for held in self.held.values()))
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        return 0 if self.held.pop(address.value, None) is not None else INVALID_VALUE

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        total._obj.value = 1 << 30
        free._obj.value = (1 << 30) - sum(len(held) for held in self.held.values())
        return 0

    def _copied(self, device: int, goal: int, source: int, size: int, stream: Any) -> int:
        if stream.value != 2 or device not in self.held or size > len(self.held[device]):
            return INVALID_VALUE
        ctypes.memmove(goal, source, size)
        return 0

    def cuMemcpyHtoDAsync_v2(self, goal: Any, source: Any, size: Any, stream: Any) -> int:
        return self._copied(goal.value, goal.value, source.value, size.value, stream)

    def cuMemcpyDtoHAsync_v2(self, goal: Any, source: Any, size: Any, stream: Any) -> int:
        return self._copied(source.value, goal.value, source.value, size.value, stream)

    def cuEventCreate(self, event: Any, flags: int) -> int:
        event._obj.value = 100 + len(self.marks)
        self.marks[event._obj.value] = 0.0
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        self.marks[event.value] = time.perf_counter()
        return 0

    def cuEventElapsedTime(self, elapsed: Any, first: Any, last: Any) -> int:
        elapsed._obj.value = 1000 * (self.marks[last.value] - self.marks[first.value])
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"invalid argument"
        return 0


_open_library = ctypes.CDLL


class _Library(_open_library):  # type: ignore[valid-type, misc]
    """`ctypes.CDLL`, but that it finds a driver."""

    def __new__(cls, name: Any = None, *arguments: Any, **options: Any) -> Any:
        return PretendDriver() if name == "libcuda.so.1" else _open_library(name, *arguments, **options)


ctypes.CDLL = _Library  # type: ignore[misc]
