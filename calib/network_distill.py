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


def guided_error(error: Tensor, guidance: float) -> tuple[Tensor, float]:
    """(what the sampler sees of `error` [..., halves, values], how many times a half's own variance that is).

    Guided: u + g (c − u); were the halves' errors independent, its variance would be g² + (g − 1)² times theirs.
    """
    if error.shape[-2] != 2:
        return error[..., 0, :], 1.0
    unconditional, conditional = error[..., 0, :], error[..., 1, :]
    return unconditional + guidance * (conditional - unconditional), guidance**2 + (guidance - 1) ** 2


def trajectory_loss(
    error: Tensor, weights: Tensor, total: int, guidance: float, share: float, coherence: float
) -> Tensor:
    """Squared error of the finished picture, as errors along one trajectory add up to it.

    error: [trajectories, steps, halves, values], some steps of each trajectory; weights: [trajectories, steps], the
    picture's squared error for one unit of a step's; total: how many steps a trajectory has. A quantized network errs
    alike at all steps of one picture: on the bundled model at W4A4, giving every step's error to another picture lifts
    PSNR from 24.5 to 31.1 dB. So (Σ a_s e_s)² is minimised, a_s = √weight, and not Σ (a_s e_s)² alone, whose minimum
    is an error smaller at every step and larger in the picture. coherence: 0 (squares only) to 1 (all products of two
    steps too, estimated without bias from the steps at hand). share: of the guided combination against the halves.
    """
    count = error.shape[1]
    guided, unit = guided_error(error, guidance)
    amplitude = guided * weights.sqrt().unsqueeze(-1)
    squares = amplitude.square().sum(dim=1).mean()
    loss = squares * total / count
    if coherence and count > 1:
        products = amplitude.sum(dim=1).square().mean() - squares
        loss = loss + coherence * products * (total * (total - 1)) / (count * (count - 1))
    halves = (weights * error.square().mean(dim=(-2, -1))).mean()
    return share * loss / (unit * total) + (1 - share) * halves


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
    coherence: float,
    iterations: int,
    batch_size: int,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NetworkDistillResult:
    """Train layers `names` of `model` (None: all) for `iterations` batches that mix timesteps.

    targets: float outputs of every entry; step_weights: [steps], how much each sampling step's error counts;
    coherence: weight of products of two steps (`trajectory_loss`), which needs batches of several steps a trajectory;
    checkpoint: a file written about once a minute, from which a killed run goes on. Raises CalibrationError when the
    loss is no number.
    """
    table = guidance_pairs(data)
    total = len(step_weights)
    if len(table) % total:
        raise CalibrationError(f"{len(table)} calls are no whole number of trajectories of {total} steps")
    table = table.reshape(-1, total, table.shape[1])
    optimizer = model.optimizer(names, iterations)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.is_file():
        losses = _resume(checkpoint, model, optimizer)
    saved = time.monotonic()
    for iteration in range(len(losses), iterations):
        chosen = _batch(table, iteration, batch_size, seed, together=coherence > 0)
        index = chosen.flatten()
        batch = data.select(index)
        model.context.set_timestep(batch[TIMESTEP], len(index))
        error = (run(batch) - targets[index]).reshape(*chosen.shape, -1)
        weights = step_weights[data.step[chosen[:, :, 0]]]
        loss = trajectory_loss(error, weights, total, guidance, guided_share, coherence)
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


def _batch(table: Tensor, iteration: int, size: int, seed: int, *, together: bool) -> Tensor:
    """Entries of iteration number `iteration`, int64 [trajectories, steps, halves]; the same after a resume.

    table: [trajectories, steps, halves]. together: half as many steps of a trajectory as the batch has calls, so that
    there are two trajectories at least; else one step each.
    """
    trajectories, steps, halves = table.shape
    calls = max(1, size // halves)
    count = min(steps, max(1, calls // 2)) if together else 1
    wanted = max(1, calls // count)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    order = torch.randint(trajectories, (wanted,), generator=generator)
    if wanted <= trajectories:
        order = torch.randperm(trajectories, generator=generator)[:wanted]
    picked = torch.rand(wanted, steps, generator=generator).argsort(dim=1)[:, :count]
    return table[order.unsqueeze(1), picked]


def _save(path: Path, model: TrainableModel, optimizer: StepOptimizer, losses: list[float]) -> None:
    temporary = path.with_suffix(".tmp")
    document = {
        "model": model.state(),
        "optimizer": optimizer.state(),
        "losses": losses,
    }
    torch.save(document, temporary)
    temporary.replace(path)


def _resume(path: Path, model: TrainableModel, optimizer: StepOptimizer) -> list[float]:
    """Load a checkpoint; returns the losses so far."""
    saved = torch.load(path, weights_only=True)
    model.load_state(saved["model"])
    optimizer.load_state(saved["optimizer"])
    losses: list[float] = saved["losses"]
    return losses
