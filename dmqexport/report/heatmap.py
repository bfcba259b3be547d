"""The layer × row heat map: blocks of layers, and one strip of coloured cells a layer.

Bright is bad: error stands out in light and in dark, and in print, from cells that are fine.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from dmqexport.report.document import Layer, Row

LEVELS = 24
OUTSIDE = "outside the blocks"

# Every 32nd of matplotlib's 256 viridis colours; linear steps between them are off by less than the eye sees.
_VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")


@dataclass(frozen=True)
class Scale:
    """The decibels that the ends of the colour scale stand for; cells beyond an end take its colour."""

    worst: float
    best: float

    def level(self, value: float) -> int:
        """Return the colour of a cell: 0 for `best` and above, LEVELS - 1 for `worst` and below."""
        share = (self.best - value) / (self.best - self.worst)
        return min(LEVELS - 1, max(0, int(share * LEVELS)))


@dataclass(frozen=True)
class Cell:
    """Neighbouring rows of one colour."""

    start: int
    length: int
    level: int


@dataclass(frozen=True)
class Strip:
    """The rows of one layer, or of one block at its worst."""

    name: str
    short: str
    cells: tuple[Cell, ...]
    values: str
    worst: float | None
    worst_row: str
    note: str


@dataclass(frozen=True)
class Block:
    """Layers under one name, in the order in which they run, and their worst cell of every row."""

    name: str
    worst: Strip
    layers: tuple[Strip, ...]
    opened: bool


def colours() -> list[str]:
    """Return LEVELS colours, from best (dark) to worst (bright)."""
    anchors = [tuple(int(colour[at : at + 2], 16) for at in (0, 2, 4)) for colour in _VIRIDIS]
    result = []
    for level in range(LEVELS):
        place = level / (LEVELS - 1) * (len(anchors) - 1)
        below = min(int(place), len(anchors) - 2)
        mixed = (round(a + (b - a) * (place - below)) for a, b in zip(anchors[below], anchors[below + 1], strict=True))
        result.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return result


def fit_scale(layers: Sequence[Layer]) -> Scale | None:
    """Return ends in whole fives that all but the outermost hundredth of the cells fit between."""
    values = sorted(value for layer in layers for value in layer.sqnr_by_row if value is not None)
    if not values:
        return None
    last = len(values) - 1
    worst = 5 * math.floor(values[math.floor(last * 0.01)] / 5)
    best = 5 * math.ceil(values[math.ceil(last * 0.99)] / 5)
    return Scale(worst, max(best, worst + 5))


def blocks(layers: Sequence[Layer], rows: Sequence[Row], scale: Scale, *, open_up_to: int = 80) -> list[Block]:
    """Return the layers block by block; a long list opens only at its three worst blocks."""
    names = _block_names([layer.name for layer in layers])
    order = sorted(range(len(layers)), key=lambda index: (list(names).index(names[index]), index))
    grouped = [(name, [layers[at] for at in part]) for name, part in groupby(order, key=lambda index: names[index])]
    worst = {name: _worst_by_row(members) for name, members in grouped}
    lowest = sorted(worst, key=lambda name: min((v for v in worst[name] if v is not None), default=math.inf))
    opened = set(worst) if len(layers) <= open_up_to else set(lowest[:3])
    return [
        Block(
            name,
            _strip(name, name, worst[name], rows, scale, f"{len(members)} layers"),
            tuple(
                _strip(layer.name, _short_name(layer.name, name), layer.sqnr_by_row, rows, scale, layer.compute)
                for layer in members
            ),
            name in opened,
        )
        for name, members in grouped
    ]


def timesteps(row: Row) -> str:
    """Return the timesteps of a row as '100–199'."""
    return str(row.timestep_min) if row.timestep_min == row.timestep_max else f"{row.timestep_min}–{row.timestep_max}"


def _strip(
    name: str, short: str, values: Sequence[float | None], rows: Sequence[Row], scale: Scale, note: str
) -> Strip:
    known = [(value, index) for index, value in enumerate(values) if value is not None]
    worst = min(known, default=None)
    cells, start = [], 0
    for level, run in groupby(None if value is None else scale.level(value) for value in values):
        length = len(list(run))
        if level is not None:
            cells.append(Cell(start, length, level))
        start += length
    return Strip(
        name=name,
        short=short,
        cells=tuple(cells),
        values=",".join("" if value is None else f"{value:.1f}" for value in values),
        worst=None if worst is None else worst[0],
        worst_row="" if worst is None else timesteps(rows[worst[1]]),
        note=note,
    )


def _worst_by_row(layers: Sequence[Layer]) -> list[float | None]:
    return [
        min((value for value in column if value is not None), default=None)
        for column in zip(*(layer.sqnr_by_row for layer in layers), strict=True)
    ]


def _block_names(names: Sequence[str]) -> list[str]:
    """Return the block of every layer: the first part of its name, with the number that follows."""
    parts = [_split(name) for name in names]
    shared = 0
    # A wrapper's prefix ("unet.") says nothing; a list's name does, so stop before one that a number follows.
    while len(parts) > 1 and len({tuple(part[: shared + 1]) for part in parts}) == 1:
        if any(len(part) <= shared + 1 or part[shared + 1].isdigit() for part in parts):
            break
        shared += 1
    keys = []
    for part in (part[shared:] for part in parts):
        if len(part) < 2:
            keys.append(OUTSIDE)
        else:
            keys.append(".".join(part[:2]) if part[1].isdigit() else part[0])
    return keys


def _split(name: str) -> list[str]:
    return [part for part in re.split(r"[./]", name) if part] or [name]


def _short_name(name: str, block: str) -> str:
    found = name.find(f"{block}.")
    return name if found < 0 else name[found + len(block) + 1 :] or name
