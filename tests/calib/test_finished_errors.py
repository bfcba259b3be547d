"""What rounding does to where trajectories end: unbiased, as a share, and nothing of the model is left changed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calib.finished_errors import RoundingErrors, finished_errors, mean_errors, save_errors
from dmqexport.errors import CalibrationError

STEPS = 3
WIDTHS = (2, 8)


class Sampler(nn.Module):
    """Three steps with one linear layer and one convolution, so that an error counts at every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.conv, self.idle = nn.Linear(4, 4), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 2)
        self.requires_grad_(False)
        self.linear.bias.requires_grad_(True)

    def draw(self, start: Tensor) -> Tensor:
        """Where it ends."""
        latents = start
        for _ in range(STEPS):
            latents = latents + 0.2 * self.conv(self.linear(latents).tanh())
        return latents


@pytest.fixture
def sampler() -> Sampler:
    return Sampler().eval()


def rounding(sampler: Sampler, folder: Path) -> tuple[RoundingErrors, dict[tuple[str, int], Tensor]]:
    """Errors small enough for a gradient to foretell what they do."""
    generator, kept, known = torch.Generator().manual_seed(3), RoundingErrors(folder), {}
    for name in ("linear", "conv"):
        weight = sampler.get_submodule(name).get_parameter("weight")
        errors = {bits: 2.0**-bits * 0.01 * torch.randn(weight.shape, generator=generator) for bits in WIDTHS}
        kept.add(name, errors)
        known.update({(name, bits): error for bits, error in errors.items()})
    return kept, known


def test_it_foretells_what_a_changed_weight_does_to_the_end(sampler: Sampler, tmp_path: Path) -> None:
    errors, known = rounding(sampler, tmp_path)
    start = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    draw = lambda: sampler.draw(start)  # noqa: E731
    found = finished_errors(sampler, ["linear", "conv"], errors, draw, 600, torch.Generator().manual_seed(0))
    exact = sampler.draw(start)
    changes = {}
    for (name, bits), error in known.items():
        weight = sampler.get_submodule(name).get_parameter("weight")
        weight.data += error
        changes[name, bits] = float((sampler.draw(start) - exact).detach().square().sum())
        weight.data -= error
    # Shares of one whole: what they are shares of is the same for all four.
    ratios = torch.tensor([found[name][bits] / value for (name, bits), value in changes.items()])
    assert bool(((ratios / ratios.mean() - 1).abs() < 0.25).all()), ratios


def test_a_trajectory_counts_alike_however_far_it_is_moved(sampler: Sampler, tmp_path: Path) -> None:
    errors, _ = rounding(sampler, tmp_path)
    start = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5))

    def found(size: float) -> dict[str, dict[int, float]]:
        draw = lambda: size * sampler.draw(start)  # noqa: E731
        return finished_errors(sampler, ["linear"], errors, draw, 2, torch.Generator().manual_seed(0))

    assert found(100.0)["linear"] == pytest.approx(found(1.0)["linear"], rel=1e-4)


def test_which_parameters_need_gradients_is_as_before(sampler: Sampler, tmp_path: Path) -> None:
    errors, _ = rounding(sampler, tmp_path)
    before = {name: parameter.requires_grad for name, parameter in sampler.named_parameters()}
    assert len(set(before.values())) == 2
    finished_errors(sampler, ["linear"], errors, lambda: sampler.draw(torch.ones(1, 2, 4, 4)), 1, torch.Generator())
    assert {name: parameter.requires_grad for name, parameter in sampler.named_parameters()} == before


def test_a_weight_without_a_part_in_it_is_told(sampler: Sampler, tmp_path: Path) -> None:
    errors, _ = rounding(sampler, tmp_path)
    with pytest.raises(CalibrationError, match="idle: its weight has no part"):
        finished_errors(
            sampler, ["linear", "idle"], errors, lambda: sampler.draw(torch.ones(1, 2, 4, 4)), 1, torch.Generator()
        )
    with pytest.raises(CalibrationError, match="no gradient reaches the finished latents"):
        finished_errors(sampler, ["linear"], errors, lambda: torch.ones(1, 2, 4, 4), 1, torch.Generator())


def test_errors_are_kept_layer_by_layer_and_means_over_files(sampler: Sampler, tmp_path: Path) -> None:
    errors, known = rounding(sampler, tmp_path)
    assert errors.holds("linear")
    assert not errors.holds("idle")
    gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(8))
    projected = errors.projected("linear", gradient)
    for bits in WIDTHS:
        assert projected[bits] == pytest.approx(float((gradient * known["linear", bits]).sum()), rel=1e-2)
    for number, value in enumerate((1.0, 3.0)):
        save_errors(tmp_path / str(number), {"linear": {2: value, 8: value / 4}})
    assert mean_errors([tmp_path / "0", tmp_path / "1"]) == {"linear": {2: 2.0, 8: 0.5}}
