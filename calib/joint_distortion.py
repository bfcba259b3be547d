"""The distortion of a whole plan, measured, against the sum over its layers: additivity, and curves bent to fit.

Allocation assumes Σ D_l. `measure_joint` runs the model with every layer quantized; `measure_marginals` tells what
each layer contributes there (the distortion that vanishes with it): curves are rescaled by it and allocated anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calib.candidates import Candidates, WidthPair
from calib.metrics import Metric
from calib.replay import Replay
from calib.sampling import CalibrationSet
from calib.sensitivity import Progress, Run

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
) -> float:
    """Mean distortion over `calibration` with every layer of `choice` quantized at once, rounding to nearest."""
    total = 0.0
    with torch.no_grad():
        references = [run(inputs) for _, inputs in calibration.batches(batch_size)]
        with candidates.simulated(denoiser, choice):
            for reference, (_, inputs) in zip(references, calibration.batches(batch_size), strict=True):
                total += float(metric.distance(reference, run(inputs)).double().sum())
    return total / len(calibration)


def measure_marginals(
    denoiser: nn.Module,
    candidates: Candidates,
    choice: Mapping[str, WidthPair],
    calibration: CalibrationSet,
    run: Run,
    metric: Metric,
    batch_size: int,
    progress: Progress | None = None,
) -> Marginals:
    """Joint distortion, and the same with each layer in turn put back to float; only what lies downstream is run."""
    batches = list(calibration.batches(batch_size))
    joint, done = 0.0, 0
    without: dict[str, float] = dict.fromkeys(choice, 0.0)
    differences: dict[str, list[Tensor]] = {name: [] for name in choice}
    with torch.no_grad():
        references = [run(inputs) for _, inputs in batches]
    originals = {name: denoiser.get_submodule(name) for name in choice}
    with candidates.simulated(denoiser, choice):
        for reference, (_, inputs) in zip(references, batches, strict=True):
            replay = Replay(denoiser, partial(run, inputs))
            whole = metric.distance(reference, replay.output).double()
            joint += float(whole.sum())
            for name, original in originals.items():
                quantized = denoiser.get_submodule(name)
                denoiser.set_submodule(name, original)
                try:
                    distance = metric.distance(reference, replay.downstream_of(name)).double()
                finally:
                    denoiser.set_submodule(name, quantized)
                without[name] += float(distance.sum())
                differences[name].append(whole - distance)
                done += 1
                if progress is not None:
                    progress(done, len(batches) * len(choice))
    count = len(calibration)
    deviation = {
        name: float(torch.cat(parts).std()) / count**0.5 if count > 1 else float("inf")
        for name, parts in differences.items()
    }
    return Marginals(joint / count, {name: value / count for name, value in without.items()}, deviation)
