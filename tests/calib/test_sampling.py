"""Calibration sets: what a pipeline fed its denoiser, kept and read back unchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calib_fixture import ParallelDenoiser, random_calibration
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.sampling import CalibrationSet, TrajectoryRecorder, broadcast_timestep, seeded_generator
from dmqexport.errors import CalibrationError

NAMES = ("sample", "timestep", "encoder_hidden_states")


def assert_same(left: CalibrationSet, right: CalibrationSet) -> None:
    assert set(left.inputs) == set(right.inputs)
    for name, value in left.inputs.items():
        assert value.dtype == right.inputs[name].dtype
        assert torch.equal(value, right.inputs[name])
    assert torch.equal(left.trajectory, right.trajectory)
    assert torch.equal(left.step, right.step)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    calibration = random_calibration(6)
    calibration.save(tmp_path / "set")
    assert_same(CalibrationSet.load(tmp_path / "set"), calibration)


def test_views_can_be_saved(tmp_path: Path) -> None:
    whole = random_calibration(6)
    part = CalibrationSet(
        {name: value[::2] for name, value in whole.inputs.items()}, whole.trajectory[::2], whole.step[::2]
    )
    part.save(tmp_path / "set")
    assert_same(CalibrationSet.load(tmp_path / "set"), part)


def test_concatenation_keeps_the_order() -> None:
    parts = [random_calibration(3, seed) for seed in range(3)]
    joined = CalibrationSet.concatenate(parts)
    assert len(joined) == 9
    for index, part in enumerate(parts):
        for name, value in joined.select(torch.arange(3 * index, 3 * index + 3)).items():
            assert torch.equal(value, part.inputs[name])


@given(st.integers(1, 20), st.integers(1, 25))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_batches_cover_every_entry_once_in_order(entries: int, size: int) -> None:
    calibration = random_calibration(entries)
    batches = list(calibration.batches(size))
    assert torch.equal(torch.cat([index for index, _ in batches]), torch.arange(entries))
    assert all(len(index) <= size for index, _ in batches)
    for name in NAMES:
        assert torch.equal(torch.cat([inputs[name] for _, inputs in batches]), calibration.inputs[name])


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 1000))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_subset_is_spread_evenly_over_steps(entries: int, count: int, seed: int) -> None:
    calibration = random_calibration(entries)
    subset = calibration.subset(count, seed)
    assert len(subset) == min(count, entries)
    identity = [tuple(sample.flatten()[:3].tolist()) for sample in subset.inputs["sample"]]
    assert len(set(identity)) == len(identity)
    assert_same(calibration.subset(count, seed), subset)
    per_step = torch.bincount(subset.step, minlength=int(calibration.step.max()) + 1)[: entries // 2]
    if len(per_step):
        assert int(per_step.max() - per_step.min()) <= 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"sample": torch.zeros(2, 3)}, "lack 'timestep'"),
        ({"sample": torch.zeros(3, 3), "timestep": torch.zeros(2)}, "'sample' has 3 entries, expected 2"),
        ({"sample": torch.tensor([1.0, float("nan")]), "timestep": torch.zeros(2)}, "NaN or infinity in 'sample'"),
        ({"sample": torch.tensor([1.0, float("inf")]), "timestep": torch.zeros(2)}, "NaN or infinity in 'sample'"),
    ],
    ids=["no timestep", "length", "nan", "infinity"],
)
def test_meaningless_sets_are_refused(inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSet(inputs, torch.zeros(2), torch.zeros(2))


def bind(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs of the fixture's denoiser by name; a KeyError for one that is missing."""
    given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    named = {name: given[name] for name in NAMES}
    named["timestep"] = broadcast_timestep(named["timestep"], len(named["sample"]))
    return named


def test_recorder_sees_every_call_and_changes_nothing() -> None:
    torch.manual_seed(0)
    denoiser = ParallelDenoiser().eval()
    calls = [random_calibration(4, seed).inputs for seed in range(3)]
    with torch.no_grad():
        before = [denoiser(**inputs) for inputs in calls]
        with TrajectoryRecorder(denoiser, bind, trajectories=2, first=10) as recorder:
            # Pipelines pass a scalar timestep, positionally or by name.
            after = [
                denoiser(calls[0]["sample"], torch.tensor(7), encoder_hidden_states=calls[0]["encoder_hidden_states"]),
                denoiser(**calls[1]),
                denoiser(*calls[2].values()),
            ]
        denoiser(**calls[0])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    recorded = recorder.result()
    assert len(recorded) == 12
    assert recorded.step.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # A guided batch holds every trajectory twice.
    assert recorded.trajectory.tolist() == [10, 11, 10, 11] * 3
    assert recorded.timesteps.tolist() == [7] * 4 + [*calls[1]["timestep"].tolist(), *calls[2]["timestep"].tolist()]
    assert torch.equal(recorded.inputs["sample"], torch.cat([inputs["sample"] for inputs in calls]))


