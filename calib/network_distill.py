"""Distillation of the whole denoiser along float trajectories: the global stage, and by itself LSQ or EfficientDM.

No data set is needed (EfficientDM, arXiv:2310.03270, Sec. 3.2): inputs are what the float model met while it sampled,
targets are what it answered. Guided models are trained on what the sampler really uses, the guided combination
u + g (c − u): its error weighs the two halves' errors as the picture will. Calls are drawn by what their step does to
the picture, and squared error is kept from what it does to every noisy regression: shortening what it cannot predict,
here c − u, at all steps alike (`GuidanceLength`).

Several ranks share every batch, call by call or trajectory by trajectory: batches are those of one process, and only
the order of float sums differs.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from calib.distributed import sum_gradients
from calib.optimizer import StepOptimizer
from calib.sampling import TIMESTEP, CalibrationSet
from calib.trainable import TrainableModel
from dmqexport.errors import CalibrationError
from dmqexport.ranks import ALONE, Ranks, share

Run = Callable[[Mapping[str, Tensor]], Tensor]

_CHECKPOINT_SECONDS = 60.0
_ROUNDING_PUSH = 1e-6  # of AdaRound's term, a sum over all weights
_SLOWEST = 0.05  # share of a new value in the running mean of a step's guidance length
_SHORTEST = 0.05  # of a batch's mean |c − u|²: what a single call's is taken for at least


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
    picture's squared error for one unit of a step's; total: how many steps a trajectory has. coherence: 0 (squares
    only) to 1: how much (Σ a_s e_s)², a_s = √weight, counts beyond Σ (a_s e_s)²; estimated without bias from the steps
    at hand. share: of the guided combination against the halves.
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


class GuidanceLength:
    """How much too long the quantized model's c − u is at every step, as a running mean, and a penalty on that.

    Least squares shrinks what it cannot predict towards its mean. c − u is small beside the noise of 4 bits, and a
    shorter one is the same error at every step: the pictures of the bundled model got worse (26.2 to 25.8 dB) while the
    guided error of every step fell by a third, and better than before (27.4 dB) when the sampler made up for it.
    """

    def __init__(self, steps: int) -> None:
        self.mean = torch.zeros(steps)
        self.count = torch.zeros(steps)

    def penalty(
        self,
        error: Tensor,
        difference: Tensor,
        step: Tensor,
        weights: Tensor,
        guidance: float,
        own: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """Something with the gradient of the mean over steps of (mean excess length)².

        error: of the guided prediction, [own calls, values]; difference: the float model's c − u, [calls, values];
        step: int64 [calls]; weights: [calls], 1 / (steps · the share of this step among all calls); own: int64, this
        rank's calls, whose part of the mean is returned, None for all. Every rank's running mean hears of all calls.
        """
        chosen = torch.arange(len(step)) if own is None else own
        power = difference.square().sum(dim=1)
        power = power.clamp_min(_SHORTEST * float(power.mean())).clamp_min(1e-20)
        excess = (error * difference[chosen]).sum(dim=1) / (guidance * power[chosen])
        heard = torch.zeros(len(step))
        heard[chosen] = excess.detach()
        heard = torch.from_numpy(ranks.total(heard.numpy()))
        for index, value in zip(step.tolist(), heard.tolist(), strict=True):
            self.count[index] += 1
            self.mean[index] += max(1 / float(self.count[index]), _SLOWEST) * (value - float(self.mean[index]))
        if not len(chosen):
            return torch.zeros(())
        return (weights[chosen] * 2 * self.mean[step[chosen]] * excess).mean() * (len(chosen) / len(step))


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
    step_shares: Tensor | None = None,
    coherence: float = 0.0,
    guidance_length: float = 0.0,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> NetworkDistillResult:
    """Train layers `names` of `model` (None: all) for `iterations` batches that mix timesteps.

    targets: float outputs of every entry; step_weights: [steps], how much each sampling step's error counts;
    step_shares: [steps], how often it is drawn, sum 1, None: all alike; coherence: weight of products of two steps
    (`trajectory_loss`), for which `data` must hold whole trajectories and shares are not used; guidance_length: weight
    of `GuidanceLength`; checkpoint: a file written about once a minute, from which a killed run goes on; ranks:
    processes that do this together on equal models. Raises CalibrationError when the loss is no number, RankError when
    another rank failed.
    """
    calls = guidance_pairs(data)
    total = len(step_weights)
    shares = torch.full((total,), 1 / total) if step_shares is None or coherence else step_shares
    if coherence and len(calls) % total:
        raise CalibrationError(f"{len(calls)} calls are no whole number of trajectories of {total} steps")
    by_step = [calls[data.step[calls[:, 0]] == step] for step in range(total)]
    if any(len(found) == 0 for found in by_step):
        raise CalibrationError(f"no entry of step {[len(found) for found in by_step].index(0)} of {total} to train on")
    optimizer = model.optimizer(names, iterations)
    length = GuidanceLength(total)
    guided = calls.shape[1] == 2 and guidance_length > 0 and guided_share > 0 and guidance > 0
    losses: list[float] = []
    if checkpoint is not None and checkpoint.is_file():
        losses = _resume(checkpoint, model, optimizer, length)
    saved = time.monotonic()
    for iteration in range(len(losses), iterations):
        if coherence:
            chosen = _together(calls.reshape(-1, total, calls.shape[1]), iteration, batch_size, seed)
        else:
            chosen = _spread(by_step, shares, iteration, batch_size, seed)
        mine = torch.tensor(share(ranks, range(len(chosen))), dtype=torch.int64)
        present = len(mine) > 0
        # A rank without a share must have gradients at the same parameters as the others, though they be zero.
        part = chosen[mine] if present else chosen[:1]
        index = part.flatten()
        batch = data.select(index)
        model.context.set_timestep(batch[TIMESTEP], len(index))
        error = (run(batch) - targets[index]).reshape(*part.shape, -1)
        step = data.step[chosen[:, :, 0]]
        drawn = 1 / (total * shares[step])
        weights = (step_weights[step] * drawn)[mine if present else slice(1)]
        loss = trajectory_loss(error, weights, total, guidance, guided_share, coherence) * (len(mine) / len(chosen))
        pushed = loss + _ROUNDING_PUSH * model.regularizer(iteration / iterations, names) / ranks.size
        if guided:
            answer, unit = guided_error(error[: len(mine)], guidance)
            exact = targets[chosen].flatten(3)
            difference = (exact[:, :, 1] - exact[:, :, 0]).flatten(0, 1)
            own = torch.arange(step.numel()).reshape(step.shape)[mine].flatten()
            penalty = length.penalty(
                answer.flatten(0, 1), difference, step.flatten(), drawn.flatten(), guidance, own, ranks
            )
            pushed = pushed + guided_share * guidance_length / unit * penalty
        optimizer.zero_grad()
        torch.autograd.backward(pushed)
        whole = sum_gradients(ranks, optimizer.parameters, loss, present)
        if not isfinite(whole):
            raise CalibrationError(
                f"distillation diverged at iteration {iteration} of {iterations}: the loss is {whole}",
                hint="lower the learning rates: --set training.network.rates.weights=0.001",
            )
        losses.append(whole)
        optimizer.step()
        if checkpoint is not None and ranks.rank == 0 and time.monotonic() - saved > _CHECKPOINT_SECONDS:
            _save(checkpoint, model, optimizer, length, losses)
            saved = time.monotonic()
        if progress is not None:
            progress(iteration + 1, iterations)
    model.forget()
    tenth = max(1, len(losses) // 10)
    return NetworkDistillResult(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth, tuple(losses))


def _generator(seed: int, iteration: int) -> torch.Generator:
    """Batches are the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + iteration)


