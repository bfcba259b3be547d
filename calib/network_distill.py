"""Distillation of the whole denoiser along float trajectories: the global stage, and by itself LSQ or EfficientDM.

No data set is needed (EfficientDM, arXiv:2310.03270, Sec. 3.2): inputs are what the float model met while it sampled,
targets are what it answered. Guided models are trained on what the sampler really uses, the guided combination
u + g (c − u): its error weighs the two halves' errors as the picture will.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calib.optimizer import StepOptimizer
from calib.sampling import TIMESTEP, CalibrationSet
from calib.trainable import TrainableModel
from dmqexport.errors import CalibrationError

Run = Callable[[Mapping[str, Tensor]], Tensor]

_CHECKPOINT_SECONDS = 60.0
_ROUNDING_PUSH = 1e-6  # of AdaRound's term, a sum over all weights


@dataclass(frozen=True)
class NetworkDistillResult:
    """Mean losses of the first and the last tenth of the iterations, and every loss."""

    first: float
    last: float
    losses: tuple[float, ...]


def teacher_outputs(
    data: CalibrationSet, run: Run, batch_size: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """What the float model answers to every entry of `data`, [entries, ...]."""
    outputs = []
    with torch.no_grad():
        for index, batch in data.batches(batch_size):
            outputs.append(run(batch))
            if progress is not None:
                progress(int(index[-1]) + 1, len(data))
    return torch.cat(outputs)


def guidance_pairs(data: CalibrationSet) -> Tensor:
    """Entries of one guided call side by side, int64 [calls, halves]: unconditional first, as diffusers batches them.

    Unguided trajectories have one half. Raises CalibrationError when calls differ in their number of halves.
    """
    call = data.trajectory * (int(data.step.max()) + 1) + data.step
    order = torch.argsort(call, stable=True)
    counts = torch.unique_consecutive(call[order], return_counts=True)[1]
    halves = int(counts[0])
    if not bool((counts == halves).all()):
        raise CalibrationError("trajectories mix guided and unguided calls; they cannot be trained on together")
    return order.reshape(-1, halves)


def guided_loss(error: Tensor, weights: Tensor, guidance: float, share: float) -> Tensor:
    """Mean square of the error a sampler sees. error: [calls, halves, ...]; weights: [calls].

    share: how much the guided combination counts against the halves by themselves, 0 to 1.
    """
    halves = error.square().flatten(1).mean(dim=1)
    if error.shape[1] != 2:
        return (weights * halves).mean()
    unconditional, conditional = error[:, 0], error[:, 1]
    guided = unconditional + guidance * (conditional - unconditional)
    # Independent errors of the halves would give g² + (g − 1)²: the two terms are of one size.
    unit = guidance**2 + (guidance - 1) ** 2
    return (weights * (share * guided.square().flatten(1).mean(dim=1) / unit + (1 - share) * halves)).mean()


def distill_network(
    model: TrainableModel,
    data: CalibrationSet,
    targets: Tensor,
    run: Run,
    *,
    names: Collection[str] | None,
    guidance: float,
    guided_share: float,
    step_weights: Tensor,
    iterations: int,
    batch_size: int,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NetworkDistillResult:
    """Train layers `names` of `model` (None: all) for `iterations` batches that mix timesteps.

    targets: float outputs of every entry; step_weights: [steps], how much each sampling step's error counts;
    checkpoint: a file written about once a minute, from which a killed run goes on. Raises CalibrationError when the
    loss is no number.
    """
    pairs = guidance_pairs(data)
    calls = max(1, batch_size // pairs.shape[1])
    calls = min(calls, len(pairs))
    optimizer = model.optimizer(names, iterations)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.is_file():
        losses = _resume(checkpoint, model, optimizer)
    saved = time.monotonic()
    for iteration in range(len(losses), iterations):
        chosen = pairs[_batch(iteration, calls, len(pairs), seed)]
        index = chosen.flatten()
        batch = data.select(index)
        model.context.set_timestep(batch[TIMESTEP], len(index))
        error = (run(batch) - targets[index]).reshape(*chosen.shape, *targets.shape[1:])
        loss = guided_loss(error, step_weights[data.step[chosen[:, 0]]], guidance, guided_share)
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(
                f"distillation diverged at iteration {iteration} of {iterations}: the loss is {float(loss.detach())}",
                hint="lower the learning rates: --set training.network.rates.weights=0.001",
            )
        losses.append(float(loss.detach()))
        pushed = loss + _ROUNDING_PUSH * model.regularizer(iteration / iterations, names)
        optimizer.zero_grad()
        torch.autograd.backward(pushed)
        optimizer.step()
        if checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
            _save(checkpoint, model, optimizer, losses)
            saved = time.monotonic()
        if progress is not None:
            progress(iteration + 1, iterations)
    model.forget()
    tenth = max(1, len(losses) // 10)
    return NetworkDistillResult(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth, tuple(losses))


def _batch(iteration: int, calls: int, pairs: int, seed: int) -> Tensor:
    """Which calls iteration number `iteration` trains on: permutation after permutation, the same after a resume."""
    per_epoch = pairs // calls
    epoch, position = divmod(iteration, per_epoch)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * calls : (position + 1) * calls]


def _save(path: Path, model: TrainableModel, optimizer: StepOptimizer, losses: list[float]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state(), "optimizer": optimizer.state(), "losses": losses}, temporary)
    temporary.replace(path)


def _resume(path: Path, model: TrainableModel, optimizer: StepOptimizer) -> list[float]:
    """Load a checkpoint; returns the losses so far."""
    saved = torch.load(path, weights_only=True)
    model.load_state(saved["model"])
    optimizer.load_state(saved["optimizer"])
    losses: list[float] = saved["losses"]
    return losses
