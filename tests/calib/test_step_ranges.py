"""Ranges along the steps: only of tensors that follow the timestep, in units that do not depend on their size."""

import numpy as np
import pytest
import torch
from calib_fixture import ParallelDenoiser, random_calibration, run_on
from torch import nn

from calib.probe import ProbeResult, probe
from calib.sampling import CalibrationSet
from calib.step_ranges import step_ranges
from calib.timestep_table import clustered
from dmqexport.errors import CalibrationError


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return ParallelDenoiser().eval()


@pytest.fixture(scope="module")
def found(denoiser: nn.Module) -> ProbeResult:
    calibration = random_calibration(4)
    return probe(denoiser, lambda index: run_on(denoiser, calibration, index))


def measured(denoiser: nn.Module, found: ProbeResult, timesteps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    calibration = random_calibration(len(timesteps), timesteps=torch.tensor(timesteps))
    # One picture at every timestep: what differs is the timestep alone.
    first = {name: value[:1].expand_as(value) for name, value in calibration.inputs.items()}
    same = CalibrationSet({**first, "timestep": calibration.timesteps}, calibration.trajectory, calibration.step)
    return step_ranges(denoiser, found, same, lambda batch: denoiser(**batch), 3)


def test_ranges_follow_the_timestep(denoiser: nn.Module, found: ProbeResult) -> None:
    """`scaled` reads sample · timestep / 40: a timestep twice as large is one binary logarithm more, at both ends."""
    used, features = measured(denoiser, found, [10, 20, 5, 20])
    np.testing.assert_array_equal(used, [5, 10, 20])
    differences = np.diff(features, axis=0)
    moving = np.flatnonzero(np.abs(differences).max(axis=0) > 1e-3)
    assert len(moving) == 3, "both ends of `scaled`, and the one end of `time`"
    np.testing.assert_allclose(differences[:, moving], 1.0, atol=1e-5)
    depends = [layer for layer in found.layers if layer.timestep_dependent and layer.source == layer.name]
    assert features.shape[1] == 2 * sum(len(layer.segments) for layer in depends)


def test_clusters_follow_the_ranges(denoiser: nn.Module, found: ProbeResult) -> None:
    used, features = measured(denoiser, found, [1, 2, 30, 32, 34, 36])
    np.testing.assert_array_equal(clustered(40, used, features, 3)[used], [0, 1, 2, 2, 2, 2])


def test_nothing_to_cluster_is_refused(denoiser: nn.Module, found: ProbeResult) -> None:
    still = ProbeResult(tuple(layer for layer in found.layers if not layer.timestep_dependent), (), {})
    with pytest.raises(CalibrationError, match="depends on the timestep"):
        measured(denoiser, still, [1, 2])
