"""The distortion of a whole plan, measured, against the sum over its layers: additivity, and curves bent to fit.

Allocation assumes Σ D_l. `measure_joint` runs the model with every layer quantized; `measure_marginals` tells what
each layer contributes there (the distortion that vanishes with it): curves are rescaled by it and allocated anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from calib.candidates import Candidates, WidthPair
from calib.metrics import Metric
from calib.quantizer import simulate
from calib.replay import Replay
from calib.sampling import CalibrationSet
from calib.sensitivity import Progress, Run

_LARGEST_FACTOR = 8.0  # one pass corrects; it must not let the noise of a near-zero curve take over


@dataclass(frozen=True)
class Marginals:
    """joint: distortion of the whole plan; without: layer → distortion with that layer back in float."""

    joint: float
    without: Mapping[str, float]

    def factors(self, predicted: Mapping[str, float]) -> dict[str, float]:
        """What makes each curve say here what its layer costs here, as a multiple; `predicted`: D_l of the plan."""
        factors = {}
        for name, rest in self.without.items():
            ratio = (self.joint - rest) / max(predicted[name], 1e-300)
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
    plan, codes = candidates.plan(choice)
    total = 0.0
    with torch.no_grad():
        references = [run(inputs) for _, inputs in calibration.batches(batch_size)]
        with simulate(denoiser, plan, codes):
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
    plan, codes = candidates.plan(choice)
    batches = list(calibration.batches(batch_size))
    joint, without, done = 0.0, dict.fromkeys(choice, 0.0), 0
    with torch.no_grad():
        references = [run(inputs) for _, inputs in batches]
    originals = {name: denoiser.get_submodule(name) for name in choice}
    with simulate(denoiser, plan, codes):
        for reference, (_, inputs) in zip(references, batches, strict=True):
            replay = Replay(denoiser, partial(run, inputs))
            joint += float(metric.distance(reference, replay.output).double().sum())
            for name, original in originals.items():
                quantized = denoiser.get_submodule(name)
                denoiser.set_submodule(name, original)
                try:
                    distance = metric.distance(reference, replay.downstream_of(name))
                finally:
                    denoiser.set_submodule(name, quantized)
                without[name] += float(distance.double().sum())
                done += 1
                if progress is not None:
                    progress(done, len(batches) * len(choice))
    count = len(calibration)
    return Marginals(joint / count, {name: value / count for name, value in without.items()})
