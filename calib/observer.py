"""Activation statistics per timestep row: weighted samples with exact extremes, bounded in memory and order-free."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from calib.probe import AttentionMode, LayerInfo, ModuleStack, ProbeResult, removing
from calib.sampling import CalibrationSet, seeded_generator
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerOp
from dmqexport.quant_types import FloatArray

_TAIL = 4  # exact values kept at each end of every observed tensor
_FEWEST = 16  # values taken of an entry at least, beside its tails
_BLOCK = 64
_PERMUTED = 2**16
ATTENTION_OPERANDS = ("query", "key", "probability", "value")


@dataclass(frozen=True)
class ActivationStatistics:
    """values, weights: float32 [rows, n] (weight 0 pads short rows); low, high: float32 [rows]; second_moment: float32
    [channels], the mean of x² a channel over all rows (empty for attention operands)."""

    values: Tensor
    weights: Tensor
    low: Tensor
    high: Tensor
    second_moment: Tensor


class _Accumulator:
    """Statistics of one tensor: a bounded sample of values, extremes of every row, second moments of the channels.

    Entries may come in any order and in batches of any size: nothing here depends on either.
    """

    def __init__(self, key: str, rows: int, keep: int, sampled: frozenset[int], seed: int) -> None:
        """keep: values taken from each entry in `sampled`; of the others, only extremes and moments are kept."""
        self._key, self._rows, self._keep, self._sampled = key, rows, keep, sampled
        self._generator = seeded_generator(seed, key)
        self._positions: Tensor | None = None
        self._entries: list[int] = []
        self._rows_of: list[int] = []
        self._values: list[Tensor] = []
        self._weights = torch.zeros(0)
        self._low = torch.full((rows,), float("inf"))
        self._high = torch.full((rows,), -float("inf"))
        self._moment: Tensor | None = None
        self._count = 0

    def observe(self, tensor: Tensor, entries: list[int], rows: list[int], channel_axis: int | None) -> None:
        """Add `tensor` [entries, ...]; `rows` names the table row of each entry."""
        flat = tensor.reshape(len(entries), -1)
        tail = min(_TAIL, flat.shape[1] // 4)
        # Sums and extremes where the tensor lies; what is kept, which is little, on the CPU.
        top, bottom = largest_values(flat, tail).float().cpu(), -largest_values(-flat, tail).float().cpu()
        if not bool(torch.isfinite(top).all() and torch.isfinite(bottom).all()):  # NaN counts as the largest
            raise CalibrationError(f"{self._key}: NaN or infinity in a float activation")
        where = torch.tensor(rows)
        self._high.scatter_reduce_(0, where, top.amax(dim=1) if tail else flat.amax(dim=1).float().cpu(), "amax")
        self._low.scatter_reduce_(0, where, bottom.amin(dim=1) if tail else flat.amin(dim=1).float().cpu(), "amin")
        kept = [index for index, entry in enumerate(entries) if entry in self._sampled]
        if kept:
            self._values.append(torch.cat([bottom[kept], self._picked(flat, entries, kept), top[kept]], dim=1))
            self._entries += [entries[index] for index in kept]
            self._rows_of += [rows[index] for index in kept]
        if channel_axis is not None:
            self._add_moments(tensor, channel_axis)

    def _picked(self, flat: Tensor, entries: list[int], kept: list[int]) -> Tensor:
        """Values at random positions, float32 [kept entries, n]."""
        size = flat.shape[1]
        tail, body = min(_TAIL, size // 4), min(self._keep, size)
        if self._positions is None:
            few = size > _PERMUTED  # then a permutation of all positions would take longer than the forward
            drawn = self._generator.choice(size, body, replace=False) if few else self._generator.permutation(size)
            self._positions = torch.from_numpy(drawn[:body])
            outer = torch.ones(tail)
            self._weights = torch.cat([outer, torch.full((body,), (size - 2 * tail) / body), outer])
        # Rotating one random choice by the entry's number covers every position and depends on no batch order.
        offsets = torch.tensor([entries[index] for index in kept]).unsqueeze(1) * max(1, size // 7 | 1)
        positions = ((self._positions.unsqueeze(0) + offsets) % size).to(flat.device)
        return torch.stack([flat[index, chosen] for index, chosen in zip(kept, positions, strict=True)]).float().cpu()

    def _add_moments(self, tensor: Tensor, channel_axis: int) -> None:
        axes = [axis for axis in range(1, tensor.ndim) if axis != channel_axis]
        norms = torch.linalg.vector_norm(tensor, dim=axes, dtype=torch.float32) if axes else tensor.float()
        positions = tensor[0].numel() // tensor.shape[channel_axis]
        # Sums of float32 in float64 are exact unless entries differ by a factor of a million: any order gives the same.
        total = norms.square().div_(positions).sum(dim=0, dtype=torch.float64).cpu()
        self._moment = total if self._moment is None else self._moment + total
        self._count += len(tensor)

    def state(self) -> dict[str, Tensor]:
        """What was observed, to be saved and merged: see `merge`."""
        found = {
            "entries": torch.tensor(self._entries, dtype=torch.int64),
            "rows": torch.tensor(self._rows_of, dtype=torch.int64),
            "low": self._low,
            "high": self._high,
            "count": torch.tensor(self._count),
        }
        if self._values:
            found |= {"values": torch.cat(self._values), "weights": self._weights}
        return found if self._moment is None else {**found, "moment": self._moment}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what another accumulator of the same tensor observed in other entries."""
        self._entries += state["entries"].tolist()
        self._rows_of += state["rows"].tolist()
        self._low, self._high = torch.minimum(self._low, state["low"]), torch.maximum(self._high, state["high"])
        self._count += int(state["count"])
        if "values" in state:
            self._values.append(state["values"])
            self._weights = state["weights"]
        if "moment" in state:
            self._moment = state["moment"] if self._moment is None else self._moment + state["moment"]

    def result(self) -> ActivationStatistics:
        """Merge what was observed, in entry order."""
        order = torch.argsort(torch.tensor(self._entries))
        values = torch.cat(self._values)[order]
        rows = torch.tensor(self._rows_of)[order]
        counts = torch.bincount(rows, minlength=self._rows)
        if int(counts.min()) == 0:
            empty = (counts == 0).nonzero().flatten().tolist()
            raise CalibrationError(f"{self._key}: no calibration sample falls into rows {empty}")
        longest = int(counts.max()) * values.shape[1]
        merged, weights = torch.zeros(self._rows, longest), torch.zeros(self._rows, longest)
        for row in range(self._rows):
            part = values[rows == row]
            merged[row, : part.numel()] = part.flatten()
            weights[row, : part.numel()] = self._weights.repeat(part.shape[0])
        moments = torch.zeros(0) if self._moment is None else (self._moment / self._count).float()
        return ActivationStatistics(merged, weights, self._low, self._high, moments)


