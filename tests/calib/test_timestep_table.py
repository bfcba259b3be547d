"""Maps from timestep value to table row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.timestep_table import equal_groups, per_step, used_rows
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
