"""Adam for dense parameters and for table rows: a row that is not in the batch keeps its value and its momentum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters and their learning rate."""

    parameters: Sequence[nn.Parameter]
    rate: float


class StepOptimizer:
    """Adam over `dense` and lazy Adam over `sparse` (embeddings with sparse gradients), one cosine schedule to zero."""

    def __init__(self, dense: Sequence[ParameterGroup], sparse: Sequence[ParameterGroup], steps: int) -> None:
        self._steps, self._done = max(steps, 1), 0
        self._optimizers: list[torch.optim.Optimizer] = []
        for kind, groups in ((torch.optim.Adam, dense), (torch.optim.SparseAdam, sparse)):
            listed = [
                {"params": live, "lr": group.rate, "initial_lr": group.rate}
                for group in groups
                if (live := [p for p in group.parameters if p.requires_grad and p.numel()])
            ]
            if listed:
                self._optimizers.append(kind(listed))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, in one order."""
        return [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later, tensors and numbers only."""
        return {"done": self._done, "optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._done = int(state["done"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One update at the schedule's present rate."""
        factor = 0.5 * (1 + cos(pi * min(1.0, self._done / self._steps)))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
        self._done += 1
