"""Maps from timestep value to table row."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.timestep_table import clustered, equal_groups, per_step, used_rows
from dmqexport.errors import RecipeError

fixed = settings(deadline=None, derandomize=True, max_examples=60)


@given(st.integers(1, 1200), st.data())
@fixed
def test_equal_groups_are_equal(timesteps: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, timesteps))
    row_map = equal_groups(timesteps, rows)
    assert row_map.dtype == np.int64
    assert row_map.shape == (timesteps,)
    sizes = np.bincount(row_map, minlength=rows)
    assert len(sizes) == rows
    assert sizes.max() - sizes.min() <= 1
    assert bool(np.all(np.diff(row_map) >= 0))


def test_ten_groups_of_a_thousand() -> None:
    row_map = equal_groups(1000, 10)
    assert [row_map[timestep] for timestep in (0, 99, 100, 899, 900, 999)] == [0, 0, 1, 8, 9, 9]


@pytest.mark.parametrize("rows", [0, -1, 11])
def test_impossible_row_counts_are_refused(rows: int) -> None:
    with pytest.raises(RecipeError, match="expected 1 to 10"):
        equal_groups(10, rows)


@given(st.integers(1, 300), st.lists(st.integers(-5, 320), min_size=1, max_size=40))
@fixed
def test_per_step_goes_to_the_nearest_step(timesteps: int, used: list[int]) -> None:
    row_map = per_step(timesteps, np.array(used))
    centers = np.unique(np.clip(used, 0, timesteps - 1))
    assert row_map.shape == (timesteps,)
    assert set(row_map.tolist()) == set(range(len(centers)))
    np.testing.assert_array_equal(row_map[centers], np.arange(len(centers)))
    chosen = np.abs(centers[row_map] - np.arange(timesteps))
    np.testing.assert_array_equal(chosen, np.abs(centers[:, None] - np.arange(timesteps)).min(axis=0))


def test_per_step_gives_a_tie_to_the_lower_step_and_ignores_order_and_repeats() -> None:
    np.testing.assert_array_equal(per_step(7, np.array([6, 2, 6])), [0, 0, 0, 0, 0, 1, 1])


def scatter(features: np.ndarray, segment: np.ndarray) -> float:
    """Squared distances to the mean of one's own segment."""
    return sum(float(np.square(part - part.mean(axis=0)).sum()) for part in
               (features[segment == index] for index in np.unique(segment)))  # fmt: skip


@given(st.integers(2, 8), st.integers(1, 9), st.integers(0, 2**32 - 1))
@fixed
def test_clusters_are_the_best_contiguous_ones(count: int, rows: int, seed: int) -> None:
    """Against every way to cut the steps."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, 3)) + random.choice([0.0, 1e4])
    used = np.sort(random.choice(100, size=count, replace=False))
    row_map = clustered(100, used, features, rows)
    found = row_map[used]
    assert set(np.diff(found)) <= {0, 1}
    assert set(row_map) == set(range(min(rows, count)))
    least = min(
        scatter(features, np.searchsorted(cut, np.arange(count), side="right"))
        for cut in combinations(range(1, count), min(rows, count) - 1)
    )
    assert scatter(features, found) <= least * (1 + 1e-6) + 1e-6


def test_clusters_find_where_ranges_jump() -> None:
    used = np.arange(0, 1000, 50)
    level = np.where(used < 150, 0.0, np.where(used < 800, 3.0, 5.0))
    features = np.stack([level, -level], axis=1) + 1e-3 * np.sin(used)[:, np.newaxis]
    row_map = clustered(1000, used, features, 3)
    assert [int(row_map[timestep]) for timestep in (0, 100, 124, 126, 750, 774, 776, 999)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_as_many_clusters_as_steps_are_one_row_a_step() -> None:
    used = np.array([3, 10, 40])
    features = np.array([[0.0], [1.0], [2.0]])
    np.testing.assert_array_equal(clustered(50, used, features, 20), per_step(50, used))


def test_clusters_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="0 rows asked for"):
        clustered(50, np.array([1]), np.ones((1, 1)), 0)
    for used, features in (([1, 1], np.ones((2, 1))), ([1, 2], np.ones((3, 1))), ([], np.ones((0, 1)))):
        with pytest.raises(ValueError, match="do not fit"):
            clustered(50, np.array(used, dtype=np.int64), features, 1)


@given(st.integers(2, 300), st.data())
@fixed
def test_used_rows_leaves_no_row_without_a_measurement(timesteps: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, min(timesteps, 20)))
    calibrated = np.array(data.draw(st.lists(st.integers(0, timesteps - 1), min_size=1, max_size=15)))
    row_map = equal_groups(timesteps, rows)
    result = used_rows(row_map, calibrated)
    assert result.dtype == np.int64
    assert set(result.tolist()) == set(range(int(result.max()) + 1))
    assert set(result[calibrated].tolist()) == set(result.tolist())
    # Timesteps whose row was measured keep their company; others join the nearest calibrated timestep.
    kept = np.isin(row_map, row_map[calibrated])
    for timestep in range(timesteps):
        if kept[timestep]:
            partner = calibrated[row_map[calibrated] == row_map[timestep]][0]
            assert result[timestep] == result[partner]
        else:
            distance = np.abs(calibrated - timestep)
            assert result[timestep] in result[calibrated[distance == distance.min()]]


def test_used_rows_changes_nothing_when_all_rows_are_used() -> None:
    row_map = equal_groups(100, 10)
    np.testing.assert_array_equal(used_rows(row_map, np.arange(0, 100, 10)), row_map)


def test_used_rows_renumbers_and_moves() -> None:
    np.testing.assert_array_equal(used_rows(equal_groups(8, 4), np.array([2, 7])), [0, 0, 0, 0, 0, 1, 1, 1])
