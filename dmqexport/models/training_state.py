"""What a training loop must remember to go on after an interruption: weights, their average, and the optimizer.

One safetensors file holds it all, with the iteration and the recipe in its header, so that a single rename replaces the
whole checkpoint: whatever moment the process dies at, the file on disk is one complete state. Random numbers are not
part of it, because every iteration derives its own (see `iteration_rng`).
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dmqexport.errors import ModelError

_OPTIMIZER_SLOTS = ("step", "exp_avg", "exp_avg_sq")


def iteration_rng(seed: int, stage: int, iteration: int) -> np.random.Generator:
    """The random numbers of one iteration, the same whether or not the iterations before it ran in this process."""
    return np.random.default_rng([seed, stage, iteration])


def batch_rows(count: int, batch: int, seed: int, stage: int, iteration: int) -> npt.NDArray[np.int64]:
    """The rows of one batch, int64 [batch]: epochs of fresh permutations laid end to end, cut into batches."""
    first = iteration * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    # The epoch streams need seeds of their own, apart from those of the iterations.
    order = np.concatenate([np.random.default_rng([seed, stage, epoch, 1]).permutation(count) for epoch in epochs])
    return order[first - epochs.start * count :][:batch]


def cosine_rate(peak: float, iteration: int, total: int, warm_up: int) -> float:
    """The learning rate of an iteration: a linear warm-up, then half a cosine from `peak` down to zero."""
    if iteration < warm_up:
        return peak * (iteration + 1) / warm_up
    return peak * 0.5 * (1.0 + math.cos(math.pi * (iteration - warm_up) / max(1, total - warm_up)))


class TrainingState:
    """Parameters under training with their exponential moving average and AdamW state; mutable, one a stage."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], *, weight_decay: float, ema_decay: float) -> None:
        """Take over the parameters of `modules`, whose keys prefix the names in the checkpoint."""
        self.parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.optimizer = torch.optim.AdamW(list(self.parameters.values()), weight_decay=weight_decay, fused=True)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.ema_decay = ema_decay
        self.iteration = 0

    def update(self, loss: torch.Tensor, learning_rate: float, max_norm: float) -> None:
        """One optimizer update from a scalar loss, then one update of the averages; counts the iteration."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        parameters = list(self.parameters.values())
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        self.optimizer.step()
        # Early averages would be mostly initial weights: ramp the decay up.
        decay = min(self.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in parameters], 1.0 - decay)
        self.iteration += 1

    def use_averages(self) -> None:
        """Copy the averaged weights into the modules: the end of a stage."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.averages[name])

    def save(self, path: Path, recipe: Mapping[str, object]) -> None:
        """Replace the checkpoint at `path` in one step; `recipe` is what a resuming run must agree with."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach()
            tensors[f"average/{name}"] = self.averages[name]
            for slot, value in self.optimizer.state[parameter].items():
                tensors[f"{slot}/{name}"] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        header = {"iteration": str(self.iteration), "recipe": json.dumps(recipe, sort_keys=True)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)

    def resume(self, path: Path, recipe: Mapping[str, object]) -> bool:
        """Take everything from the checkpoint at `path`; False when there is none yet."""
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as checkpoint:
                header = checkpoint.metadata()
                tensors = {name: checkpoint.get_tensor(name) for name in checkpoint.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ModelError(
                f"the checkpoint {path} cannot be read: {error}", hint="delete it to train this stage from the start"
            ) from error
        begun_with = json.loads(header["recipe"])
        if begun_with != recipe:
            changed = sorted(key for key in {*begun_with, *recipe} if begun_with.get(key) != recipe.get(key))
            raise ModelError(
                f"the checkpoint {path} was begun with another recipe: "
                + ", ".join(f"{key} was {begun_with.get(key)!r}, now {recipe.get(key)!r}" for key in changed),
                hint="repeat the first run's options to resume it, or choose another --out",
            )
        self._take(tensors)
        self.iteration = int(header["iteration"])
        return True

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy in place, so that memory layouts, and with them the rounding of every later sum, stay the same."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
                self.averages[name].copy_(tensors[f"average/{name}"])
                self.optimizer.state[parameter] = {
                    slot: torch.empty_like(parameter).copy_(tensors[f"{slot}/{name}"])
                    if slot != "step"
                    else tensors[f"{slot}/{name}"].to(parameter.device)
                    for slot in _OPTIMIZER_SLOTS
                    if f"{slot}/{name}" in tensors
                }
