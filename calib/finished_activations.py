"""What rounding each activation does to where trajectories end, table row by table row.

Allocation judges single calls, all rows of a table by one error. Where a trajectory ends, a tensor's rounding counts
for much at some steps and little at others, and for each tensor at steps of its own: on the bundled model, bits chosen
for every tensor and row by what finished latents see leave two decibels less of activations' error than one pattern of
rows for all tensors, at the same average. Nor do its errors stay apart over the steps: together they do 2.5 times
what they do one by one. As in calib/finished_errors.py, <Jᵀv, δx>² with a random direction v of the
latents is an unbiased estimate of what a change δx does to them, squared; one backward pass through the sampler tells
it of every tensor, call and width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calib.finished_errors import only_gradients_of
from calib.probe import removing
from calib.quantizer import RowContext, follow_timesteps
from dmqexport.errors import CalibrationError

Errors = npt.NDArray[np.float64]
Rounded = Callable[[Tensor], Tensor]
"""From a tensor to the values that its codes stand for, in the rows of a `RowContext`."""


class _Witness(torch.autograd.Function):
    """The identity, which shows its input and the gradient there when the backward pass comes by.

    The input is saved as autograd saves tensors, so that checkpointing can free it and make it again.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shown: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(tensor)
        ctx.shown = shown
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (tensor,) = ctx.saved_tensors
        ctx.shown(tensor, gradients[0])
        return gradients[0], None


class _Measurement:
    """<gradient, rounded less exact> of every tensor, width and row, summed over the calls of one backward pass."""

    def __init__(self, rounded: Mapping[str, Sequence[Rounded]], context: RowContext, rows: int) -> None:
        self._rounded, self._context, self._rows = rounded, context, rows
        self._read: dict[str, tuple[Tensor, Tensor]] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the last backward pass."""
        self.found = {name: np.zeros((len(given), self._rows)) for name, given in self._rounded.items()}
        self.power = 0.0

    def new_call(self) -> None:
        """No tensor of an earlier call is read again."""
        self._read.clear()

    def reader(self, source: str) -> Callable[..., tuple[Tensor, ...]]:
        """A hook before a layer that reads tensor `source`; layers that read the same one are seen together."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tensor = args[0]
            if source not in self._read or self._read[source][0] is not tensor:
                rows = self._context.rows
                if int(rows.min()) != int(rows.max()):
                    raise CalibrationError("the samples of a call have different timesteps; a sampler's have one")
                row = int(rows[0])
                given = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
                seen = _Witness.apply(given, lambda *shown: self._add(source, row, *shown))  # type: ignore[no-untyped-call]
                self._read[source] = (tensor, seen)
            return (self._read[source][1], *args[1:])

        return hook

    def _add(self, source: str, row: int, tensor: Tensor, gradient: Tensor) -> None:
        self._context.rows = torch.full((len(tensor),), row)
        self.power += float(gradient.square().sum(dtype=torch.float64))
        total = self.found[source]
        exact = float((gradient * tensor).sum(dtype=torch.float64))
        for index, rounded in enumerate(self._rounded[source]):
            total[index, row] += float((gradient * rounded(tensor)).sum(dtype=torch.float64)) - exact


def finished_activations(
    denoiser: nn.Module,
    readers: Mapping[str, Sequence[str]],
    rounded: Mapping[str, Sequence[Rounded]],
    context: RowContext,
    rows: int,
    draw: Callable[[], Tensor],
    probes: int,
    generator: torch.Generator,
) -> dict[str, Errors]:
    """Tensor → float64 [widths, rows + 1]: what its rounding does to the latents that `draw` ends in, squared, in each
    row alone and (last column) in all rows together, as a share of what a change of all tensors by noise of variance 1
    does.

    readers: tensor → the layers that read it; rounded: tensor → what its codes stand for, width by width, in the rows
    of `context`, which follows the denoiser's timesteps; draw: the trajectory of the float model, with a gradient.
    Raises CalibrationError when no gradient reaches the tensors, or when a call has several timesteps.
    """
    measurement = _Measurement(rounded, context, rows)
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(measurement.reader(source))
        for source, names in readers.items()
        for name in names
    ]
    result = {name: np.zeros((len(given), rows + 1)) for name, given in rounded.items()}
    handles.append(follow_timesteps(denoiser, context, measurement.new_call))
    with removing(handles), only_gradients_of(denoiser, []), torch.enable_grad():
        finished = draw()
        measurement.new_call()  # else tensors, the graph behind them and this would keep each other
        if not finished.requires_grad:
            raise CalibrationError("no gradient reaches activations from the finished latents; they cannot be judged")
        for probe in range(probes):
            direction = torch.randn(finished.shape, generator=generator).to(finished.device)
            measurement.begin()
            with torch.no_grad():
                torch.autograd.backward(finished, direction, retain_graph=probe < probes - 1)
            for name, found in measurement.found.items():
                both = np.concatenate([found, found.sum(axis=1, keepdims=True)], axis=1)
                result[name] += both**2 / max(measurement.power, 1e-300) / probes
    return result


def save_activation_errors(path: Path, found: Mapping[str, Errors]) -> None:
    """Write what `finished_activations` gave."""
    save_file({name: torch.from_numpy(values) for name, values in found.items()}, str(path))


def mean_activation_errors(paths: Sequence[Path]) -> dict[str, Errors]:
    """The mean over the files of `save_activation_errors`."""
    total: dict[str, Errors] = {}
    for path in paths:
        for name, values in load_file(str(path)).items():
            total[name] = total.get(name, 0.0) + values.numpy() / len(paths)
    return total