def test_recorder_keeps_copies() -> None:
    denoiser = ParallelDenoiser().eval()
    inputs = random_calibration(2).inputs
    original = inputs["sample"].clone()
    with torch.no_grad(), TrajectoryRecorder(denoiser, bind, 2) as recorder:
        denoiser(**inputs)
        inputs["sample"].zero_()
    assert torch.equal(recorder.result().inputs["sample"], original)


def test_recorder_refuses_a_denoiser_that_was_never_called_or_called_without_an_input() -> None:
    denoiser = ParallelDenoiser().eval()
    recorder = TrajectoryRecorder(denoiser, bind, 1)
    with recorder:
        pass
    with pytest.raises(CalibrationError, match="never called"):
        recorder.result()
    with pytest.raises(KeyError, match="encoder_hidden_states"), recorder:
        denoiser(torch.zeros(1, 3, 8, 8), torch.tensor(1))
    assert not denoiser._forward_pre_hooks


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (torch.tensor(7), [7, 7, 7]),
        (torch.tensor([7]), [7, 7, 7]),
        (torch.tensor([7, 8, 9]), [7, 8, 9]),
        (7, [7, 7, 7]),
        (torch.tensor(6.6), [7, 7, 7]),
        (torch.tensor([6.6, 7.4, 1.0]), [7, 7, 1]),
    ],
    ids=["scalar", "one", "each", "int", "float", "floats"],
)
def test_timesteps_broadcast(timestep: object, expected: list[int]) -> None:
    result = broadcast_timestep(timestep, 3)
    assert result.dtype == torch.int64
    assert result.tolist() == expected


def test_seeded_generators_depend_on_their_keys_alone() -> None:
    first = seeded_generator(3, "layer.a", 1).random(4).tolist()
    assert seeded_generator(3, "layer.a", 1).random(4).tolist() == first
    for other in (seeded_generator(4, "layer.a", 1), seeded_generator(3, "layer.b", 1), seeded_generator(3, "layer.a")):
        assert other.random(4).tolist() != first


@given(st.integers(1, 4), st.integers(4, 9), st.integers(1, 7))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_thinned_trajectories_cover_every_step_with_whole_calls(stride: int, trajectories: int, steps: int) -> None:
    calls = [(trajectory, step) for trajectory in range(trajectories) for step in range(steps) for _ in range(2)]
    index = torch.tensor(calls)
    calibration = replace(random_calibration(len(calls)), trajectory=index[:, 0], step=index[:, 1])
    thinned = calibration.thinned(stride)
    assert set(thinned.step.tolist()) == set(range(steps)), "a table row without entries could not be calibrated"
    kept = list(zip(thinned.trajectory.tolist(), thinned.step.tolist(), strict=True))
    assert all(kept.count(call) == 2 for call in kept), "both guidance halves of a call, or neither"
    assert abs(len(kept) - len(calls) / stride) <= 2 * trajectories


def test_renumbered_trajectories_start_where_they_are_told() -> None:
    calibration = random_calibration(5)
    assert torch.equal(calibration.renumbered(7).trajectory, calibration.trajectory + 7)


@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 9))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_drawn_entries_have_the_shares_of_their_steps(count: int, sizes: list[int], seed: int) -> None:
    step = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes)])
    calibration = replace(random_calibration(len(step)), step=step, trajectory=torch.arange(len(step)))
    shares = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)) + 0.05
    shares = shares / shares.sum()
    drawn = calibration.drawn(count, seed, shares)
    assert len(drawn) == count
    assert torch.equal(drawn.trajectory, calibration.drawn(count, seed, shares).trajectory)
    found = torch.bincount(drawn.step, minlength=len(sizes))
    assert bool(((found - shares * count).abs() < 1 + 1e-3).all())
    for index, size in enumerate(sizes):
        chosen = drawn.trajectory[drawn.step == index]
        assert len(chosen.unique()) == min(size, len(chosen)), "no entry twice before every other was taken"


def test_a_step_without_entries_cannot_be_drawn() -> None:
    calibration = replace(random_calibration(4), step=torch.tensor([0, 0, 2, 2]))
    with pytest.raises(CalibrationError, match="no entry of step 1"):
        calibration.drawn(6, 0, torch.tensor([0.4, 0.3, 0.3]))
