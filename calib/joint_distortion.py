"""The distortion of a whole plan, measured, against the sum over its layers: additivity, and curves bent to fit.

Allocation assumes Σ D_l. `measure_joint` runs the model with every layer quantized; `measure_marginals` tells what
each layer contributes there (the distortion that vanishes with it): curves are rescaled by it and allocated anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from calib.candidates import Candidates, WidthPair
from calib.metrics import Metric
from calib.replay import Replay
from calib.sampling import CalibrationSet
from calib.sensitivity import Progress, Run
from dmqexport.ranks import ALONE, Ranks, share

_LARGEST_FACTOR = 8.0  # what one pass may change a curve by


@dataclass(frozen=True)
class Marginals:
    """joint: distortion of the whole plan; without: layer → distortion with that layer back in float; deviation: layer
    → standard error of the difference, from entry to entry."""

    joint: float
    without: Mapping[str, float]
    deviation: Mapping[str, float]

    def factors(self, predicted: Mapping[str, float]) -> dict[str, float]:
        """What makes each curve say here what its layer costs here, as a multiple; `predicted`: D_l of the plan.

        A layer's share of the whole is a small difference of two large figures. It counts as far as it is certain: the
        curve's own value is taken as known to within itself, the difference to within its standard error, and the two
        are averaged by those variances.
        """
        factors = {}
        for name, rest in self.without.items():
            prior = max(predicted[name], 1e-300)
            trust = prior**2 / (prior**2 + self.deviation[name] ** 2)
            ratio = 1 + trust * ((self.joint - rest) / prior - 1)
            factors[name] = min(max(ratio, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)
        return factors


def measure_joint(
    denoiser: nn.Module,
    candidates: Candidates,
    choice: Mapping[str, WidthPair],
    calibration: CalibrationSet,
    run: Run,
    metric: Metric,
    batch_size: int,
    ranks: Ranks = ALONE,
) -> float:
    """Mean distortion over `calibration` with every layer of `choice` quantized at once, rounding to nearest.

    ranks: processes that share the batches; the mean is that of one, bit for bit.
    """
    count = -(-len(calibration) // batch_size)
    mine, sums = share(ranks, range(count)), np.zeros(count)
    with torch.no_grad():
        numbered = enumerate(calibration.batches(batch_size))
        references = {number: run(inputs) for number, (_, inputs) in numbered if number in mine}
        with candidates.simulated(denoiser, choice):
            for number, (_, inputs) in enumerate(calibration.batches(batch_size)):
                if number in mine:
                    sums[number] = float(metric.distance(references[number], run(inputs)).double().sum())
    return float(sum(ranks.total(sums).tolist())) / len(calibration)


def measure_marginals(
    denoiser: nn.Module,
    candidates: Candidates,
    choice: Mapping[str, WidthPair],
    calibration: CalibrationSet,
    run: Run,
    metric: Metric,
    batch_size: int,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Marginals:
    """Joint distortion, and the same with each layer in turn put back to float; only what lies downstream is run.

    ranks: processes that share batches and layers; the result is that of one, bit for bit.
    """
    batches, count = [inputs for _, inputs in calibration.batches(batch_size)], len(calibration)
    starts = range(0, count, batch_size)
    mine: dict[int, list[str | None]] = {}  # batch → layers; None: with all of them quantized
    for number, name in share(ranks, [(n, name) for n in range(len(batches)) for name in (None, *choice)]):
        mine.setdefault(number, []).append(name)
    with torch.no_grad():
        references = {number: run(batches[number]) for number in mine}
    originals = {name: denoiser.get_submodule(name) for name in choice}
    columns: dict[str | None, int] = {name: column for column, name in enumerate((None, *choice))}
    found, judged, done = np.zeros((count, len(columns))), np.zeros(count), 0
    with candidates.simulated(denoiser, choice):
        for number, names in mine.items():
            replay = Replay(denoiser, partial(run, batches[number]))
            for name in names:
                output = replay.output
                if name is not None:
                    quantized = denoiser.get_submodule(name)
                    denoiser.set_submodule(name, originals[name])
                    try:
                        output = replay.downstream_of(name)
                    finally:
                        denoiser.set_submodule(name, quantized)
                distance = metric.distance(references[number], output).double()
                rows = slice(starts[number], starts[number] + len(distance))  # a metric may judge entries together
                found[rows, columns[name]] = distance.cpu().numpy()
                judged[rows] += name is None
                done += 1
                if progress is not None:
                    progress(min(done * ranks.size, len(batches) * len(columns)), len(batches) * len(columns))
    found = ranks.total(found)[ranks.total(judged) > 0]
    joint = found[:, 0]
    without = {name: found[:, column] for name, column in columns.items() if name is not None}
    deviation = {
        name: float((joint - own).std(ddof=1)) / count**0.5 if count > 1 else float("inf")
        for name, own in without.items()
    }
    return Marginals(joint.sum() / count, {name: own.sum() / count for name, own in without.items()}, deviation)
