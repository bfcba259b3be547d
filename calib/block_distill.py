"""Block-wise distillation (DilateQuant, Sec. 4.3, Eq. 17): one block after the other learns what the float one answers.

A block reads what the quantized blocks before it give (so it can mend their errors) and is compared with the float
block on the float prefix. Early on a sample takes the float prefix instead with probability one half, as in QDrop's
spirit (arXiv:2203.05740), at the end never. Weights or their rounding, weight scales, activation tables, zero_points
and biases move together; batches mix timesteps.

Several ranks share the entries: each carries its own forward and answers for them in every batch, gradients are summed.
The batches are those of one process, so that only the order of float sums differs.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from calib.block_cache import BlockGraph, BlockStream, Run, TensorStore, gather, trace_blocks
from calib.block_checkpoint import BlockCheckpoints, BlockScore
from calib.distributed import sum_floats, sum_gradients
from calib.sampling import CalibrationSet, seeded_generator
from calib.trainable import TrainableModel
from dmqexport.errors import CalibrationError
from dmqexport.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

_FLOAT_SHARE = 0.5  # of the samples that read the float prefix while both are mixed
_ROUNDING_PUSH = 0.1  # weight of AdaRound's term, a mean over variables, against the error relative to its start
_ROUNDING_REST = 0.2  # of the iterations before that term sets in (AdaRound's warm-up)


@dataclass(frozen=True)
class BlockDistillResult:
    """One score a trained block, in execution order."""

    blocks: tuple[BlockScore, ...]

    @property
    def seconds(self) -> float:
        """Time of all blocks, those of earlier runs included."""
        return sum(block.seconds for block in self.blocks)


@dataclass(frozen=True)
class _Settings:
    iterations: int
    batch_size: int
    mix_until: float
    seed: int


@dataclass(frozen=True)
class _Entries:
    """The entries of one rank, in its own numbering. all_fitted, all_held: how many every rank together has to train
    on and to judge by; held: this rank's of the latter; place: of every entry to train on, its number here, or -1."""

    ranks: Ranks
    data: CalibrationSet
    all_fitted: int
    all_held: int
    held: Tensor
    place: Tensor

    @classmethod
    def of(cls, data: CalibrationSet, held_out: int, seed: int, ranks: Ranks) -> "_Entries":
        fitted, held = split_entries(data, held_out, seed)
        fewest = min(len(fitted), len(held))
        if fewest < ranks.size:
            raise CalibrationError(
                f"{ranks.size} processes share {len(fitted)} entries to train on and {len(held)} to judge by,"
                " expected one each at least",
                hint="start fewer processes, or raise training.blocks.entries and training.blocks.held_out",
            )
        own = torch.cat([entries[ranks.rank :: ranks.size] for entries in (fitted, held)]).sort().values
        number = torch.full((len(data),), -1)
        number[own] = torch.arange(len(own))
        mine = number[held]
        return cls(ranks, data.at(own), len(fitted), len(held), mine[mine >= 0], number[fitted])


@dataclass(frozen=True)
class _BlockData:
    """What one block is trained on; tensors [this rank's entries, ...]."""

    index: int
    float_inputs: Sequence[Tensor]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    entries: _Entries


