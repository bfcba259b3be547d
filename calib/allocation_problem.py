"""Bit allocation as a problem: curves, tensors shared by several layers, and budgets; and how it is solved.

minimise Σ_l D_l(w_l, a_l)  subject to  Σ_l cost_r(l, w_l, a_l) ≤ limit_r  for every budget r,  a_l = a_m where layers
l and m read one tensor. Three answers: the Lagrangian one of DMQ, the integer optimum, and the bound that certifies
both.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array

from calib.candidates import WidthPair
from calib.pareto import Point, lower_hull, pool
from dmqexport.errors import CalibrationError, RecipeError

_GAP = 1e-5  # at which the integer search stops
_NODES = 200_000  # a count, not seconds, so that a slow machine allocates alike
_TIE = 1e-9
_OBJECTIVE = 1e4
_RETRIES = 8


@dataclass(frozen=True)
class Resource:
    """One budget: what each layer spends at each pair, and how much there is. Every layer of the problem is listed."""

    name: str
    cost: Mapping[str, Mapping[WidthPair, float]]
    limit: float

    def used(self, choice: Mapping[str, WidthPair]) -> float:
        """What a choice spends."""
        return float(sum(self.cost[name][pair] for name, pair in choice.items()))

    def holds(self, choice: Mapping[str, WidthPair]) -> bool:
        """Whether a choice stays within the limit, rounding of the sum aside."""
        return self.used(choice) <= self.limit * (1 + 1e-12) + 1e-12


@dataclass(frozen=True)
class Problem:
    """curves: layer → pair → distortion (a pinned layer has one pair); groups: layers that share their activation."""

    curves: Mapping[str, Mapping[WidthPair, float]]
    groups: tuple[tuple[str, ...], ...]
    resources: tuple[Resource, ...]

    def __post_init__(self) -> None:
        grouped = [name for group in self.groups for name in group]
        if sorted(grouped) != sorted(self.curves):
            raise CalibrationError("every layer must be in exactly one group, and every grouped layer have a curve")

    def distortion(self, choice: Mapping[str, WidthPair]) -> float:
        """Predicted distortion of a choice: the sum over its layers."""
        return float(sum(self.curves[name][pair] for name, pair in choice.items()))


@dataclass(frozen=True)
class Solution:
    """A choice within all budgets.

    predicted: Σ D; bound: no choice has less (the Lagrangian dual, or the integer search's, whichever is higher);
    multipliers: λ of every resource at the relaxed optimum, distortion saved for one more unit.
    """

    choice: Mapping[str, WidthPair]
    predicted: float
    bound: float
    multipliers: Mapping[str, float]

    @property
    def gap(self) -> float:
        """Certified: at most this share of `predicted` could be saved."""
        return max(0.0, (self.predicted - self.bound) / max(self.predicted, 1e-300))


@dataclass(frozen=True)
class _Program:
    """Columns of the linear program: one a (layer, pair), then one a (shared group, activation)."""

    columns: list[tuple[str, WidthPair]]
    objective: npt.NDArray[np.float64]
    equality: csr_array
    equals: npt.NDArray[np.float64]
    budget: csr_array
    limits: npt.NDArray[np.float64]
    scale: float

    def choice(self, values: npt.NDArray[np.float64]) -> dict[str, WidthPair]:
        """The pair of every layer with the largest value."""
        best: dict[str, tuple[float, WidthPair]] = {}
        for (name, pair), value in zip(self.columns, values, strict=False):
            if name not in best or value > best[name][0]:
                best[name] = (float(value), pair)
        return {name: pair for name, (_, pair) in best.items()}


def solve_lagrangian(problem: Problem) -> Solution:
    """DMQ: on every curve the point of slope λ. λ comes from the relaxed problem; hull edges are taken steepest first.

    With several budgets the rate is Σ λ_r · cost_r. Edges that no longer fit are left, flatter ones of other layers may
    still fit. Raises RecipeError when even the cheapest choice exceeds a budget.
    """
    _check_feasible(problem)
    bound, multipliers = _relaxed(problem)
    found = _walk(problem, multipliers)
    choice = solve_integer(problem).choice if found is None else found
    return Solution(choice, problem.distortion(choice), bound, multipliers)


def solve_integer(problem: Problem) -> Solution:
    """The optimum over integer widths, by HiGHS' branch and bound; the gap is certified by its dual bound.

    Raises RecipeError when no choice fits the budgets.
    """
    _check_feasible(problem)
    relaxed, multipliers = _relaxed(problem)
    incumbent = _walk(problem, multipliers)
    # HiGHS also stops at an absolute gap of 1e-6, so the objective must not be small.
    program = _program(problem, max(relaxed, 1e-300) / _OBJECTIVE)
    limits = program.limits.copy()
    for _ in range(_RETRIES):
        constraints = [LinearConstraint(program.equality, program.equals, program.equals)]
        if problem.resources:
            constraints.append(LinearConstraint(program.budget, -np.inf, limits))
        with _silenced():
            found = milp(
                program.objective,
                constraints=constraints,
                bounds=Bounds(0, 1),
                integrality=np.ones(len(program.objective)),
                options={"mip_rel_gap": _GAP, "node_limit": _NODES},
            )
        if found.x is None and incumbent is None:
            raise RecipeError(_infeasible(problem), hint="widen the budget, or allow fewer bits")
        choice = incumbent if found.x is None else program.choice(found.x)
        assert choice is not None
        exceeded = np.array([not resource.holds(choice) for resource in problem.resources], dtype=bool)
        if not exceeded.any():
            if incumbent is not None and problem.distortion(incumbent) < problem.distortion(choice):
                choice = incumbent  # equal up to the search's tolerance
            dual = relaxed if found.mip_dual_bound is None else float(found.mip_dual_bound) * program.scale
            predicted = problem.distortion(choice)
            return Solution(choice, predicted, min(max(dual, relaxed), predicted), multipliers)
        # HiGHS accepts a violation of 1e-6 of a row; a budget does not.
        limits = limits - exceeded * 2e-6
    raise CalibrationError("the integer search keeps exceeding its budget by rounding: report these curves")


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing on standard output meanwhile: HiGHS prints notes of its own there, past every option (scipy 1.17)."""
    sys.stdout.flush()
    library = ctypes.CDLL(None)
    library.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        library.fflush(None)  # what C has buffered belongs to the void too
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _walk(problem: Problem, multipliers: Mapping[str, float]) -> dict[str, WidthPair] | None:
    """Hull edges from the cheapest choice on, steepest first, as far as budgets go; None if the start does not fit."""
    largest = max((multipliers[r.name] * r.limit for r in problem.resources), default=0.0)
    # A budget that does not bind costs next to nothing, but not nothing: it must not be exceeded for nothing.
    weights = {
        r.name: max(multipliers[r.name], max(largest, _TIE) * _TIE / max(r.limit, 1e-300)) for r in problem.resources
    }
    hulls = [lower_hull(_group_points(problem, group, weights)) for group in problem.groups]
    at = [0] * len(hulls)
    choice = {name: pair for hull in hulls for name, pair in hull[0].choice.items()}
    if not all(resource.holds(choice) for resource in problem.resources):
        return None  # budgets at odds with each other: only the exact search is sure
    for step in pool(hulls):
        if at[step.curve] != step.vertex - 1:
            continue
        moved = {**choice, **hulls[step.curve][step.vertex].choice}
        if all(resource.holds(moved) for resource in problem.resources):
            choice, at[step.curve] = moved, step.vertex
    return choice


def _relaxed(problem: Problem) -> tuple[float, dict[str, float]]:
    """(bound, λ by resource) of the linear relaxation; for this problem that is the Lagrangian dual optimum."""
    program = _program(problem)
    found = linprog(
        program.objective,
        A_ub=program.budget if problem.resources else None,
        b_ub=program.limits if problem.resources else None,
        A_eq=program.equality,
        b_eq=program.equals,
        bounds=(0, None),
        method="highs",
    )
    if found.x is None:
        raise RecipeError(_infeasible(problem), hint="widen the budget, or allow fewer bits")
    marginals = found.ineqlin.marginals if problem.resources else []
    multipliers = {
        resource.name: float(-marginal) * program.scale / max(resource.limit, 1e-300)
        for resource, marginal in zip(problem.resources, marginals, strict=True)
    }
    return float(found.fun) * program.scale, multipliers


def _program(problem: Problem, scale: float | None = None) -> _Program:
    """Budgets are scaled to limit 1 and the objective by `scale`, so that tolerances mean the same everywhere."""
    columns = [(name, pair) for group in problem.groups for name in group for pair in problem.curves[name]]
    if scale is None:
        scale = max(sum(min(curve.values()) for curve in problem.curves.values()), 1e-300) / _OBJECTIVE
    objective = [problem.curves[name][pair] / scale for name, pair in columns]
    entries: list[tuple[int, int, float]] = []
    equals: list[float] = []
    of_layer: dict[str, list[int]] = {}
    for index, (name, _) in enumerate(columns):
        of_layer.setdefault(name, []).append(index)
    for indices in of_layer.values():
        entries += [(len(equals), index, 1.0) for index in indices]
        equals.append(1.0)
    count = len(columns)
    for group in problem.groups:
        if len(group) < 2:
            continue
        shared = {pair.activation for name in group for pair in problem.curves[name]}
        for activation in sorted(shared, key=lambda bits: bits or 0):
            for name in group:
                entries += [(len(equals), i, 1.0) for i in of_layer[name] if columns[i][1].activation == activation]
                entries.append((len(equals), count, -1.0))
                equals.append(0.0)
            count += 1
            objective.append(0.0)
    rows, places, values = (np.array(part) for part in zip(*entries, strict=True))
    budget = np.zeros((len(problem.resources), count))
    for row, resource in enumerate(problem.resources):
        for index, (name, pair) in enumerate(columns):
            budget[row, index] = resource.cost[name][pair] / max(resource.limit, 1e-300)
    return _Program(
        columns,
        np.array(objective),
        csr_array(coo_array((values, (rows, places)), shape=(len(equals), count))),
        np.array(equals),
        csr_array(budget),
        np.ones(len(problem.resources)),
        scale,
    )


def _group_points(
    problem: Problem, group: tuple[str, ...], weights: Mapping[str, float]
) -> list[Point[dict[str, WidthPair]]]:
    """Points of layers that share an activation: for each of its widths, the layers' own hulls walked by slope."""

    def point(name: str, pair: WidthPair) -> Point[WidthPair]:
        rate = sum(weights[r.name] * r.cost[name][pair] for r in problem.resources)
        return Point(rate, problem.curves[name][pair], pair)

    shared = set.intersection(*({pair.activation for pair in problem.curves[name]} for name in group))
    points = []
    for activation in sorted(shared, key=lambda bits: bits or 0):
        hulls = [
            lower_hull([point(name, pair) for pair in problem.curves[name] if pair.activation == activation])
            for name in group
        ]
        at = [0] * len(hulls)
        for step in [None, *pool(hulls)]:
            if step is not None:
                at[step.curve] = step.vertex
            chosen = [hull[vertex] for hull, vertex in zip(hulls, at, strict=True)]
            points.append(
                Point(
                    sum(item.rate for item in chosen),
                    sum(item.distortion for item in chosen),
                    {name: item.choice for name, item in zip(group, chosen, strict=True)},
                )
            )
    return points


def _check_feasible(problem: Problem) -> None:
    for resource in problem.resources:
        least = _least(problem, resource)
        if least > resource.limit * (1 + 1e-12) + 1e-12:
            raise RecipeError(
                f"allocation: {resource.name} of at most {resource.limit:.6g} asked for, the least possible is "
                f"{least:.6g}",
                hint="widen the budget, lower allocation.floors, or add narrower widths to allocation.weight_bits and "
                "allocation.activation_bits; boundary layers and overrides keep their bits and count",
            )
    for group in problem.groups:
        if not set.intersection(*({pair.activation for pair in problem.curves[name]} for name in group)):
            raise RecipeError(
                f"allocation: {', '.join(group)} read one tensor and no activation width is allowed for all of them",
                hint="give them floors and ceilings that have a width in common",
            )


def _least(problem: Problem, resource: Resource) -> float:
    return float(sum(min(resource.cost[name][pair] for pair in curve) for name, curve in problem.curves.items()))


def _infeasible(problem: Problem) -> str:
    asked = "; ".join(
        f"{resource.name}: at most {resource.limit:.6g}, least possible alone {_least(problem, resource):.6g}"
        for resource in problem.resources
    )
    return f"allocation: no choice of widths fits all budgets together ({asked})"
