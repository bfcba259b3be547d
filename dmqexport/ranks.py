"""Several processes that work on one build (ranks), as a stage sees them. `ALONE` is the ordinary build of one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy.typing as npt

Item = TypeVar("Item")


class Ranks(Protocol):
    """What ranks need of each other. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process, 0 to `size` - 1. Rank 0 assembles, reports and writes what the user asked for."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def meet(self, where: str) -> None:
        """Wait until every rank is here. Raises RankError as soon as one of them failed or died."""
        ...

    def tell(self, where: str, value: str) -> str:
        """Return rank 0's `value` on every rank; the others wait for it. Raises RankError likewise."""
        ...

    def total(self, values: "npt.NDArray[Any]") -> "npt.NDArray[Any]":
        """The sum of every rank's `values` (one shape and floating type), bit for bit the same on all of them.

        May change `values`. Raises RankError likewise.
        """
        ...


class Alone:
    """The only process."""

    rank = 0
    size = 1

    def meet(self, where: str) -> None:
        """Nobody to wait for."""

    def tell(self, where: str, value: str) -> str:
        """`value`."""
        return value

    def total(self, values: "npt.NDArray[Any]") -> "npt.NDArray[Any]":
        """`values`."""
        return values


ALONE = Alone()


def share(ranks: Ranks, items: Sequence[Item]) -> Sequence[Item]:
    """This rank's consecutive part of `items`; all ranks' parts make the whole, equally long but for one."""
    first, last = (round(len(items) * edge / ranks.size) for edge in (ranks.rank, ranks.rank + 1))
    return items[first:last]
