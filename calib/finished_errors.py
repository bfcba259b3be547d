"""What rounding each weight does to where trajectories end.

The error of a rounded weight is the same at every step of a sampler, so that its effects add up over the steps; those
of rounded activations differ from call to call and add up less (calib/finished_activations.py). What judges single
calls therefore makes too little of weights' errors, and less of some layers' than of others'. Here the gradient of
finished latents with respect to each weight runs back through the whole sampler: for a small change δW and a random
direction v of the latents, <Jᵀv, δW>² is an unbiased estimate of what the change does to them, squared (as in
calib/sketch.py, with a weight in the place of a layer's output).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmqexport.errors import CalibrationError


class RoundingErrors:
    """What rounding changes in each weight at each of several widths, on disk: one layer at a time is in memory."""

    def __init__(self, folder: Path) -> None:
        """The files of `add`, in `folder`."""
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def add(self, name: str, errors: Mapping[int, Tensor]) -> None:
        """errors: bits → rounded less float weight, in its own shape."""
        temporary = self._path(name).with_suffix(".tmp")
        # Half precision: a thousandth of an error that is squared and averaged.
        save_file({str(bits): error.half().contiguous() for bits, error in errors.items()}, str(temporary))
        temporary.replace(self._path(name))

    def holds(self, name: str) -> bool:
        """Whether the layer was added."""
        return self._path(name).is_file()

    def projected(self, name: str, gradient: Tensor) -> dict[int, float]:
        """bits → <gradient, error>; gradient: of the layer's weight, in its shape."""
        gradient, errors = gradient.cpu(), load_file(str(self._path(name)))
        return {int(bits): float((error * gradient).sum(dtype=torch.float64)) for bits, error in errors.items()}


def finished_errors(
    denoiser: nn.Module,
    names: Sequence[str],
    errors: RoundingErrors,
    draw: Callable[[], Tensor],
    probes: int,
    generator: torch.Generator,
) -> dict[str, dict[int, float]]:
    """Layer → bits → what its rounding alone does to the latents that `draw` ends in, squared, as a share of what a
    change of all weights by noise of variance 1 does: so that no trajectory outweighs others by being near a choice
    between two pictures, as in the loss of calib/trajectory_distill.py.

    draw: the trajectory of the float model, with a gradient; probes: random directions, a backward pass each. Raises
    CalibrationError when no gradient reaches a weight.
    """
    weights = {name: denoiser.get_submodule(name).get_parameter("weight") for name in names}
    found = {name: dict[int, float]() for name in names}
    with only_gradients_of(denoiser, list(weights.values())), torch.enable_grad():
        finished = draw()
        if not finished.requires_grad:
            raise CalibrationError("no gradient reaches the finished latents, so that weights' errors cannot be judged")
        for probe in range(probes):
            direction = torch.randn(finished.shape, generator=generator).to(finished.device)
            last = probe == probes - 1
            gradients = torch.autograd.grad(
                finished, list(weights.values()), direction, retain_graph=not last, allow_unused=True
            )
            total = sum(
                float(gradient.square().sum(dtype=torch.float64)) for gradient in gradients if gradient is not None
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    raise CalibrationError(f"{name}: its weight has no part in the finished latents")
                for bits, value in errors.projected(name, gradient).items():
                    found[name][bits] = found[name].get(bits, 0.0) + value**2 / max(total, 1e-300) / probes
    return found


@contextmanager
def only_gradients_of(denoiser: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block, gradients at these parameters and no others."""
    before = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in weights:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def save_errors(path: Path, found: Mapping[str, Mapping[int, float]]) -> None:
    """Write what `finished_errors` gave."""
    arrays = {name: torch.tensor(list(curve.values()), dtype=torch.float64) for name, curve in found.items()}
    widths = {f"{name}|bits": torch.tensor(list(curve), dtype=torch.int64) for name, curve in found.items()}
    save_file({**arrays, **widths}, str(path))


def mean_errors(paths: Sequence[Path]) -> dict[str, dict[int, float]]:
    """The mean over the files of `save_errors`: layer → bits → error."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    widths: dict[str, list[int]] = {}
    for path in paths:
        for name, values in load_file(str(path)).items():
            if name.endswith("|bits"):
                widths[name.removesuffix("|bits")] = [int(bits) for bits in values]
            else:
                sums[name] = sums.get(name, 0.0) + values.numpy() / len(paths)
    return {name: dict(zip(widths[name], values.tolist(), strict=True)) for name, values in sums.items()}
