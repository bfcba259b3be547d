"""Distillation through the sampler: what is compared is where trajectories end, not what single calls predict.

A sampler adds up the errors of its steps. What lowers the squared error of every call need not lower that of their sum:
regression against noise makes errors smaller and more alike. Here the quantized denoiser draws whole trajectories from
the noise that the float model drew from, the loss is the distance between the finished latents, and its gradient runs
back through every step of the scheduler and every call.

The loss of a trajectory is the logarithm of its error, as PSNR is the logarithm of a picture's: few trajectories tip
over into another picture, and squares would train on nothing else.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isfinite, log10
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calib.distributed import sum_gradients
from calib.network_distill import guidance_pairs
from calib.optimizer import StepOptimizer
from calib.sampling import CalibrationSet
from calib.trainable import TrainableModel
from dmqexport.errors import CalibrationError
from dmqexport.ranks import ALONE, Ranks, share

Finish = Callable[[Mapping[str, Tensor]], Tensor]
"""From the inputs of the first call, unguided halves first, to the finished latents [trajectories, ...]."""

_CHECKPOINT_SECONDS = 60.0
_EXACT = 1e-6  # an error this small beside the signal is none
_TRIALS = 8  # how often the held-out trajectories are looked at


@dataclass(frozen=True)
class TrajectoryDistillResult:
    """losses: of every iteration; held_out: (iterations done, mean error of held-out trajectories in dB, below the
    signal's own power), the first before training; kept: iterations after which the state that was kept was reached.
    """

    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    kept: int


def first_calls(data: CalibrationSet, pairs: Tensor) -> dict[str, Tensor]:
    """Inputs of the first call of some trajectories, as a pipeline batches them: all unguided halves, then the guided.

    pairs: int64 [trajectories, halves], of `guidance_pairs`.
    """
    return data.select(pairs.T.flatten())


def log_errors(found: Tensor, exact: Tensor) -> Tensor:
    """ln(|found − exact|² / |exact|² + 1e-6) of each trajectory, [trajectories]; both [trajectories, ...]."""
    power = exact.flatten(1).square().sum(dim=1).clamp_min(1e-20)
    return ((found - exact).flatten(1).square().sum(dim=1) / power + _EXACT).log()


class _Trainer:
    """The state of one training: what `distill_trajectories` is made of."""

    def __init__(
        self,
        model: TrainableModel,
        starts: CalibrationSet,
        finished: Tensor,
        finish: Finish,
        optimizer: StepOptimizer,
        held_out: int,
        batch_size: int,
        ranks: Ranks,
    ) -> None:
        self.model, self.starts, self.finished, self.finish = model, starts, finished, finish
        self.optimizer, self.batch_size, self.ranks = optimizer, batch_size, ranks
        self.pairs = guidance_pairs(starts)
        if len(self.pairs) != len(finished):
            raise CalibrationError(f"{len(self.pairs)} first calls, but {len(finished)} finished trajectories")
        self.trained = len(self.pairs) - held_out
        if held_out < 1 or self.trained < 1:
            raise CalibrationError(
                f"{len(self.pairs)} trajectories, of which {held_out} are held out, leave {self.trained} to train on",
                hint="raise training.trajectories or lower training.sampler.held_out",
            )
        self.losses: list[float] = []
        self.trials: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}

    def errors(self, index: Tensor) -> Tensor:
        """`log_errors` of the trajectories in `index`."""
        found = self.finish(first_calls(self.starts, self.pairs[index]))
        return log_errors(found, self.finished[index])

    def trial(self) -> None:
        """Look at the held-out trajectories, and keep this state when none before was better."""
        self.model.forget()
        mine = torch.tensor(share(self.ranks, range(self.trained, len(self.pairs))), dtype=torch.int64)
        total = np.zeros(1)
        with torch.no_grad(), self.model.held_weights():
            for part in torch.split(mine, self.batch_size):
                total += float(self.errors(part).double().sum())
        self.model.forget()
        mean = float(self.ranks.total(total)[0]) / (len(self.pairs) - self.trained) * 10 * log10(np.e)
        if not self.trials or mean < min(value for _, value in self.trials):
            self.best = {name: value.clone() for name, value in self.model.state().items()}
        self.trials.append((len(self.losses), mean))

    def step(self, seed: int, iterations: int, names: Collection[str] | None) -> None:
        """One batch, one update."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + len(self.losses))
        chosen = torch.randperm(self.trained, generator=generator)[: self.batch_size]
        mine = torch.tensor(share(self.ranks, range(len(chosen))), dtype=torch.int64)
        present = len(mine) > 0
        with self.model.held_weights():
            # A rank without a share must have gradients at the same parameters as the others, though they be zero.
            errors = self.errors(chosen[mine] if present else chosen[:1])
            loss = errors.sum() / len(chosen) * float(present)
            push = self.model.regularizer(len(self.losses) / iterations, names) / self.ranks.size
            self.optimizer.zero_grad()
            torch.autograd.backward(loss + 1e-6 * push)
        whole = sum_gradients(self.ranks, self.optimizer.parameters, loss, present)
        if not isfinite(whole):
            raise CalibrationError(
                f"training through the sampler diverged at iteration {len(self.losses)} of {iterations}: "
                f"the loss is {whole}",
                hint="lower the learning rates: --set training.sampler.rates.weights=0.001",
            )
        self.losses.append(whole)
        self.optimizer.step()
        self.model.forget()

    def save(self, path: Path) -> None:
        """Write everything needed to go on."""
        temporary = path.with_suffix(".tmp")
        document = {
            "model": self.model.state(),
            "optimizer": self.optimizer.state(),
            "best": self.best,
            "losses": self.losses,
            "trials": self.trials,
        }
        torch.save(document, temporary)
        temporary.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state(saved["model"])
        self.optimizer.load_state(saved["optimizer"])
        self.best, self.losses = saved["best"], saved["losses"]
        self.trials = [(int(done), float(value)) for done, value in saved["trials"]]


def distill_trajectories(
    model: TrainableModel,
    starts: CalibrationSet,
    finished: Tensor,
    finish: Finish,
    *,
    names: Collection[str] | None,
    iterations: int,
    batch_size: int,
    held_out: int,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> TrajectoryDistillResult:
    """Train layers `names` of `model` (None: all) for `iterations` batches of `batch_size` whole trajectories.

    starts: inputs of every trajectory's first call, all guidance halves; finished: the float model's latents at the
    end, [trajectories, ...]; finish: draws with `model` what the float model drew. The last `held_out` trajectories are
    not trained on: `model` ends in that of nine states, the untrained one among them, that draws those best, so that
    training never makes them worse. checkpoint: a file written about once a minute, from which a killed run goes on;
    ranks: processes that share every batch, trajectory by trajectory, on equal models. Raises CalibrationError when
    the loss is no number or nothing is left to train on, RankError when another rank failed.
    """
    optimizer = model.optimizer(names, iterations)
    trainer = _Trainer(model, starts, finished, finish, optimizer, held_out, batch_size, ranks)
    if checkpoint is not None and checkpoint.is_file():
        trainer.resume(checkpoint)
    else:
        trainer.trial()
    saved = time.monotonic()
    pause = -(-iterations // _TRIALS)
    for iteration in range(len(trainer.losses), iterations):
        trainer.step(seed, iterations, names)
        if (iteration + 1) % pause == 0 or iteration + 1 == iterations:
            trainer.trial()
        if checkpoint is not None and ranks.rank == 0 and time.monotonic() - saved > _CHECKPOINT_SECONDS:
            trainer.save(checkpoint)
            saved = time.monotonic()
        if progress is not None:
            progress(iteration + 1, iterations)
    model.load_state(trainer.best)
    kept = min(trainer.trials, key=lambda trial: trial[1])[0]
    return TrajectoryDistillResult(tuple(trainer.losses), tuple(trainer.trials), kept)
