"""Rows of the timestep table: the map from timestep value to row (groups of DMQ, per-step rows of TPQ)."""

import numpy as np

from dmqexport.errors import RecipeError
from dmqexport.quant_types import IntArray

EQUAL_GROUPS = "equal-groups"
PER_STEP = "per-step"


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
