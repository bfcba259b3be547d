"""Latency, measured so that two graphs can be compared on a machine whose speed drifts."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.runner import Arrays, Runner


@dataclass(frozen=True)
class LatencyResult:
    """Median milliseconds by runner name, and the number of timed runs behind each."""

    median_ms: Mapping[str, float]
    runs: int

    def ratio(self, numerator: str, denominator: str) -> float:
        """median / median."""
        return self.median_ms[numerator] / self.median_ms[denominator]


def interleaved(runners: Mapping[str, Runner], inputs: Arrays, *, runs: int, warmup: int = 3) -> LatencyResult:
    """Run every runner in turn, `runs` times after `warmup`, on the same inputs; medians of wall-clock time."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        for _ in range(warmup):
            runner.run(inputs)
    for _ in range(runs):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.run(inputs)
            times[name].append(time.perf_counter() - start)
    return LatencyResult({name: float(np.median(values)) * 1e3 for name, values in times.items()}, runs)
