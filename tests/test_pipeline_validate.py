"""The picture metrics of validation on the bundled model: what is measured, what is left out, and by which name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from calib.sampling import CalibrationSet
from dmqexport.models import emoji
from dmqexport.models.picture_features import DIMENSION, EXTRACTOR, picture_features
from dmqexport.pipeline import Build
from dmqexport.pipeline_validate import Evaluation, Validation
from dmqexport.recipe import load_recipe
from dmqexport.workspace import SilentReporter, Workspace

COUNT = 2 * DIMENSION


def validation(folder: Path, *assignments: str) -> Validation:
    recipe = load_recipe(None, {"model": "emoji"}, [f"validation.retrieval={COUNT}", *assignments])
    return Validation(Build(recipe, folder / "bundle", Workspace(folder / "work", SilentReporter())))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Validation, Evaluation]:
    """Training pictures stand for the float model's, which is then perfect; other ones for the training set."""
    found = validation(tmp_path_factory.mktemp("validate"))
    gallery, rows = emoji.images(), emoji.retrieval_indices(COUNT)
    found.training_features = picture_features(found.build.model, gallery[:160])
    zero = torch.zeros(1, dtype=torch.int64)
    nothing = CalibrationSet({"sample": torch.zeros(1, 4, 8, 8), "timestep": zero}, zero, zero)
    return found, Evaluation(*found.prompts_and_seeds, gallery[rows], nothing)


def test_equal_pictures_are_at_no_distance(judged: tuple[Validation, Evaluation]) -> None:
    found, reference = judged
    metrics = found.picture_metrics(reference, reference.images)
    assert metrics["frechet_train_ratio"] == pytest.approx(1.0)
    assert metrics["frechet_train"] > 0
    assert metrics["frechet_float"] == pytest.approx(0.0, abs=1e-9)
    assert (metrics["frechet_extractor"], metrics["frechet_features"]) == (EXTRACTOR, DIMENSION)
    assert (metrics["frechet_count"], metrics["image_count"]) == (COUNT, COUNT)
    assert metrics["retrieval_accuracy"] == metrics["retrieval_accuracy_fp"] == 1.0
    # Variances of flat white areas are differences of equal numbers: float32 leaves 1e-5 of them.
    assert metrics["image_ssim"] == pytest.approx(1.0, abs=1e-4)


def test_noise_shows_in_every_picture_metric(judged: tuple[Validation, Evaluation]) -> None:
    found, reference = judged
    noise = np.random.default_rng(0).normal(0, 16, reference.images.shape)
    metrics = found.picture_metrics(reference, np.clip(reference.images + noise, 0, 255).astype(np.uint8))
    assert metrics["frechet_train_ratio"] > 1.05
    assert metrics["frechet_float"] > 1e-3
    assert 20 < metrics["image_psnr_db"] < 30
    assert metrics["image_ssim"] < 0.95


@pytest.mark.parametrize("switch", ["validation.frechet=false", f"validation.retrieval={COUNT - 1}"])
def test_without_enough_pictures_or_when_switched_off_there_is_no_distance(tmp_path: Path, switch: str) -> None:
    assert not validation(tmp_path, switch).judges_frechet
    assert validation(tmp_path).judges_frechet
