"""Ranks as threads of one process: what they compute together is tested without starting processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy.typing as npt

from dmqexport.ranks import Ranks

Result = TypeVar("Result")
_SECONDS = 60


class _Shared:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.told = ""
        self.values: list[npt.NDArray[Any]] = [None] * size  # type: ignore[list-item]


class ThreadRanks:
    """One thread's place among `size`."""

    def __init__(self, rank: int, size: int, shared: _Shared) -> None:
        self.rank, self.size, self._shared = rank, size, shared

    def meet(self, where: str) -> None:
        self._shared.barrier.wait(_SECONDS)

    def tell(self, where: str, value: str) -> str:
        if self.rank == 0:
            self._shared.told = value
        self.meet(where)
        told = self._shared.told
        self.meet(where)
        return told

    def total(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._shared.values[self.rank] = values
        self.meet("sum")
        total = sum(self._shared.values[1:], start=self._shared.values[0].copy())
        self.meet("sum")
        return total


def together(size: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """Run `work` on `size` ranks at once; returns their results by rank. `work` must not share models between them."""
    shared = _Shared(size)

    def guarded(rank: int) -> Result:
        try:
            return work(ThreadRanks(rank, size, shared))
        except BaseException:
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))
