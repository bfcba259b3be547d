"""Adam for dense parameters and for table rows: a row that is not in the batch keeps its value and its momentum.

Weight matrices may be moved by Muon instead: every update is orthogonalized, so that directions in which the gradient
is weak move as far as those in which it is strong (Jordan et al., 2024; arXiv:2502.16982 for the size of a step).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

import torch
from torch import nn

#: What moves weight matrices.
MatrixOptimizer = Literal["adam", "muon"]

# `match_rms_adamw` makes the root mean square of a step a fifth of the rate, as of Adam's steps late in long trainings;
# in some hundred steps Adam's are about twice that, so that with this factor one rate serves both.
_MUON_RATE = 2.0
_MUON: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters and their learning rate; matrices: whether they are weights [out, k], which Muon may move."""

    parameters: Sequence[nn.Parameter]
    rate: float
    matrices: bool = False


class StepOptimizer:
    """Adam or Muon over `dense` and lazy Adam over `sparse` (embeddings with sparse gradients), one cosine schedule to
    zero. `matrices` says what moves groups of weight matrices that have more than one row and column."""

    def __init__(
        self,
        dense: Sequence[ParameterGroup],
        sparse: Sequence[ParameterGroup],
        steps: int,
        matrices: MatrixOptimizer = "adam",
    ) -> None:
        self._steps, self._done = max(steps, 1), 0
        self._optimizers: list[torch.optim.Optimizer] = []
        turned = [group for group in dense if matrices == "muon" and _orthogonalizable(group)]
        rest = [group for group in dense if not any(group is other for other in turned)]
        self._add(torch.optim.Adam, rest)
        self._add(torch.optim.SparseAdam, sparse)
        self._add(torch.optim.Muon, turned, _MUON_RATE, **_MUON)

    def _add(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        groups: Sequence[ParameterGroup],
        factor: float = 1.0,
        **how: Any,
    ) -> None:
        listed = [
            {"params": live, "lr": factor * group.rate, "initial_lr": factor * group.rate}
            for group in groups
            if (live := [p for p in group.parameters if p.requires_grad and p.numel()])
        ]
        if listed:
            self._optimizers.append(kind(listed, **how))

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


def _orthogonalizable(group: ParameterGroup) -> bool:
    """Whether its weights have directions: neither a vector nor one row of a depthwise convolution each."""
    return group.matrices and all(min(parameter.shape) > 1 for parameter in group.parameters)
