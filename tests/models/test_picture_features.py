"""The features of the Fréchet distance: the same whatever the batch, alive, and worse for worse pictures."""

import numpy as np
import pytest

from dmqexport.errors import ModelError
from dmqexport.models import emoji
from dmqexport.models.loading import LoadedModel, load_model
from dmqexport.models.picture_features import DIMENSION, picture_features
from dmqexport.report.frechet import fit_gaussian, frechet_distance


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("emoji")


def test_a_picture_has_its_own_features(loaded: LoadedModel) -> None:
    pictures = emoji.images()[:70]
    found = picture_features(loaded, pictures)
    assert found.shape == (70, DIMENSION)
    assert found.dtype == np.float64
    np.testing.assert_allclose(picture_features(loaded, pictures[65:67]), found[65:67], atol=1e-6)
    assert (found.std(axis=0) > 1e-3).sum() > DIMENSION / 2


def test_the_distance_grows_with_noise(loaded: LoadedModel) -> None:
    random, pictures = np.random.default_rng(0), emoji.images()[: 2 * DIMENSION]
    clean = fit_gaussian(picture_features(loaded, pictures))
    distances = []
    for deviation in (2, 8, 32):
        noisy = np.clip(pictures + random.normal(0, deviation, pictures.shape), 0, 255).astype(np.uint8)
        distances.append(frechet_distance(clean, fit_gaussian(picture_features(loaded, noisy))))
    assert 0 < distances[0] < distances[1] < distances[2]


def test_other_pictures_and_models_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ModelError, match=r"float64 \[1, 64, 64, 3\], expected uint8"):
        picture_features(loaded, np.zeros((1, 64, 64, 3)))
    latents_only = type("Model", (), {"name": "bare", "pipeline": object()})()
    with pytest.raises(ModelError, match="bare has no autoencoder with 40 features"):
        picture_features(latents_only, emoji.images()[:1])
