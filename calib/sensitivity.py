"""What each layer costs the model's output at each width: the exact sweep, and the table that every method fills.

Exact means DMQ's rate-distortion curves: one layer at a time is quantized in the float model and the output's
distortion is averaged over calibration entries of every timestep row. Only what lies downstream of the layer is run.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from calib.candidates import Candidates, WidthPair
from calib.metrics import Metric
from calib.quantizer import RowContext
from calib.replay import Replay
from calib.sampling import TIMESTEP, CalibrationSet
from dmqexport.errors import CalibrationError
from dmqexport.ranks import ALONE, Ranks, share

Run = Callable[[Mapping[str, Tensor]], Tensor]
Progress = Callable[[int, int], None]
_FLOOR = 1e-12
_SWEEPS = 100  # of the two-way isotonic fit; it settles in a few


@dataclass(frozen=True)
class Sensitivity:
    """Distortion of the model's output with one layer quantized: layer → pair of widths → mean over entries."""

    distortion: Mapping[str, Mapping[WidthPair, float]]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        document = {
            name: {str(pair): value for pair, value in curve.items()} for name, curve in self.distortion.items()
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Sensitivity":
        """Read what `save` wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            {
                name: {WidthPair.parse(text): float(value) for text, value in curve.items()}
                for name, curve in document.items()
            }
        )

    def scaled(self, factors: Mapping[str, float]) -> "Sensitivity":
        """Every curve of a layer in `factors` multiplied by its factor."""
        return Sensitivity(
            {
                name: {pair: value * factors.get(name, 1.0) for pair, value in curve.items()}
                for name, curve in self.distortion.items()
            }
        )

    def separated(self) -> "Sensitivity":
        """Pairs replaced by the sum of weights alone and activations alone, as methods do that measure them apart."""
        return Sensitivity({name: _separated(name, curve) for name, curve in self.distortion.items()})

    def isotonic(self) -> "Sensitivity":
        """The nearest table (least squares of logarithms) in which more bits never cost more.

        Two-way isotonic regression over weight and activation bits, by Dykstra's alternating projections.
        """
        return Sensitivity({name: _isotonic(curve) for name, curve in self.distortion.items()})


class Journal:
    """Finished parts of a long measurement on disk, one JSON line each, so that a killed one goes on where it was.

    Every rank but the first writes a file of its own beside `path`; all read all, however many ranks there once were.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        """Read what is there; a last line cut short by the kill is dropped."""
        self._common, self._ranks = path, ranks
        self._path = path.with_name(f"{path.stem}-{ranks.rank}{path.suffix}") if ranks.rank else path
        self._parts: dict[tuple[int, str], dict[str, float]] = {}
        self._read()

    def _read(self) -> None:
        others = self._common.parent.glob(f"{self._common.stem}-*{self._common.suffix}")
        for path in [self._common, *sorted(others)]:
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                try:
                    part = json.loads(line)
                    self._parts[int(part["batch"]), str(part["layer"])] = part["values"]
                except (ValueError, KeyError, TypeError):
                    continue

    def missing(self, batches: int, layers: Iterable[str]) -> dict[int, list[str]]:
        """Batch → layers that this rank has to measure there. What is missing is shared batch by batch, layer by layer,
        so that a rank visits as few batches as can be."""
        named = list(layers)
        wanted = [(batch, place) for batch in range(batches) for place, name in enumerate(named)]
        lacking = [unit for unit in wanted if (unit[0], named[unit[1]]) not in self._parts]
        # Rank 0 says what is missing: the others may already write.
        agreed = json.loads(self._ranks.tell("sensitivity", json.dumps(lacking)))
        found: dict[int, list[str]] = {}
        for batch, place in share(self._ranks, agreed):
            found.setdefault(batch, []).append(named[place])
        return found

    def finish(self, entries: int) -> Sensitivity:
        """Wait for the other ranks; the mean over all batches, of `entries` entries together."""
        self._ranks.meet("sensitivity")
        if self._ranks.size > 1:
            self._read()
        return self.table(entries)

    def add(self, batch: int, layer: str, values: Mapping[WidthPair, float]) -> None:
        """Keep sums over the entries of `batch` with `layer` changed."""
        named = {str(pair): value for pair, value in values.items()}
        self._parts[batch, layer] = named
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * (file.tell() > 0) + json.dumps({"batch": batch, "layer": layer, "values": named}))

    def table(self, entries: int) -> Sensitivity:
        """The mean over all batches, of `entries` entries together."""
        total: dict[str, dict[WidthPair, float]] = {}
        for (_, layer), values in sorted(self._parts.items()):
            curve = total.setdefault(layer, {})
            for text, value in values.items():
                pair = WidthPair.parse(text)
                curve[pair] = curve.get(pair, 0.0) + value / entries
        return Sensitivity(total)