def largest_values(flat: Tensor, count: int) -> Tensor:
    """The `count` largest values of every row, [rows, count]; flat [rows, n]. NaN counts as the largest.

    They lie in the `count` blocks with the largest maxima, and finding those reads memory once.
    """
    size = flat.shape[1]
    blocks = size // _BLOCK
    if blocks <= count:
        return flat.topk(count, dim=1).values
    body = flat[:, : blocks * _BLOCK].reshape(len(flat), blocks, _BLOCK)
    chosen = body.amax(dim=2).topk(count, dim=1).indices
    inside = body.gather(1, chosen.unsqueeze(2).expand(-1, -1, _BLOCK)).flatten(1)
    return torch.cat([inside, flat[:, blocks * _BLOCK :]], dim=1).topk(count, dim=1).values


class Observer:
    """Gathers statistics of every quantizable tensor of a denoiser over a calibration set.

    Tensors that do not depend on the timestep have one row. Keys are `layer#segment` of the first reader, and
    `attention#operand`. A tensor with channel `factors` (float32 [channels] by key) is observed after the division.
    """

    def __init__(
        self,
        found: ProbeResult,
        row_map: np.ndarray,
        samples_per_row: int,
        seed: int,
        attention: bool,
        factors: Mapping[str, FloatArray] | None = None,
    ) -> None:
        self._found = found
        self._row_map = torch.from_numpy(np.asarray(row_map).copy())
        self._rows = int(self._row_map.max()) + 1
        self._samples_per_row = samples_per_row
        self._seed = seed
        self._attention = attention
        self._factors = {key: torch.from_numpy(factor.copy()) for key, factor in (factors or {}).items()}
        self.statistics_: dict[str, ActivationStatistics] = {}

    def observe(
        self,
        denoiser: nn.Module,
        calibration: CalibrationSet,
        run: Callable[[dict[str, Tensor]], object],
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, ActivationStatistics]:
        """Run the float denoiser over `calibration`; returns and keeps `statistics_`, forgetting any earlier ones."""
        accumulators = self._observed(denoiser, calibration, run, batch_size, progress, None)
        self.statistics_ = {key: part.result() for key, part in accumulators.items()}
        return self.statistics_

    def observe_part(
        self,
        denoiser: nn.Module,
        calibration: CalibrationSet,
        run: Callable[[dict[str, Tensor]], object],
        batch_size: int,
        batches: Collection[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """What `combine` needs of the batches of `calibration` with these numbers, tensors by `key|field`."""
        accumulators = self._observed(denoiser, calibration, run, batch_size, progress, batches)
        return {f"{key}|{field}": value for key, part in accumulators.items() for field, value in part.state().items()}

    def combine(self, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, ActivationStatistics]:
        """`statistics_` from the parts that together hold every batch once; their order matters to the last bit."""
        accumulators: dict[str, _Accumulator] = {}
        for part in parts:
            states: dict[str, dict[str, Tensor]] = {}
            for name, tensor in part.items():
                key, field = name.rsplit("|", 1)
                states.setdefault(key, {})[field] = tensor
            for key, state in states.items():
                if key not in accumulators:
                    accumulators[key] = _Accumulator(key, len(state["low"]), 0, frozenset(), self._seed)
                accumulators[key].merge(state)
        self.statistics_ = {key: accumulators[key].result() for key in sorted(accumulators)}
        return self.statistics_

    def _observed(
        self,
        denoiser: nn.Module,
        calibration: CalibrationSet,
        run: Callable[[dict[str, Tensor]], object],
        batch_size: int,
        progress: Callable[[int, int], None] | None,
        batches: Collection[int] | None,
    ) -> dict[str, _Accumulator]:
        """Accumulators of every tensor after the batches with these numbers, None for all."""
        keep, sampled = self._sample_of(calibration)
        accumulators: dict[str, _Accumulator] = {}
        entries: list[int] = []
        rows: list[int] = []
        timesteps = calibration.timesteps

        def accumulator(key: str, dependent: bool) -> _Accumulator:
            if key not in accumulators:
                count = keep if dependent else max(_FEWEST, self._samples_per_row // len(calibration))
                accumulators[key] = _Accumulator(key, self._rows if dependent else 1, count, sampled, self._seed)
            return accumulators[key]

        def layer_hook(layer: LayerInfo) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                tensor = args[0]
                axis = 1 if layer.op is LayerOp.CONV else tensor.ndim - 1
                used = rows if layer.timestep_dependent else [0] * len(rows)
                for index, (start, stop) in enumerate(layer.segments):
                    part, key = tensor.narrow(axis, start, stop - start), f"{layer.name}#{index}"
                    if key in self._factors:
                        factor = self._factors[key].to(part.device)
                        part = part / factor.reshape(-1, *([1] * (tensor.ndim - 1 - axis)))
                    accumulator(key, layer.timestep_dependent).observe(part, entries, used, axis)

            return hook

        def attend(name: str, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, object]) -> Tensor:
            if name in self._found.attentions:
                operands = attention_operands(query, key, value, extra)
                for operand, tensor in zip(ATTENTION_OPERANDS, operands, strict=True):
                    accumulator(f"{name}#{operand}", True).observe(tensor, entries, rows, None)
            return scaled_dot_product_attention(query, key, value, **extra)  # type: ignore[arg-type]

        unique = [layer for layer in self._found.layers if layer.source == layer.name]
        handles = [denoiser.get_submodule(layer.name).register_forward_pre_hook(layer_hook(layer)) for layer in unique]
        with removing(handles), torch.no_grad(), ModuleStack(denoiser) as stack:
            for number, (index, batch) in enumerate(calibration.batches(batch_size)):
                if batches is not None and number not in batches:
                    continue
                entries[:] = index.tolist()
                rows[:] = self._row_map[timesteps[index].clamp(0, self._row_map.numel() - 1)].tolist()
                if self._attention:
                    with AttentionMode(stack, attend):
                        run(batch)
                else:
                    run(batch)
                if progress is not None:
                    progress(entries[-1] + 1, len(calibration))
        return accumulators

    def _sample_of(self, calibration: CalibrationSet) -> tuple[int, frozenset[int]]:
        """(values taken of an entry, the entries they are taken of): memory does not grow with the calibration set."""
        rows = self._row_map[calibration.timesteps.clamp(0, self._row_map.numel() - 1)]
        largest = int(torch.bincount(rows, minlength=self._rows).max())
        most = max(1, self._samples_per_row // _FEWEST)
        order = torch.from_numpy(seeded_generator(self._seed, "entries").permutation(len(calibration)))
        sampled = [order[rows[order] == row][:most] for row in range(self._rows)]
        return max(_FEWEST, self._samples_per_row // largest), frozenset(torch.cat(sampled).tolist())


def attention_operands(query: Tensor, key: Tensor, value: Tensor, extra: Mapping[str, object]) -> tuple[Tensor, ...]:
    """The four operands of the two matmuls as the exporter decomposes them: q·√scale, kᵀ·√scale, softmax, v."""
    scaled_query, scaled_key = scaled_operands(query, key, extra)
    probability = torch.softmax(scaled_query @ scaled_key, dim=-1)
    return scaled_query, scaled_key, probability, value


def scaled_operands(query: Tensor, key: Tensor, extra: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """q·√scale [b, h, n, c] and kᵀ·√scale [b, h, c, m], the operands of the first matmul."""
    scale = extra.get("scale") or query.shape[-1] ** -0.5
    root = float(scale) ** 0.5  # type: ignore[arg-type]
    return query * root, key.transpose(-1, -2) * root


def save_statistics(path: Path, statistics: Mapping[str, ActivationStatistics]) -> None:
    """Write statistics as one safetensors file."""
    tensors = {
        f"{key}|{field}": getattr(part, field).contiguous()
        for key, part in statistics.items()
        for field in ("values", "weights", "low", "high", "second_moment")
    }
    save_file(tensors, str(path))


def load_statistics(path: Path) -> dict[str, ActivationStatistics]:
    """Read what `save_statistics` wrote."""
    fields: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(str(path)).items():
        key, field = name.rsplit("|", 1)
        fields.setdefault(key, {})[field] = tensor
    return {key: ActivationStatistics(**parts) for key, parts in fields.items()}