def _spread(by_step: Sequence[Tensor], shares: Tensor, iteration: int, size: int, seed: int) -> Tensor:
    """Entries of iteration number `iteration`, int64 [calls, 1, halves]; steps are drawn by `shares`, stratified.

    by_step: calls of each step, [calls, halves].
    """
    calls = max(1, size // by_step[0].shape[1])
    generator = _generator(seed, iteration)
    points = (torch.arange(calls) + torch.rand(1, generator=generator)) / calls
    steps = torch.searchsorted(shares.cumsum(0), points).clamp_max(len(shares) - 1)
    picked = []
    for found, count in zip(by_step, torch.bincount(steps, minlength=len(by_step)).tolist(), strict=True):
        order = torch.randperm(len(found), generator=generator)
        picked.append(found[order[torch.arange(count) % len(found)]])
    return torch.cat(picked).unsqueeze(1)


def _together(table: Tensor, iteration: int, size: int, seed: int) -> Tensor:
    """Entries of iteration number `iteration`, int64 [trajectories, steps, halves], several steps of a trajectory.

    table: [trajectories, steps, halves]. Half as many steps of a trajectory as the batch has calls, so that there are
    two trajectories at least.
    """
    trajectories, steps, halves = table.shape
    calls = max(1, size // halves)
    count = min(steps, max(1, calls // 2))
    wanted = max(1, calls // count)
    generator = _generator(seed, iteration)
    order = torch.randint(trajectories, (wanted,), generator=generator)
    if wanted <= trajectories:
        order = torch.randperm(trajectories, generator=generator)[:wanted]
    picked = torch.rand(wanted, steps, generator=generator).argsort(dim=1)[:, :count]
    return table[order.unsqueeze(1), picked]


def _save(
    path: Path, model: TrainableModel, optimizer: StepOptimizer, length: GuidanceLength, losses: list[float]
) -> None:
    temporary = path.with_suffix(".tmp")
    document = {
        "model": model.state(),
        "optimizer": optimizer.state(),
        "length": {"mean": length.mean, "count": length.count},
        "losses": losses,
    }
    torch.save(document, temporary)
    temporary.replace(path)


def _resume(path: Path, model: TrainableModel, optimizer: StepOptimizer, length: GuidanceLength) -> list[float]:
    """Load a checkpoint; returns the losses so far."""
    saved = torch.load(path, weights_only=True)
    model.load_state(saved["model"])
    optimizer.load_state(saved["optimizer"])
    length.mean, length.count = saved["length"]["mean"], saved["length"]["count"]
    losses: list[float] = saved["losses"]
    return losses
