"""Lower convex hulls of rate-distortion points, and all of them pooled by slope: every Lagrangian solution at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Point(Generic[Choice]):
    """What a choice costs and how much it distorts."""

    rate: float
    distortion: float
    choice: Choice


@dataclass(frozen=True)
class Step:
    """One edge of a hull: curve `curve` moves to its vertex `vertex`; slope: distortion saved for a unit of rate."""

    slope: float
    curve: int
    vertex: int


def lower_hull(points: Sequence[Point[Choice]]) -> list[Point[Choice]]:
    """The vertices of the falling part of the lower convex hull, by rising rate (Andrew's monotone chain)."""
    hull: list[Point[Choice]] = []
    for point in sorted(points, key=lambda item: (item.rate, item.distortion)):
        if hull and point.distortion >= hull[-1].distortion:
            continue  # costs more and is no better
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        if not hull or point.rate > hull[-1].rate:
            hull.append(point)
    return hull


def pool(hulls: Sequence[Sequence[Point[Choice]]]) -> list[Step]:
    """The edges of all hulls, steepest first; ties by curve, so that the order is one and the same everywhere.

    Taking every edge of slope > λ is the minimiser of Σ D + λ Σ R: hulls are convex, so no edge comes before its
    predecessor on the same curve.
    """
    steps = [
        Step(_slope(hull[vertex - 1], hull[vertex]), curve, vertex)
        for curve, hull in enumerate(hulls)
        for vertex in range(1, len(hull))
    ]
    return sorted(steps, key=lambda step: (-step.slope, step.curve, step.vertex))


def _slope(left: Point[Choice], right: Point[Choice]) -> float:
    """Distortion saved for each unit of rate; positive, and falling along a convex hull."""
    return (left.distortion - right.distortion) / max(right.rate - left.rate, 1e-300)
