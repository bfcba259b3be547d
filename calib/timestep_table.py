"""Rows of the timestep table: the map from timestep value to row (groups of DMQ, per-step rows of TPQ, clusters)."""

import numpy as np
import numpy.typing as npt

from dmqexport.errors import RecipeError
from dmqexport.quant_types import IntArray

EQUAL_GROUPS = "equal-groups"
PER_STEP = "per-step"
CLUSTER = "cluster"


def equal_groups(timesteps: int, rows: int) -> IntArray:
    """Map timestep values 0 … `timesteps` - 1 to `rows` equal groups (DMQ: 10 groups of 100). int64 [timesteps]."""
    if not 1 <= rows <= timesteps:
        raise RecipeError(f"{rows} rows asked for, expected 1 to {timesteps} (the number of training timesteps)")
    return (np.arange(timesteps, dtype=np.int64) * rows) // timesteps


def per_step(timesteps: int, used: IntArray) -> IntArray:
    """One row a sampling step (TPQ, TALSQ): every timestep value goes to the nearest used one. int64 [timesteps]."""
    centers = np.unique(np.clip(used, 0, timesteps - 1))
    distance = np.abs(np.arange(timesteps, dtype=np.int64)[:, None] - centers[None, :])
    nearest: IntArray = np.argmin(distance, axis=1).astype(np.int64)
    return nearest


def clustered(timesteps: int, used: IntArray, features: npt.NDArray[np.float64], rows: int) -> IntArray:
    """At most `rows` contiguous segments of the sampling steps whose ranges are most alike. int64 [timesteps].

    used: increasing timesteps [n]; features: [n, k], whatever describes the ranges at each of them (step_ranges.py
    gives their logarithms). Minimises the features' squared distances to their segment's mean, exactly, by dynamic
    programming over the segments' ends, O(rows · n²). Timesteps in between go to the nearest used one. Raises
    RecipeError for a number of rows that cannot be, ValueError for features that do not fit.
    """
    if not 1 <= rows <= timesteps:
        raise RecipeError(f"{rows} rows asked for, expected 1 to {timesteps} (the number of training timesteps)")
    count = len(used)
    if features.ndim != 2 or len(features) != count or count == 0 or bool(np.any(np.diff(used) <= 0)):
        raise ValueError(f"features {features.shape} do not fit {count} increasing timesteps")
    cost = _segment_costs(features)
    best = cost[0]  # best[j]: least cost of the first j + 1 steps in the segments so far
    starts: list[IntArray] = []
    for _ in range(1, min(rows, count)):
        # candidates[i, j]: the last segment is i … j, the steps before i have their best split.
        candidates = np.full((count, count), np.inf)
        candidates[1:] = best[:-1, np.newaxis] + cost[1:]
        starts.append(np.argmin(candidates, axis=0))
        best = np.min(candidates, axis=0)
    segment = np.zeros(count, dtype=np.int64)
    stop = count
    for start in reversed(starts):
        begin = int(start[stop - 1])
        segment[begin:] += 1
        stop = begin
    return segment[per_step(timesteps, used)]


def _segment_costs(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """cost[i, j]: squared distances of rows i … j of `features` to their mean; infinite for i > j."""
    centered = features - features.mean(axis=0)  # differences of large sums would lose digits
    sums = np.concatenate([np.zeros((1, features.shape[1])), np.cumsum(centered, axis=0)])
    squares = np.concatenate([[0.0], np.cumsum(np.square(centered).sum(axis=1))])
    gram = sums @ sums.T
    norms = np.diag(gram)
    distance = norms[:, np.newaxis] + norms[np.newaxis, :] - 2 * gram
    count = len(features)
    length = np.arange(1, count + 1)[np.newaxis, :] - np.arange(count)[:, np.newaxis]
    cost = squares[np.newaxis, 1:] - squares[:-1, np.newaxis] - distance[:-1, 1:] / np.maximum(length, 1)
    return np.where(length > 0, np.maximum(cost, 0.0), np.inf)


def used_rows(row_map: IntArray, calibrated: IntArray) -> IntArray:
    """Send rows that no calibrated timestep falls into to the nearest calibrated timestep's row, and renumber.

    A table must not hold a row nothing was measured for. Returns int64 [timesteps].
    """
    present = np.unique(row_map[np.clip(calibrated, 0, row_map.size - 1)])
    order = np.unique(np.clip(calibrated, 0, row_map.size - 1))
    result = row_map.copy()
    for timestep in np.flatnonzero(~np.isin(row_map, present)):
        result[timestep] = row_map[order[np.argmin(np.abs(order - timestep))]]
    return np.searchsorted(present, result).astype(np.int64)
