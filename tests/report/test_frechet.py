"""Fréchet distance: equal to the published formulas, to an independent implementation, and refusing thin evidence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dmqexport.errors import ModelError
from dmqexport.report.frechet import Gaussian, enough_pictures, fit_gaussian, frechet_distance

fixed = settings(deadline=None, derandomize=True, max_examples=20)


def features(seed: int, count: int = 60, dimension: int = 5) -> np.ndarray:
    """Correlated features with a mean of their own."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, dimension)) @ random.normal(size=(dimension, dimension)) + random.normal(
        size=dimension
    )


@given(seed=st.integers(0, 2**31), dimension=st.integers(1, 12))
@fixed
def test_a_distance_is_zero_to_itself_symmetric_and_never_negative(seed: int, dimension: int) -> None:
    left, right = (fit_gaussian(features(seed + offset, dimension=dimension)) for offset in (0, 1))
    scale = float(np.trace(left.covariance) + left.mean @ left.mean)
    assert frechet_distance(left, left) <= 1e-9 * max(scale, 1.0)
    assert frechet_distance(left, right) == pytest.approx(frechet_distance(right, left), rel=1e-7, abs=1e-9)
    assert frechet_distance(left, right) >= 0


def test_one_dimension_is_the_textbook_formula() -> None:
    left, right = Gaussian(np.array([1.0]), np.array([[4.0]]), 9), Gaussian(np.array([3.0]), np.array([[9.0]]), 9)
    assert frechet_distance(left, right) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


class Same(nn.Module):
    """Features are the input."""

    num_features = 5

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1)


@pytest.mark.parametrize("seed", range(3))
def test_torchmetrics_agrees(seed: int) -> None:
    left, right = features(seed), features(seed + 100, count=90)
    metric = FrechetInceptionDistance(feature=Same(), normalize=False).set_dtype(torch.float64)
    metric.update(torch.from_numpy(left)[:, :, None, None], real=True)
    metric.update(torch.from_numpy(right)[:, :, None, None], real=False)
    assert frechet_distance(fit_gaussian(left), fit_gaussian(right)) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_dead_features_do_no_harm() -> None:
    left, right = features(0), features(1)
    padded = [fit_gaussian(np.pad(part, ((0, 0), (0, 3)))) for part in (left, right)]
    assert frechet_distance(*padded) == pytest.approx(frechet_distance(fit_gaussian(left), fit_gaussian(right)))


def test_a_shift_adds_its_square() -> None:
    left = features(3)
    moved = fit_gaussian(left + np.array([0.5, 0, 0, 0, -2.0]))
    assert frechet_distance(fit_gaussian(left), moved) == pytest.approx(0.25 + 4.0, rel=1e-6)


def test_too_few_pictures_are_refused_with_the_number_that_would_do() -> None:
    assert not enough_pictures(9, 5)
    with pytest.raises(ModelError, match=r"9 pictures for 5 features, expected at least 10"):
        fit_gaussian(features(0, count=9))
    fit_gaussian(features(0, count=10))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(np.zeros((4,)), r"features are \[4\]"), (np.full((20, 2), np.nan), "NaN or infinite")],
    ids=["shape", "nan"],
)
def test_what_gives_no_meaning_is_refused(wrong: np.ndarray, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fit_gaussian(wrong)


def test_two_extractors_are_not_compared() -> None:
    with pytest.raises(ModelError, match="5 features on one side, 4 on the other"):
        frechet_distance(fit_gaussian(features(0)), fit_gaussian(features(0, dimension=4)))
