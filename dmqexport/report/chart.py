"""Geometry of the error-by-timestep chart; the template draws it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dmqexport.report.document import Row, TimestepError
from dmqexport.report.heatmap import timesteps

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 26, 46
_LABEL_WIDTH = 62
_NUMBER_WIDTH = 46


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Band:
    """The timesteps that share one table row."""

    x: float
    width: float
    middle: float
    label: str
    title: str
    shaded: bool


@dataclass(frozen=True)
class Point:
    """One measured timestep."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Chart:
    """Everything that the template needs, in user units of the SVG."""

    points: tuple[Point, ...]
    lines: tuple[str, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bands: tuple[Band, ...]
    overall: float | None
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


def timestep_chart(
    measured: Sequence[TimestepError], rows: Sequence[Row], overall: float | None, *, width: int, height: int
) -> Chart | None:
    """Return the chart of eps SQNR over timesteps in `width` × `height` units, or None where nothing was measured."""
    series = sorted(measured, key=lambda point: point.timestep)
    values = [point.eps_sqnr_db for point in series if point.eps_sqnr_db is not None]
    if not values:
        return None
    if overall is not None:
        values.append(overall)
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP, height - _BOTTOM
    y_ticks = _ticks(min(values), max(values), 6)
    x_ticks = _ticks(
        min([point.timestep for point in series] + [row.timestep_min for row in rows]),
        max([point.timestep for point in series] + [row.timestep_max + 1 for row in rows]),
        max(2, (right - left) // _NUMBER_WIDTH),
    )

    def x(value: float) -> float:
        low, high = x_ticks[0], x_ticks[-1]
        return round(left + (value - low) / (high - low) * (right - left), 1)

    def y(value: float) -> float:
        low, high = y_ticks[0], y_ticks[-1]
        return round(bottom - (value - low) / (high - low) * (bottom - top), 1)

    points: list[Point] = []
    lines: list[list[str]] = [[]]
    for one in series:
        if one.eps_sqnr_db is None:
            lines.append([])  # a gap, not a line across what nobody measured
            continue
        place = Point(
            x(one.timestep),
            y(one.eps_sqnr_db),
            f"timestep {one.timestep}, row {one.row}: {one.eps_sqnr_db:.1f} dB over {one.samples} samples",
        )
        points.append(place)
        lines[-1].append(f"{place.x},{place.y}")
    return Chart(
        points=tuple(points),
        lines=tuple(" ".join(line) for line in lines if len(line) > 1),
        x_ticks=tuple(Tick(x(at), f"{at:g}") for at in x_ticks),
        y_ticks=tuple(Tick(y(at), f"{at:g}") for at in y_ticks),
        bands=tuple(_bands(rows, x)) if len(rows) > 1 else (),
        overall=None if overall is None else y(overall),
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
    )


def _bands(rows: Sequence[Row], x: Callable[[float], float]) -> Iterator[Band]:
    labelled_to = -math.inf
    for index, row in enumerate(sorted(rows, key=lambda row: row.timestep_min)):
        start, end = x(row.timestep_min), x(row.timestep_max + 1)
        middle = (start + end) / 2
        # Rows may be of uneven width, so what counts is the room since the last label.
        fits = middle - labelled_to >= _LABEL_WIDTH
        labelled_to = middle if fits else labelled_to
        yield Band(
            x=start,
            width=round(end - start, 1),
            middle=round(middle, 1),
            label=f"row {row.row}" if fits else "",
            title=f"row {row.row}: timesteps {timesteps(row)}",
            shaded=index % 2 == 1,
        )


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers that enclose low..high, at most `most` + 1 of them."""
    span = max(high - low, 0.5)  # a flat curve is flat: do not magnify its noise to the whole height
    magnitude = 10 ** math.floor(math.log10(span / most))
    step = next(
        step
        for factor in (1, 2, 5, 10, 20)
        if (math.ceil(high / (step := factor * magnitude)) - math.floor(low / step)) <= most
    )
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]
