"""From predicted to measured: allocations for curves bent at random, each measured whole, the best one kept.

Curves are estimates and layers are not quite additive, so that many allocations within a few percent of the predicted
optimum differ by more than that when measured. Measuring one takes a few forwards, a sweep takes thousands.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from calib.allocation_problem import Problem, Solution
from calib.candidates import WidthPair
from calib.sampling import seeded_generator
from calib.sensitivity import Progress
from dmqexport.ranks import Ranks

_SPREAD = 0.3  # standard deviation of the logarithm of a curve's factor: about what sketched curves are off by


@dataclass(frozen=True)
class Found:
    """A solution, the curves' factors and the problem that it solves, and what was measured of it."""

    solution: Solution
    factors: Mapping[str, float]
    problem: Problem
    measured: float


def agreed(solution: Solution, ranks: Ranks) -> Solution:
    """The solution with rank 0's choice: ranks measure one and the same, should a solver's ties fall apart."""
    told = ranks.tell("allocation", json.dumps({name: str(pair) for name, pair in solution.choice.items()}))
    return replace(solution, choice={name: WidthPair.parse(text) for name, text in json.loads(told).items()})


def search(
    start: Found,
    problem_of: Callable[[Mapping[str, float]], Problem],
    solve: Callable[[Problem], Solution],
    measure: Callable[[Solution], float],
    proposals: int,
    seed: int,
    progress: Progress | None = None,
) -> Found:
    """The best of `start` and of `proposals` steps away from the best so far; never worse than `start` as measured.

    `problem_of` gives the problem with each curve multiplied by its factor. Budgets are the problems' own, so that
    every proposal keeps them.
    """
    generator = seeded_generator(seed, "allocation proposals")
    best = start
    names = sorted(start.factors)
    for number in range(proposals):
        noise = generator.standard_normal(len(names)) * _SPREAD
        factors = {name: best.factors[name] * float(np.exp(step)) for name, step in zip(names, noise, strict=True)}
        problem = problem_of(factors)
        solution = solve(problem)
        if dict(solution.choice) != dict(best.solution.choice):
            measured = measure(solution)
            if measured < best.measured:
                best = Found(solution, factors, problem, measured)
        if progress is not None:
            progress(number + 1, proposals)
    return best
