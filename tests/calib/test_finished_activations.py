"""What rounding activations does to where trajectories end: unbiased, row by row, readers of one tensor together."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calib.finished_activations import (
    Errors,
    finished_activations,
    mean_activation_errors,
    save_activation_errors,
)
from calib.probe import removing
from calib.quantizer import RowContext
from dmqexport.errors import CalibrationError

ROWS = 3


class Denoiser(nn.Module):
    """Two layers read one tensor, another reads something that ignores sample and timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.text = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 4)
        self.register_buffer("words", torch.randn(1, 3))
        self.requires_grad_(False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """One call."""
        hidden = (sample + 0.1 * timestep.reshape(-1, 1)).tanh()
        return self.first(hidden) + self.second(hidden).sin() + self.text(self.words)


def draw(denoiser: Denoiser, start: Tensor, recompute: bool = False) -> Tensor:
    """Three steps, of rows 2, 1 and 0."""
    latents = start
    for step in (2, 1, 0):
        timestep = torch.full((len(start),), step)
        if recompute:
            answer = checkpoint(denoiser, latents, timestep, use_reentrant=False)
        else:
            answer = denoiser(latents, timestep)
        latents = latents + 0.3 * answer
    return latents


READERS = {"first": ["first", "second"], "text": ["text"]}


def change(context: RowContext, size: float) -> Callable[[Tensor], Tensor]:
    """Something that differs from row to row, as a table's rounding does."""

    def rounded(tensor: Tensor) -> Tensor:
        assert len(set(context.rows.tolist())) == 1
        return tensor + size * (1 + context.rows[0]) * torch.linspace(-1, 2, tensor.shape[-1])

    return rounded


def measured(
    denoiser: Denoiser, start: Tensor, probes: int, recompute: bool = False, sizes: tuple[float, ...] = (1e-3, 1e-4)
) -> dict[str, Errors]:
    context = RowContext(torch.arange(ROWS))
    rounded = {name: [change(context, size) for size in sizes] for name in READERS}
    return finished_activations(
        denoiser, READERS, rounded, context, ROWS, lambda: draw(denoiser, start, recompute), probes,
        torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_it_foretells_what_changed_activations_do_to_the_end() -> None:
    denoiser, start = Denoiser().eval(), torch.randn(2, 4, generator=torch.Generator().manual_seed(5))
    found = measured(denoiser, start, 800)
    exact = draw(denoiser, start)
    ratios = []
    for source, names in READERS.items():
        for row in [*range(ROWS), None]:
            context = RowContext(torch.arange(ROWS))
            moved = change(context, 1e-3)
            current: list[int] = []

            def before(
                module: nn.Module,
                args: tuple[Tensor, ...],
                row: int | None = row,
                context: RowContext = context,
                moved: Callable[[Tensor], Tensor] = moved,
                current: list[int] = current,
            ) -> tuple[Tensor]:
                context.rows = torch.tensor(current[-1:])
                return (moved(args[0]) if row in (None, current[-1]) else args[0],)

            handles = [denoiser.get_submodule(name).register_forward_pre_hook(before) for name in names]
            handles.append(
                denoiser.register_forward_pre_hook(lambda _, args, current=current: current.append(int(args[1][0])))
            )
            done = float((draw(denoiser, start) - exact).square().sum())
            for handle in handles:
                handle.remove()
            ratios.append(float(found[source][0, ROWS if row is None else row]) / done)
    # Shares of one whole: what they are shares of is the same for all.
    assert np.allclose(np.array(ratios) / np.mean(ratios), 1, atol=0.2), ratios
    for values in found.values():
        np.testing.assert_allclose(values[0], 100 * values[1], rtol=1e-2)  # ten times the change


def test_recomputed_calls_give_the_same() -> None:
    denoiser, start = Denoiser().eval(), torch.randn(2, 4, generator=torch.Generator().manual_seed(6))
    plain, again = measured(denoiser, start, 3), measured(denoiser, start, 3, recompute=True)
    for name, values in plain.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-5)


def test_nothing_of_the_model_is_left_changed() -> None:
    denoiser, start = Denoiser().eval(), torch.randn(1, 4, generator=torch.Generator().manual_seed(7))
    denoiser.first.bias.requires_grad_(True)
    before = draw(denoiser, start).detach()
    measured(denoiser, start, 1)
    assert denoiser.first.bias.requires_grad
    assert denoiser.first.bias.grad is None
    assert not denoiser.second.weight.requires_grad
    assert torch.equal(draw(denoiser, start), before)
    assert not denoiser.first._forward_pre_hooks


def test_nothing_of_a_trajectory_is_left_in_memory() -> None:
    denoiser, kept = Denoiser().eval(), []

    def observed(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(weakref.ref(args[0]))

    with removing([denoiser.first.register_forward_hook(observed)]):
        measured(denoiser, torch.randn(1, 4), 2)
    gc.collect()
    assert len(kept) == ROWS
    assert all(reference() is None for reference in kept)


def test_what_cannot_be_judged_is_told() -> None:
    denoiser, context = Denoiser().eval(), RowContext(torch.arange(ROWS))
    rounded = {name: [change(context, 1e-3)] for name in READERS}
    arguments = (denoiser, READERS, rounded, context, ROWS)
    with pytest.raises(CalibrationError, match="no gradient reaches activations"):
        finished_activations(*arguments, lambda: torch.ones(1), 1, torch.Generator())
    with pytest.raises(CalibrationError, match="different timesteps"):
        finished_activations(*arguments, lambda: denoiser(torch.ones(2, 4), torch.tensor([0, 1])), 1, torch.Generator())


def test_means_over_files(tmp_path: Path) -> None:
    for number in (1, 3):
        save_activation_errors(tmp_path / str(number), {"tensor": np.full((2, 4), float(number))})
    found = mean_activation_errors([tmp_path / "1", tmp_path / "3"])
    assert np.array_equal(found["tensor"], np.full((2, 4), 2.0))
