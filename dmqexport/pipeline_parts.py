"""Stages made in parts: every part a file, made by one rank or another, kept until the stage is whole.

A killed build makes only the parts that are missing, and what comes out does not depend on how many ranks there were:
parts are cut by what is computed, not by who computes it, and put together in order.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from dmqexport.ranks import Ranks, share

Progress = Callable[[int, int], None]


def make_parts(
    ranks: Ranks, folder: Path, name: str, count: int, make: Callable[[int, Path], None], progress: Progress
) -> list[Path]:
    """Return `count` safetensors files `name-NNNNN` of `folder`, all there on every rank; `make` writes missing ones.

    name: says how parts are cut, so that those of another cut (a resumed build may have smaller batches) are not taken
    for these. make(number, path): writes part `number` to `path`. Raises RankError when another rank failed.
    """
    paths = [folder / f"{name}-{number:05d}.safetensors" for number in range(count)]
    kept = "".join("1" if _is_whole(path) else "0" for path in paths)
    where = folder.name.strip(".").rpartition("-")[0]  # the stage
    missing = [number for number, digit in enumerate(ranks.tell(where, kept)) if digit == "0"]
    mine = share(ranks, missing)
    for done, number in enumerate(mine, start=1):
        temporary = paths[number].with_suffix(f".tmp-{ranks.rank}")
        make(number, temporary)
        temporary.replace(paths[number])
        progress(min(count, count - len(missing) + done * ranks.size), count)
    ranks.meet(where)
    return paths


def chunks(count: int, most: int) -> list[range]:
    """Cut 0 to `count` - 1 into `most` consecutive ranges, or into `count` when that is less."""
    pieces = np.array_split(np.arange(count), min(count, most))
    return [range(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]


def _is_whole(path: Path) -> bool:
    """Whether a file is there and as long as its header says: a disk that lost data cannot pass for a finished part."""
    if not path.is_file():
        return False
    try:
        with safe_open(str(path), framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False
