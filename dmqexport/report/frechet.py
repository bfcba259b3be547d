"""Fréchet distance between two sets of pictures, each seen as a Gaussian over the features of a named extractor.

The distance of Heusel et al. (arXiv:1706.08500, Eq. 6): |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½). A figure means nothing
without its extractor, the number of pictures and the number of features, so all three travel with it.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from dmqexport.errors import ModelError

Features = npt.NDArray[np.float64]

PICTURES_A_FEATURE: Final = 2
"""At least this many pictures for every feature: with fewer the covariance is mostly noise, and so is the distance."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean float64 [D], covariance float64 [D, D] (unbiased) and how many pictures they come from."""

    mean: Features
    covariance: Features
    count: int

    @property
    def dimension(self) -> int:
        """Number of features."""
        return len(self.mean)


def enough_pictures(count: int, dimension: int) -> bool:
    """Whether `count` pictures suffice for a distance over `dimension` features."""
    return count >= PICTURES_A_FEATURE * dimension


def fit_gaussian(features: npt.NDArray[np.floating]) -> Gaussian:
    """Mean and covariance of `features` [N, D].

    Raises ModelError for a wrong shape, values that are not finite, and fewer than 2 × D pictures: nothing is shrunk
    or padded to make up for pictures that are not there.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ModelError(
            f"Fréchet distance: features are {list(features.shape)}, expected [pictures, features]",
            hint="flatten or pool each picture's features to one vector",
        )
    count, dimension = features.shape
    if not enough_pictures(count, dimension):
        raise ModelError(
            f"Fréchet distance: {count} pictures for {dimension} features, expected at least "
            f"{PICTURES_A_FEATURE * dimension}",
            hint="draw more pictures (--set validation.retrieval=200), or use an extractor with fewer features",
        )
    values = features.astype(np.float64)
    if not np.isfinite(values).all():
        raise ModelError("Fréchet distance: a feature is NaN or infinite", hint="look at the pictures: some are broken")
    return Gaussian(values.mean(axis=0), np.cov(values, rowvar=False, ddof=1).reshape(dimension, dimension), count)


def frechet_distance(left: Gaussian, right: Gaussian) -> float:
    """Squared Fréchet (Wasserstein-2) distance of two Gaussians; 0 for equal ones, never negative.

    tr((Σ₁ Σ₂)^½) is taken as tr((Σ₁^½ Σ₂ Σ₁^½)^½): the same number from symmetric matrices only, so that dead features
    (singular covariances) need neither a complex square root nor an added diagonal.
    """
    if left.dimension != right.dimension:
        raise ModelError(
            f"Fréchet distance: {left.dimension} features on one side, {right.dimension} on the other",
            hint="use one extractor for both sides",
        )
    root = _square_root(left.covariance)
    cross = np.sqrt(_eigenvalues(root @ right.covariance @ root)).sum()
    gap = left.mean - right.mean
    distance = gap @ gap + np.trace(left.covariance) + np.trace(right.covariance) - 2.0 * cross
    return max(0.0, float(distance))


def _square_root(covariance: Features) -> Features:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    root: Features = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return root


def _eigenvalues(matrix: Features) -> Features:
    found: Features = np.linalg.eigvalsh((matrix + matrix.T) / 2).clip(min=0.0)
    return found
