"""Latency, measured so that two graphs can be compared on a machine whose speed drifts."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from engines.runner import Arrays, Runner


@dataclass(frozen=True)
class LatencyResult:
    """Milliseconds by runner name: wall-clock medians and minima, median processor time; and the runs behind each.

    Processor time is that of all threads together, those that wait for work included: on one thread it is latency
    without what other processes took.
    """

    median_ms: Mapping[str, float]
    runs: int
    minimum_ms: Mapping[str, float] = field(default_factory=dict)
    processor_ms: Mapping[str, float] = field(default_factory=dict)

    def ratio(self, numerator: str, denominator: str) -> float:
        """median / median."""
        return self.median_ms[numerator] / self.median_ms[denominator]


def interleaved(runners: Mapping[str, Runner], inputs: Arrays, *, runs: int, warmup: int = 3) -> LatencyResult:
    """Run every runner in turn, `runs` times after `warmup`, on the same inputs."""
    return interleaved_trajectories(runners, [inputs], runs=runs, warmup=warmup)


def interleaved_trajectories(
    runners: Mapping[str, Runner], calls: Sequence[Arrays], *, runs: int, warmup: int = 1
) -> LatencyResult:
    """Time all `calls` of a runner as one, every runner in turn, `runs` times after `warmup`."""

    def once(runner: Runner) -> None:
        for inputs in calls:
            runner.run(inputs)

    return _interleaved({name: partial(once, runner) for name, runner in runners.items()}, runs, warmup)


def _interleaved(actions: Mapping[str, Callable[[], None]], runs: int, warmup: int) -> LatencyResult:
    wall: dict[str, list[float]] = {name: [] for name in actions}
    processor: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        for _ in range(warmup):
            action()
    for _ in range(runs):
        for name, action in actions.items():
            start, spent = time.perf_counter(), time.process_time()
            action()
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - spent)
    return LatencyResult(
        {name: float(np.median(values)) * 1e3 for name, values in wall.items()},
        runs,
        {name: min(values) * 1e3 for name, values in wall.items()},
        {name: float(np.median(values)) * 1e3 for name, values in processor.items()},
    )