def measure_exact(
    denoiser: nn.Module,
    candidates: Candidates,
    pairs: Mapping[str, Sequence[WidthPair]],
    calibration: CalibrationSet,
    run: Run,
    metric: Metric,
    batch_size: int,
    journal: Path,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Sensitivity:
    """Swap each layer of `pairs` into the float denoiser at each of its pairs; returns mean distortions.

    Finished (batch, layer) parts are read from `journal` and new ones appended; `ranks` share the others. Raises
    CalibrationError when the distortion is not finite.
    """
    kept = Journal(journal, ranks)
    context = RowContext(torch.from_numpy(candidates.row_map.copy()), timestep_scale=calibration.timestep_scale)
    batches = list(calibration.batches(batch_size))
    shared = kept.missing(len(batches), pairs)
    total, done = sum(len(names) for names in shared.values()), 0
    for number, missing in shared.items():
        entries, inputs = batches[number]
        context.set_timestep(inputs[TIMESTEP], len(entries))
        replay = Replay(denoiser, partial(run, inputs))
        for name in missing:
            base = denoiser.get_submodule(name)
            values: dict[WidthPair, float] = {}
            try:
                for pair in pairs[name]:
                    denoiser.set_submodule(name, candidates.module(base, name, pair, context))
                    distance = metric.distance(replay.output, replay.downstream_of(name))
                    values[pair] = _finite(float(distance.double().sum()), name, pair)
            finally:
                denoiser.set_submodule(name, base)
            kept.add(number, name, values)
            done += 1
            if progress is not None:
                progress(done, total)
    return kept.finish(len(calibration))


def _finite(value: float, name: str, pair: WidthPair) -> float:
    if not np.isfinite(value):
        raise CalibrationError(
            f"{name} at {pair}: the distortion of the output is {value}, expected a finite number",
            hint="the float model's output is not finite, or the layer's ranges are damaged: calibrate anew",
        )
    return value


def _separated(name: str, curve: Mapping[WidthPair, float]) -> dict[WidthPair, float]:
    result = {}
    for pair in curve:
        sides = [WidthPair(pair.weight, None), WidthPair(None, pair.activation)]
        needed = [side for side in sides if side != WidthPair(None, None)]
        absent = [str(side) for side in needed if side not in curve]
        if absent:
            raise CalibrationError(f"{name}: {', '.join(absent)} was not measured, separated sensitivities need it")
        result[pair] = sum(curve[side] for side in needed)
    return result


def _isotonic(curve: Mapping[WidthPair, float]) -> dict[WidthPair, float]:
    """Projects the full grid of pairs (float counts as the widest) onto tables that fall along both axes."""
    weights = sorted({pair.weight for pair in curve}, key=_width)
    activations = sorted({pair.activation for pair in curve}, key=_width)
    grid = np.full((len(weights), len(activations)), np.nan)
    for row, weight in enumerate(weights):
        for column, activation in enumerate(activations):
            value = curve.get(WidthPair(weight, activation))
            grid[row, column] = np.nan if value is None else np.log(max(value, _FLOOR))
    fitted, over_rows, over_columns = grid.copy(), np.zeros_like(grid), np.zeros_like(grid)
    for _ in range(_SWEEPS):
        before = fitted
        by_rows = np.stack([_falling(line) for line in fitted + over_rows])
        over_rows = fitted + over_rows - by_rows
        fitted = np.stack([_falling(line) for line in (by_rows + over_columns).T]).T
        over_columns = by_rows + over_columns - fitted
        if np.nanmax(np.abs(fitted - before), initial=0.0) < _FLOOR:
            break
    # What alternation leaves of a violation is below its tolerance; running minima end it.
    filled = np.where(np.isnan(fitted), np.inf, fitted)
    fitted = np.minimum.accumulate(np.minimum.accumulate(filled, axis=0), axis=1)
    return {
        pair: float(np.exp(fitted[weights.index(pair.weight), activations.index(pair.activation)])) for pair in curve
    }


def _falling(line: np.ndarray) -> np.ndarray:
    result = line.copy()
    known = ~np.isnan(line)
    if known.any():
        result[known] = isotonic_regression(line[known], increasing=False).x
    return result


def _width(bits: int | None) -> float:
    return np.inf if bits is None else bits


def rank_correlation(left: Sensitivity, right: Sensitivity) -> float:
    """Spearman's correlation over every (layer, pair) that both tables hold."""
    shared = [
        (left.distortion[name][pair], right.distortion[name][pair])
        for name in left.distortion
        for pair in left.distortion[name]
        if name in right.distortion and pair in right.distortion[name]
    ]
    ranks = [np.argsort(np.argsort(np.asarray(side))) for side in zip(*shared, strict=True)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def candidate_pairs(
    weights: Iterable[int | None], activations: Iterable[int | None], *, separated: bool
) -> tuple[WidthPair, ...]:
    """All pairs of the two lists; with `separated` also each width alone, the other side in float."""
    weights, activations = list(weights), list(activations)
    pairs = {WidthPair(weight, activation) for weight in weights for activation in activations}
    if separated:
        pairs |= {WidthPair(weight, None) for weight in weights} | {WidthPair(None, bits) for bits in activations}
    pairs -= {WidthPair(None, None)}
    return tuple(sorted(pairs, key=lambda pair: (_width(pair.weight), _width(pair.activation))))
