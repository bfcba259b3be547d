"""The allocator against brute force on instances small enough to try everything, and what must always hold."""

from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calib.allocation_problem import Problem, Resource, Solution, solve_integer, solve_lagrangian
from calib.candidates import WidthPair
from dmqexport.errors import CalibrationError, RecipeError

WIDTHS = (2, 4, 8)
PAIRS = tuple(WidthPair(weight, activation) for weight, activation in product(WIDTHS, (4, 8)))
SOLVERS = pytest.mark.parametrize("solve", [solve_lagrangian, solve_integer], ids=["lagrangian", "integer"])


def averages(curves: Mapping[str, Mapping[WidthPair, float]], sizes: list[int], limits: tuple[float, float]) -> Problem:
    """Two budgets, as `--bits` makes them; layers b and c read one tensor."""
    total = sum(sizes)
    layers = dict(zip(curves, sizes, strict=True))

    def table(side: str) -> dict[str, dict[WidthPair, float]]:
        return {
            name: {pair: getattr(pair, side) * layers[name] / total for pair in curve} for name, curve in curves.items()
        }

    groups = tuple((name,) for name in curves if name not in ("b", "c"))
    shared = tuple(name for name in curves if name in ("b", "c"))
    return Problem(
        curves,
        (*groups, shared) if shared else groups,
        (
            Resource("average weight bits", table("weight"), limits[0]),
            Resource("average activation bits", table("activation"), limits[1]),
        ),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    names = "abcd"[: draw(st.integers(1, 4))]
    value = st.integers(1, 1000)
    curves = {}
    for name in names:
        found = {pair: draw(value) / 1000 for pair in PAIRS}
        curves[name] = {found_pair: amount / (found_pair.weight or 1) for found_pair, amount in found.items()}
    sizes = draw(st.lists(st.integers(1, 50), min_size=len(names), max_size=len(names)))
    limits = (draw(st.integers(20, 80)) / 10, draw(st.integers(40, 80)) / 10)
    return averages(curves, sizes, limits)


def everything(problem: Problem) -> list[dict[str, WidthPair]]:
    found = []
    for combination in product(*(list(curve) for curve in problem.curves.values())):
        choice = dict(zip(problem.curves, combination, strict=True))
        shared = all(len({choice[name].activation for name in group}) == 1 for group in problem.groups)
        if shared and all(resource.holds(choice) for resource in problem.resources):
            found.append(choice)
    return found


def check(problem: Problem, solution: Solution) -> None:
    assert all(resource.holds(solution.choice) for resource in problem.resources)
    assert all(len({solution.choice[name].activation for name in group}) == 1 for group in problem.groups)
    assert solution.predicted == pytest.approx(problem.distortion(solution.choice))
    assert 0 <= solution.gap < 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_the_integer_answer_is_what_brute_force_finds_and_the_bound_holds(problem: Problem) -> None:
    least = min(problem.distortion(choice) for choice in everything(problem))
    exact, slopes = solve_integer(problem), solve_lagrangian(problem)
    check(problem, exact)
    check(problem, slopes)
    assert exact.predicted == pytest.approx(least, rel=2e-5)
    assert slopes.predicted >= least * (1 - 1e-9)
    assert exact.bound <= least * (1 + 1e-6)
    assert slopes.bound <= least * (1 + 1e-6)
    assert all(value >= -1e-9 for value in exact.multipliers.values())


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.integers(1, 30))
def test_a_larger_budget_never_costs_distortion(problem: Problem, more: int) -> None:
    wider = Problem(
        problem.curves,
        problem.groups,
        tuple(Resource(part.name, part.cost, part.limit + more / 10) for part in problem.resources),
    )
    assert solve_integer(wider).predicted <= solve_integer(problem).predicted * (1 + 2e-5)
    assert solve_lagrangian(wider).bound <= solve_lagrangian(problem).bound * (1 + 1e-9)


def test_lambda_is_the_slope_at_the_solution() -> None:
    pair = {bits: WidthPair(bits, None) for bits in (2, 4, 8)}
    curve = {pair[2]: 8.0, pair[4]: 4.0, pair[8]: 2.0}
    cost = {name: {pair[bits]: float(bits) for bits in (2, 4, 8)} for name in ("a", "b")}
    problem = Problem({"a": curve, "b": curve}, (("a",), ("b",)), (Resource("bits", cost, 10.0),))
    # Both at 4 spend 8; the next edges go to 8 bits and save 2 over 4 bits.
    for solution in (solve_lagrangian(problem), solve_integer(problem)):
        assert dict(solution.choice) == {"a": pair[4], "b": pair[4]}
        assert solution.multipliers["bits"] == pytest.approx(0.5)
    assert solve_lagrangian(problem).bound == pytest.approx(7.0)  # half of an edge, which no integer choice can take
    assert solve_integer(problem).gap == pytest.approx(0.0, abs=1e-9)
    assert solve_integer(Problem(problem.curves, problem.groups, (Resource("bits", cost, 12.0),))).predicted == 6.0


@SOLVERS
def test_without_budgets_every_layer_takes_its_best(solve: object) -> None:
    curves = {"a": {PAIRS[0]: 3.0, PAIRS[1]: 1.0, PAIRS[2]: 2.0}}
    assert callable(solve)
    assert dict(solve(Problem(curves, (("a",),), ())).choice) == {"a": PAIRS[1]}


@SOLVERS
def test_a_budget_below_the_least_possible_is_refused_with_both_figures(solve: object) -> None:
    curves = {"a": dict.fromkeys(PAIRS, 1.0)}
    assert callable(solve)
    with pytest.raises(RecipeError, match=r"average weight bits of at most 1\.5 asked for, the least possible is 2"):
        solve(averages(curves, [10], (1.5, 8.0)))


def test_readers_of_one_tensor_without_a_common_width_are_refused() -> None:
    curves = {"b": {WidthPair(4, 4): 1.0}, "c": {WidthPair(4, 8): 1.0}}
    with pytest.raises(RecipeError, match="b, c read one tensor"):
        solve_integer(averages(curves, [1, 1], (8.0, 8.0)))


def test_a_layer_in_no_group_is_refused() -> None:
    with pytest.raises(CalibrationError, match="exactly one group"):
        Problem({"a": {PAIRS[0]: 1.0}}, (), ())


def test_standard_output_stays_clean(capfd: pytest.CaptureFixture[str]) -> None:
    curves = {name: {pair: 1 / pair.weight + 1 / (pair.activation or 1) for pair in PAIRS} for name in "abcd"}
    solve_integer(averages(curves, [3, 5, 7, 11], (4.3, 5.1)))  # type: ignore[arg-type]
    assert capfd.readouterr().out == ""
