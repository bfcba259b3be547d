"""Denoiser inputs along float trajectories: recorded from a running pipeline, stored as safetensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmqexport.errors import CalibrationError

TIMESTEP = "timestep"


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the denoiser, one entry a (trajectory, step, guidance half).

    inputs: name → tensor [entries, ...], with `timestep` int64 or float32 [entries]; trajectory and step: int64
    [entries]. timestep_scale: what a timestep is multiplied by before it is rounded to its key in the timestep table.
    """

    inputs: Mapping[str, Tensor]
    trajectory: Tensor
    step: Tensor
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        if TIMESTEP not in self.inputs:
            raise CalibrationError(f"calibration inputs lack {TIMESTEP!r}: got {sorted(self.inputs)}")
        for name, value in self.inputs.items():
            if value.shape[0] != self.trajectory.shape[0]:
                raise CalibrationError(
                    f"input {name!r} has {value.shape[0]} entries, expected {self.trajectory.shape[0]}"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CalibrationError(
                    f"the float model produced NaN or infinity in {name!r} along its trajectories",
                    hint="check the weights and the scheduler: a float model that diverges cannot be calibrated",
                )

    def __len__(self) -> int:
        return int(self.trajectory.shape[0])

    @property
    def timesteps(self) -> Tensor:
        """int64 [entries], as keys of the timestep table."""
        return timestep_keys(self.inputs[TIMESTEP], self.timestep_scale)

    def select(self, index: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the entries in `index` (int64 [n])."""
        return {name: value[index] for name, value in self.inputs.items()}

    def at(self, index: Tensor) -> "CalibrationSet":
        """Return the set of the entries in `index` (int64 [n]), in that order."""
        return CalibrationSet(self.select(index), self.trajectory[index], self.step[index], self.timestep_scale)

    def batches(self, size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield (entry indices, inputs) in order, at most `size` entries each."""
        for start in range(0, len(self), size):
            index = torch.arange(start, min(start + size, len(self)))
            yield index, self.select(index)

    def subset(self, count: int, seed: int) -> "CalibrationSet":
        """Return `count` entries spread evenly over steps, chosen by `seed`; all of them when there are fewer."""
        if count >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        # Stable sort by step, then take every k-th: every step keeps its share.
        order = order[torch.argsort(self.step[order], stable=True)]
        picked = order[torch.linspace(0, len(self) - 1, count).round().long()].sort().values
        return self.at(picked)

    def drawn(self, count: int, seed: int, shares: Tensor) -> "CalibrationSet":
        """`count` entries, chosen by `seed`, of which step s has the share shares[s] [steps], sum 1.

        Where a step has too few entries, they are repeated: what counts is how much each step weighs.
        """
        generator = torch.Generator().manual_seed(seed)
        points = (torch.arange(count) + 0.5) / count
        wanted = torch.bincount(
            torch.searchsorted(shares.double().cumsum(0), points).clamp_max(len(shares) - 1), minlength=len(shares)
        )
        picked = []
        for step, number in enumerate(wanted.tolist()):
            entries = torch.nonzero(self.step == step).flatten()
            order = entries[torch.randperm(len(entries), generator=generator)]
            if number and not len(order):
                raise CalibrationError(f"no entry of step {step}, of which {number} of {count} were wanted")
            picked.append(order[torch.arange(number) % max(len(order), 1)])
        joined = torch.cat(picked)
        # Mixed, so that every batch holds all steps.
        return self.at(joined[torch.randperm(count, generator=generator)])

    def renumbered(self, first: int) -> "CalibrationSet":
        """The same entries, trajectories counted from `first` instead of 0."""
        return replace(self, trajectory=self.trajectory + first)

    def thinned(self, stride: int) -> "CalibrationSet":
        """Every `stride`-th call of each trajectory, all its guidance halves; neighbouring trajectories keep others.

        A trajectory's calls resemble each other, and what is fitted to few trajectories fits no others: of the same
        number of entries, those from more trajectories are worth more. `stride` trajectories cover every step.
        """
        return self if stride == 1 else self.at(torch.nonzero((self.step + self.trajectory) % stride == 0).flatten())

    def save(self, path: Path) -> None:
        """Write to `path` as safetensors."""
        tensors = {f"inputs.{name}": value.contiguous() for name, value in self.inputs.items()}
        order = {"trajectory": self.trajectory.contiguous(), "step": self.step.contiguous()}
        save_file({**tensors, **order, "timestep_scale": torch.tensor(self.timestep_scale)}, str(path))

    @classmethod
    def load(cls, path: Path) -> "CalibrationSet":
        """Read what `save` wrote."""
        tensors = load_file(str(path))
        inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
        return cls(inputs, tensors["trajectory"], tensors["step"], float(tensors["timestep_scale"]))

    @classmethod
    def concatenate(cls, parts: "list[CalibrationSet]") -> "CalibrationSet":
        """Join sets in order."""
        return cls(
            {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs},
            torch.cat([part.trajectory for part in parts]),
            torch.cat([part.step for part in parts]),
            parts[0].timestep_scale,
        )


class TrajectoryRecorder:
    """Context manager: records what a pipeline feeds its denoiser, call by call, without changing anything.

    One call is one sampling step of a batch. `bind` turns the arguments of a call into the inputs by name, each
    [batch, ...]. `trajectories` is the number of pictures in that batch; a guided call carries a multiple of it.
    """

    def __init__(
        self, denoiser: nn.Module, bind: "BindCall", trajectories: int, first: int = 0, timestep_scale: float = 1.0
    ) -> None:
        self._denoiser = denoiser
        self._bind = bind
        self._trajectories = trajectories
        self._first = first
        self._timestep_scale = timestep_scale
        self._calls: list[dict[str, Tensor]] = []
        self._handle: Any = None

    def __enter__(self) -> "TrajectoryRecorder":
        self._handle = self._denoiser.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(self._bind(args, kwargs))
        self._calls.append({name: value.detach().cpu().clone() for name, value in named.items()})

    def result(self) -> CalibrationSet:
        """Return what was recorded; raises CalibrationError when nothing was."""
        if not self._calls:
            raise CalibrationError("the pipeline never called its denoiser")
        entries = [call[TIMESTEP].shape[0] for call in self._calls]
        trajectory = [torch.arange(count) % self._trajectories + self._first for count in entries]
        step = [torch.full((count,), index) for index, count in enumerate(entries)]
        names = self._calls[0].keys()
        return CalibrationSet(
            {name: torch.cat([call[name] for call in self._calls]) for name in names},
            torch.cat(trajectory),
            torch.cat(step),
            self._timestep_scale,
        )


BindCall = Callable[[Sequence[Any], Mapping[str, Any]], Mapping[str, Tensor]]


def timestep_keys(timestep: Tensor, scale: float = 1.0) -> Tensor:
    """int64, the keys of timesteps in the timestep table: integers as they are, floats times `scale`, rounded."""
    if timestep.is_floating_point():
        return (timestep * scale).round().to(torch.int64)
    return timestep.to(torch.int64)


def broadcast_timestep(timestep: object, batch: int, scale: float = 1.0) -> Tensor:
    """Return the keys, int64 [batch], of the scalar, [1] or [batch] timestep a pipeline passes."""
    return timestep_keys(torch.as_tensor(timestep), scale).reshape(-1).expand(batch).contiguous()


def seeded_generator(seed: int, *keys: object) -> np.random.Generator:
    """Return a generator that depends only on `seed` and `keys`, so that shards and batch sizes change nothing."""
    words = [seed & 0xFFFFFFFF] + [byte for key in keys for byte in str(key).encode()]
    return np.random.default_rng(np.random.SeedSequence(words))
