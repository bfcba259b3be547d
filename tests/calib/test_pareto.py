"""Hulls and their pooled edges against what the definition says: no point below, and the minimiser at every slope."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from calib.pareto import Point, lower_hull, pool

AMOUNTS = st.integers(0, 20)
CURVES = st.lists(st.tuples(AMOUNTS, AMOUNTS), min_size=1, max_size=8)


def points(curve: list[tuple[int, int]]) -> list[Point[int]]:
    return [Point(float(rate), float(value), index) for index, (rate, value) in enumerate(curve)]


def test_a_point_above_the_line_between_its_neighbours_is_no_vertex() -> None:
    hull = lower_hull(points([(2, 10), (3, 9), (4, 1), (5, 3)]))
    assert [vertex.rate for vertex in hull] == [2.0, 4.0]


@given(CURVES)
def test_hulls_are_convex_falling_and_below_every_point(curve: list[tuple[int, int]]) -> None:
    all_points = points(curve)
    hull = lower_hull(all_points)
    slopes = [(a.distortion - b.distortion) / (b.rate - a.rate) for a, b in pairwise(hull)]
    assert all(slope > 0 for slope in slopes)
    assert slopes == sorted(slopes, reverse=True)
    for slope in [0.0, 0.1, 0.5, 1.0, 3.0, 10.0]:
        best = min(point.distortion + slope * point.rate for point in all_points)
        assert min(vertex.distortion + slope * vertex.rate for vertex in hull) <= best + 1e-9


@given(st.lists(CURVES, min_size=1, max_size=4), st.integers(1, 39).map(lambda value: value / 13))
def test_taking_every_edge_steeper_than_a_slope_minimises_the_lagrangian(
    curves: list[list[tuple[int, int]]], slope: float
) -> None:
    hulls = [lower_hull(points(curve)) for curve in curves]
    at = [0] * len(hulls)
    for step in pool(hulls):
        if step.slope > slope:
            assert at[step.curve] == step.vertex - 1
            at[step.curve] = step.vertex
    reached = sum(h[v].distortion + slope * h[v].rate for h, v in zip(hulls, at, strict=True))
    least = sum(min(value + slope * rate for rate, value in curve) for curve in curves)
    assert abs(reached - least) < 1e-9
