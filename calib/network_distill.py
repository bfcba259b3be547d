"""Distillation of the whole denoiser along float trajectories: the global stage, and by itself LSQ or EfficientDM.

No data set is needed (EfficientDM, arXiv:2310.03270, Sec. 3.2): inputs are what the float model met while it sampled,
targets are what it answered. Guided models are trained on what the sampler really uses, the guided combination
u + g (c − u): its error weighs the two halves' errors as the picture will.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.sampling import TIMESTEP, CalibrationSet
from calib.trainable import TrainableModel
from dmqexport.errors import CalibrationError

Run = Callable[[Mapping[str, Tensor]], Tensor]


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
    guidance: float,
    guided_share: float,
    step_weights: Tensor,
    iterations: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> NetworkDistillResult:
    """Train everything `model` holds for `iterations` batches that mix timesteps.

    targets: float outputs of every entry; step_weights: [steps], how much each sampling step's error counts.
    """
    pairs = guidance_pairs(data)
    calls = max(1, batch_size // pairs.shape[1])
    optimizer = model.optimizer(None, iterations)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    order = torch.zeros(0, dtype=torch.int64)
    for iteration in range(iterations):
        if len(order) < calls:
            order = torch.randperm(len(pairs), generator=generator)
        chosen, order = pairs[order[:calls]], order[calls:]
        index = chosen.flatten()
        batch = data.select(index)
        model.context.set_timestep(batch[TIMESTEP], len(index))
        error = (run(batch) - targets[index]).reshape(*chosen.shape, *targets.shape[1:])
        loss = guided_loss(error, step_weights[data.step[chosen[:, 0]]], guidance, guided_share)
        loss = loss + model.regularizer(iteration / iterations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss):
            raise CalibrationError(f"distillation diverged at iteration {iteration} of {iterations}: the loss is NaN")
        if progress is not None:
            progress(iteration + 1, iterations)
    model.forget()
    tenth = max(1, len(losses) // 10)
    return NetworkDistillResult(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth, tuple(losses))