def distill_blocks(
    denoiser: nn.Module,
    model: TrainableModel,
    data: CalibrationSet,
    run: Run,
    *,
    iterations: int,
    batch_size: int,
    held_out: int,
    mix_until: float,
    max_ram: int | None,
    scratch: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    units: Collection[str] = (),
    ranks: Ranks = ALONE,
) -> BlockDistillResult:
    """Train `model`, which `trainable` made of `denoiser`, block by block; all its roundings are fixed afterwards.

    iterations: per block; held_out: entries (whole trajectories) nothing is trained on, each block is judged by them
    and keeps its earlier parameters when training made it worse; mix_until: share of the iterations that mix float and
    quantized inputs; max_ram: bytes of cached tensors held in memory, None for no bound; scratch: folder of the blocks
    finished so far, from which a killed run goes on, and of tensors beyond max_ram; units: as `find_blocks`; ranks:
    processes that do this together on equal models, max_ram being for all of them. Raises CalibrationError when a layer
    belongs to no block, or no entries are left to train on; RankError when another rank failed.
    """
    settings = _Settings(iterations, batch_size, mix_until, seed)
    entries = _Entries.of(data, held_out, seed, ranks)
    with _float_layers(denoiser, model):
        graph = trace_blocks(denoiser, data, run, list(model.layers), units)
    trained = [index for index, block in enumerate(graph.blocks) if block.layers]
    scratch.mkdir(parents=True, exist_ok=True)
    checkpoints = BlockCheckpoints(scratch, _key(model, data, graph, settings, held_out))
    scores = _resume(model, graph, trained, checkpoints)
    ticker = _Ticker(graph, trained, iterations, progress)
    store = TensorStore(None if max_ram is None else max_ram // ranks.size, scratch)
    streams = {
        name: BlockStream(denoiser, graph, entries.data, run, batch_size, store) for name in ("float", "quantized")
    }
    start = trained[len(scores)] if len(scores) < len(trained) else None
    if scores and start is not None:
        with _float_layers(denoiser, model):
            streams["float"].fill(start)
        streams["quantized"].fill(start)
    for index in range(start or 0, trained[-1] + 1 if start is not None else 0):
        began = time.perf_counter()
        block = graph.blocks[index]
        last = index == trained[-1]
        mixed = bool(block.layers) and mix_until > 0
        with _float_layers(denoiser, model):
            float_inputs, targets = streams["float"].compute(index, keep_inputs=mixed)
        if not block.layers:
            inputs, outputs = streams["quantized"].compute(index, keep_inputs=False)
        else:
            inputs = streams["quantized"].inputs(index)
            found = _BlockData(index, float_inputs, inputs, targets, entries)
            earlier = {layer for before in graph.blocks[:index] for layer in before.layers}
            trainer = _BlockTrainer(denoiser, model, graph, found, settings, earlier)
            score = trainer.train(partial(ticker.report, index), began)
            if ranks.rank == 0:
                checkpoints.save(len(scores), score, trainer.state())
            scores.append(score)
            logger.info(
                "block %d of %d, %s: error %.3g, was %.3g, of a power of %.3g; %.0f s",
                *(len(scores), len(trained), block.name, score.after, score.before, score.power, score.seconds),
            )
            outputs = [] if last else streams["quantized"].execute(index, inputs, trainer.set_rows)
        streams["float"].finish(index, targets, float_inputs)
        if not last:
            streams["quantized"].finish(index, outputs, inputs)
    for stream in streams.values():
        stream.close()
    model.forget()
    return BlockDistillResult(tuple(scores))


def split_entries(data: CalibrationSet, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Entries to train on and to judge by, int64 each: whole trajectories are held out until `held_out` is reached.

    Raises CalibrationError when nothing is left on either side.
    """
    order = torch.from_numpy(seeded_generator(seed, "held-out").permutation(np.unique(data.trajectory.numpy())))
    held = torch.zeros(len(data), dtype=torch.bool)
    for trajectory in order:
        if int(held.sum()) >= held_out:
            break
        held |= data.trajectory == trajectory
    if bool(held.all()) or not bool(held.any()):
        raise CalibrationError(
            f"{held_out} of {len(data)} entries held out leaves {int((~held).sum())} to train on and"
            f" {int(held.sum())} to judge by, in whole trajectories ({len(order)})",
            hint="calibrate on more trajectories (--calib-size), or hold out fewer entries",
        )
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


class _BlockTrainer:
    """Trains the layers of one block, and puts them back when that did not help."""

    def __init__(
        self,
        denoiser: nn.Module,
        model: TrainableModel,
        graph: BlockGraph,
        found: _BlockData,
        settings: _Settings,
        earlier: set[str],
    ) -> None:
        self._model, self._found, self._settings = model, found, settings
        self._entries, self._ranks, self._timesteps = found.entries, found.entries.ranks, found.entries.data.timesteps
        self._block = graph.blocks[found.index]
        self._inputs, self._outputs = graph.inputs[found.index], graph.outputs[found.index]
        self._module = denoiser.get_submodule(self._block.name)
        self._names = self._block.layers
        rounded = model.options.weights == "rounding"
        parts = [weight for name in self._names for weight in model.layers[name].parts()]
        self._variables = sum(weight.variable.numel() for weight in parts) if rounded else 0
        # A table that an earlier block reads too belongs to that one: its outputs are cached already.
        owned = _tables(model, earlier)
        self._held_tables = sorted(owned & _tables(model, self._names))

    def train(self, progress: Callable[[int], None], began: float) -> BlockScore:
        """Train, harden, measure; the better of before and after stays."""
        model, found = self._model, self._found
        held = self._entries.held
        power = sum(float(tensor[held].square().mean()) for tensor in found.targets) * len(held)
        power = sum_floats(self._ranks, power)[0] / self._entries.all_held
        initial = self.state()
        model.harden(self._names)
        before = self._measure()
        model.load_state(initial)
        model.soften(self._names)
        self._iterate(max(before, 1e-12 * power, 1e-30), progress)
        model.harden(self._names)
        after = self._measure()
        kept = after < before
        if not kept:
            model.load_state(initial)
            model.harden(self._names)
        seconds = time.perf_counter() - began
        return BlockScore(self._block.name, len(self._names), before, after, power, kept, seconds)

    def state(self) -> dict[str, Tensor]:
        """Parameters of the block's layers, and the tables of its attentions."""
        model = self._model
        found = model.state(self._names)
        for name, attention in model.attentions.items():
            if name == self._block.name or name.startswith(f"{self._block.name}."):
                for operand, quantizer in attention.quantizers.items():
                    for kind in ("scale", "zero_point"):
                        found[f"{name}#{operand}|{kind}"] = model.tables.rows_of(quantizer.index, kind).clone()
        return found

    def set_rows(self, entries: Tensor) -> None:
        """Look the table rows of `entries` up."""
        self._model.context.set_timestep(self._timesteps[entries], len(entries))

    def _iterate(self, unit: float, progress: Callable[[int], None]) -> None:
        settings, model, place = self._settings, self._model, self._entries.place
        optimizer = model.optimizer(self._names, settings.iterations)
        held = [
            (table, kind, model.tables.rows_of(table, kind).clone())
            for table in self._held_tables
            for kind in ("scale", "zero_point")
        ]
        generator = seeded_generator(settings.seed, "block", self._block.name)
        order = np.zeros(0, dtype=np.int64)
        size = min(settings.batch_size, len(place))
        for iteration in range(settings.iterations):
            done = iteration / settings.iterations
            if len(order) < size:
                order = generator.permutation(len(place))
            entries, order = place[torch.from_numpy(order[:size].copy())], order[size:]
            from_float = torch.from_numpy(generator.random(size) < (_FLOAT_SHARE if done < settings.mix_until else 0.0))
            loss = self._share(entries, from_float) / unit
            if self._variables and done >= _ROUNDING_REST:
                hardness = (done - _ROUNDING_REST) / (1 - _ROUNDING_REST)
                push = _ROUNDING_PUSH * model.regularizer(hardness, self._names) / self._variables
                loss = loss + push / self._ranks.size
            if not loss.requires_grad:
                break  # nothing of this block is trained
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            present = bool((entries >= 0).any())
            if not math.isfinite(sum_gradients(self._ranks, optimizer.parameters, loss, present)):
                logger.warning("block %s: training diverged; its earlier parameters are kept", self._block.name)
                break
            optimizer.step()
            for table, kind, values in held:
                model.tables.set_rows(table, kind, values)
            progress(iteration + 1)
        progress(settings.iterations)

    def _share(self, places: Tensor, from_float: Tensor) -> Tensor:
        """What this rank's entries of a batch add to the batch's mean error; places: -1 for those of other ranks."""
        own = places >= 0
        if bool(own.any()):
            return self._error(places[own], from_float[own]) * (int(own.sum()) / len(places))
        # It must have gradients at the same parameters as the others, though they be zero.
        return self._error(self._entries.place[self._entries.place >= 0][:1]) * 0.0

    def _error(self, entries: Tensor, from_float: Tensor | None = None) -> Tensor:
        """Mean squared error of the block's output, summed over its tensors."""
        values = gather(self._found.inputs, entries)
        if from_float is not None and bool(from_float.any()):
            chosen = entries[from_float]
            for value, source in zip(values, self._found.float_inputs, strict=True):
                value[from_float] = source[chosen]
        self.set_rows(entries)
        args, kwargs = self._inputs.rebuild(values)
        outputs = self._outputs.extract(self._module(*args, **kwargs), len(entries), self._block.name)
        total = torch.zeros(())
        for output, target in zip(outputs, self._found.targets, strict=True):
            total = total + (output - target[entries]).square().mean()
        return total

    @torch.no_grad()
    def _measure(self) -> float:
        """The error on held-out entries behind the quantized prefix; infinite when it is no number."""
        held, size = self._entries.held, self._settings.batch_size
        self._model.forget()
        parts = [held[start : start + size] for start in range(0, len(held), size)]
        total = sum(float(self._error(part)) * len(part) for part in parts)
        total = sum_floats(self._ranks, total)[0] / self._entries.all_held
        return total if math.isfinite(total) else math.inf


class _Ticker:
    """Progress in iterations over all blocks, counted by the time each takes: what remains can be estimated."""

    def __init__(
        self, graph: BlockGraph, trained: Sequence[int], iterations: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self._progress, self._iterations = progress, max(iterations, 1)
        whole = sum(graph.seconds[index] for index in trained)
        self._share = {index: graph.seconds[index] / whole for index in trained}
        self._before = {index: sum(self._share[other] for other in trained if other < index) for index in trained}
        self._total = len(trained) * self._iterations

    def report(self, index: int, done: int) -> None:
        """Block `index` has done `done` iterations."""
        if self._progress is not None:
            share = self._before[index] + self._share[index] * done / self._iterations
            self._progress(round(share * self._total), self._total)


def _resume(
    model: TrainableModel, graph: BlockGraph, trained: Sequence[int], checkpoints: BlockCheckpoints
) -> list[BlockScore]:
    """Load what a killed run finished."""
    scores: list[BlockScore] = []
    for number, index in enumerate(trained):
        loaded = checkpoints.load(number, graph.blocks[index].name)
        if loaded is None:
            break
        score, state = loaded
        model.load_state(state)
        model.harden(graph.blocks[index].layers)
        scores.append(score)
    if scores:
        logger.info("block-wise training goes on behind block %s, %d are done", scores[-1].name, len(scores))
    return scores


def _tables(model: TrainableModel, names: Sequence[str] | set[str]) -> set[int]:
    return {quantizer.index for name in names for quantizer in model.layers[name].quantizers if quantizer is not None}


@contextmanager
def _float_layers(denoiser: nn.Module, model: TrainableModel) -> Iterator[None]:
    """Put the float layers and attentions back inside the block: the teacher is the same model."""
    attentions = dict(model.attentions)
    model.attentions.clear()
    try:
        for name, layer in model.layers.items():
            denoiser.set_submodule(name, layer.base[0])
        yield
    finally:
        for name, layer in model.layers.items():
            denoiser.set_submodule(name, layer)
        model.attentions.update(attentions)
        model.forget()


def _key(model: TrainableModel, data: CalibrationSet, graph: BlockGraph, settings: _Settings, held_out: int) -> str:
    """sha256 over everything a block's training depends on, hex: a finished block of other settings is not reused."""
    digest = hashlib.sha256(repr((settings, held_out, model.options, graph.blocks)).encode())
    for name in sorted(data.inputs):
        digest.update(data.inputs[name].contiguous().numpy().tobytes())
    digest.update(data.trajectory.numpy().tobytes())
    for name in model.layers:
        for key, value in sorted(model.state([name]).items()):
            digest.update(key.encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
