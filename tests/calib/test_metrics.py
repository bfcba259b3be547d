"""Distortions against the published SSIM, and probes against the distortion of the small errors they stand for."""

from itertools import pairwise

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from calib.metrics import METRICS, metric_named
from dmqexport.errors import RecipeError

NAMES = pytest.mark.parametrize("name", sorted(METRICS))


def picture(side: int = 8, entries: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn((entries, 3, side, side), generator=torch.Generator().manual_seed(seed))


@NAMES
def test_equal_outputs_have_no_distortion_and_worse_ones_more(name: str) -> None:
    reference, noise = picture(), picture(seed=1)
    metric = METRICS[name]
    found = [metric.distance(reference, reference + scale * noise) for scale in (0.0, 0.05, 0.2, 0.8)]
    assert torch.allclose(found[0], torch.zeros(2), atol=1e-6)
    assert all(bool((left < right).all()) for left, right in pairwise(found))


def test_one_minus_ssim_is_the_published_one() -> None:
    reference = picture(side=24, entries=1)
    output = reference + 0.3 * picture(side=24, entries=1, seed=1)
    extent = float(reference.max() - reference.min())
    _, everywhere = structural_similarity_index_measure(
        output, reference, data_range=extent, sigma=1.5, return_full_image=True
    )
    published = everywhere[..., 5:-5, 5:-5].mean()  # there windows lie inside the picture, here all do
    squared = float((output - reference).square().mean())
    found = float(METRICS["ssim+mse"].distance(reference, output)) - squared
    assert found == pytest.approx(1 - float(published), rel=1e-4)


@NAMES
def test_probes_estimate_the_distortion_of_a_small_error(name: str) -> None:
    reference, metric = picture(entries=1), METRICS[name]
    many = reference.expand(4000, -1, -1, -1)
    probes = metric.probe(many, torch.Generator().manual_seed(7)).flatten(1)
    smooth = torch.ones_like(reference)  # the mean of a window moves; white noise moves its variance
    for error in (1e-3 * picture(entries=1, seed=3), 1e-3 * smooth):
        estimate = float((probes @ error.flatten()).square().mean())
        exact = float(metric.distance(reference.double(), (reference + error).double()))
        assert estimate == pytest.approx(exact, rel=0.1)


def test_outputs_that_are_no_pictures_count_their_squared_error() -> None:
    left, right = torch.zeros(3, 5), torch.ones(3, 5)
    assert METRICS["ssim+mse"].distance(left, right).tolist() == [1.0, 1.0, 1.0]
    assert METRICS["ssim+mse"].probe(left, torch.Generator()).shape == left.shape


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="'psnr' is not known") as caught:
        metric_named("psnr")
    assert "ssim+mse" in str(caught.value.hint)
