"""Inputs and outputs of a denoiser's blocks for a whole calibration set, carried forward block by block.

To reach block k the model's ordinary forward runs with every earlier block replaying what it once computed, and stops
at block k: what lies between blocks (concats, additions, reshapes) is cheap, so that each block is computed once and
the cost is linear in the number of blocks. An output that no later block reads is dropped. Memory is bounded: beyond it
tensors live in files that have no name any more, so that nothing is left behind however the run ends.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.blocks import Block, find_blocks
from calib.call_layout import CallLayout, layout_of
from calib.sampling import CalibrationSet
from dmqexport.errors import CalibrationError, ResourceError

Run = Callable[[Mapping[str, Tensor]], object]
Forward = Callable[..., Any]
_PROBE_SIZES = (2, 3)  # batch sizes that tell a tensor's batch axis from an axis of the same length


class _ReachedError(Exception):
    """Ends a forward as soon as a block's inputs are in hand."""


@dataclass(frozen=True)
class BlockGraph:
    """The blocks of a denoiser and how their calls look.

    inputs and outputs: layout of the arguments and of the result of each block; last_reader: index of the last block
    whose inputs depend on the output without another block between (its own index: none); seconds: of one small float
    call, for estimates of time.
    """

    blocks: tuple[Block, ...]
    inputs: tuple[CallLayout, ...]
    outputs: tuple[CallLayout, ...]
    last_reader: tuple[int, ...]
    seconds: tuple[float, ...]


def trace_blocks(
    denoiser: nn.Module, data: CalibrationSet, run: Run, planned: Collection[str], units: Collection[str] = ()
) -> BlockGraph:
    """Observe a few small forwards of the float `denoiser` and return its blocks, their layouts and their readers.

    `run` calls the denoiser with named inputs. Raises CalibrationError for layers outside of blocks (`find_blocks`),
    and for a block whose inputs cannot be told apart by entry.
    """
    if len(data) < max(_PROBE_SIZES):
        raise CalibrationError(
            f"{len(data)} calibration entries, block-wise training needs {max(_PROBE_SIZES)} or more"
        )
    small = data.select(torch.arange(_PROBE_SIZES[0]))
    large = data.select(torch.arange(len(data) - _PROBE_SIZES[1], len(data)))
    blocks = find_blocks(denoiser, lambda: run(small), planned, units)
    traces = [_observe(denoiser, blocks, run, inputs) for inputs in (small, large)]
    first, second = traces
    inputs, outputs = [], []
    for block, one, other in zip(blocks, first, second, strict=True):
        small_size, large_size = _PROBE_SIZES
        inputs.append(layout_of((one.inputs, small_size), (other.inputs, large_size), f"inputs of {block.name!r}"))
        outputs.append(layout_of((one.output, small_size), (other.output, large_size), f"output of {block.name!r}"))
    replayed = [
        [tensor.detach() for tensor in layout.extract(call.output, _PROBE_SIZES[0], block.name)]
        for block, layout, call in zip(blocks, outputs, first, strict=True)
    ]
    readers = _last_readers(denoiser, blocks, run, small, inputs, outputs, replayed)
    seconds = tuple(min(one.seconds, other.seconds) for one, other in zip(first, second, strict=True))
    return BlockGraph(blocks, tuple(inputs), tuple(outputs), readers, seconds)


@dataclass(frozen=True)
class _ObservedCall:
    inputs: Any
    output: Any
    seconds: float


def _observe(
    denoiser: nn.Module, blocks: Sequence[Block], run: Run, inputs: Mapping[str, Tensor]
) -> list[_ObservedCall]:
    calls: dict[str, _ObservedCall] = {}

    def observing(name: str) -> Callable[[Forward], Forward]:
        def wrap(original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                output = original(*args, **kwargs)
                calls[name] = _ObservedCall((args, kwargs), output, time.perf_counter() - start)
                return output

            return forward

        return wrap

    with _wrapped(denoiser, {block.name: observing(block.name) for block in blocks}), torch.no_grad():
        run(inputs)
    return [calls[block.name] for block in blocks]


def _last_readers(
    denoiser: nn.Module,
    blocks: Sequence[Block],
    run: Run,
    inputs: Mapping[str, Tensor],
    input_layouts: Sequence[CallLayout],
    output_layouts: Sequence[CallLayout],
    replayed: Sequence[Sequence[Tensor]],
) -> tuple[int, ...]:
    """Poison one output after the other with NaN; whose inputs turn NaN reads it. All blocks replay, so it is cheap."""
    batch = _PROBE_SIZES[0]
    readers: list[int] = []
    for poisoned in range(len(blocks)):
        reached = {poisoned}

        def replaying(
            index: int, poisoned: int = poisoned, reached: set[int] = reached
        ) -> Callable[[Forward], Forward]:
            def wrap(original: Forward) -> Forward:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    values = input_layouts[index].extract((args, kwargs), batch, blocks[index].name, check=False)
                    if any(bool(value.isnan().any()) for value in values):
                        reached.add(index)
                    kept = replayed[index]
                    if index == poisoned:
                        kept = [torch.full_like(value, torch.nan) for value in kept]
                    return output_layouts[index].rebuild([value.clone() for value in kept])

                return forward

            return wrap

        wrappers = {block.name: replaying(index) for index, block in enumerate(blocks)}
        traceable = all(value.is_floating_point() for value in replayed[poisoned])
        try:
            with _wrapped(denoiser, wrappers), torch.no_grad():
                if traceable:
                    run(inputs)
        except (ValueError, RuntimeError, ArithmeticError):
            traceable = False  # the model looks at its values: assume the output is read to the end
        readers.append(max(reached) if traceable else len(blocks) - 1)
    return tuple(readers)


class TensorStore:
    """Allocates cached tensors in memory up to `max_ram` bytes (None: no bound), and in files of `folder` beyond it."""

    def __init__(self, max_ram: int | None, folder: Path) -> None:
        self._max_ram, self._folder = max_ram, folder
        self._count = 0
        self.resident_bytes = 0
        self.spilled_bytes = 0
        self._held: dict[int, tuple[int, bool]] = {}

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor. Raises ResourceError when the disk is full or cannot be written."""
        empty = torch.empty(0, dtype=dtype)
        count = torch.Size(shape).numel()
        size = count * empty.element_size()
        spilled = size > 0 and self._max_ram is not None and self.resident_bytes + size > self._max_ram
        tensor = self._map(count, size, dtype).reshape(tuple(shape)) if spilled else torch.empty(shape, dtype=dtype)
        if spilled:
            self.spilled_bytes += size
        else:
            self.resident_bytes += size
        self._held[id(tensor)] = (size, spilled)
        return tensor

    def release(self, tensors: Sequence[Tensor]) -> None:
        """Stop counting `tensors`; memory and disk are free once nothing refers to them."""
        for tensor in tensors:
            size, spilled = self._held.pop(id(tensor))
            if spilled:
                self.spilled_bytes -= size
            else:
                self.resident_bytes -= size

    def _map(self, count: int, size: int, dtype: torch.dtype) -> Tensor:
        self._count += 1
        path = self._folder / f".spill-{os.getpid()}-{self._count}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                # Writing to a mapped file of a full disk kills the process: claim every block now.
                os.posix_fallocate(file.fileno(), 0, size)
            tensor = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        except OSError as error:
            raise ResourceError(
                f"{self._folder}: no room for {size / 2**20:.0f} MiB of block inputs beyond max_ram ({error.strerror})",
                hint="raise --max-ram, free space, or calibrate block-wise training on fewer entries",
            ) from error
        finally:
            with suppress(OSError):
                path.unlink()
        return tensor


class BlockStream:
    """One pass over the blocks, float or quantized: earlier blocks replay, and each is computed once.

    Callers put the layers of the stream (float or quantized) in place before they call it, take `inputs` of one block
    after the other, and hand each block's outputs back with `finish`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        graph: BlockGraph,
        data: CalibrationSet,
        run: Run,
        batch_size: int,
        store: TensorStore,
    ) -> None:
        self._denoiser, self._graph, self._data, self._run = denoiser, graph, data, run
        self._batch_size, self._store = batch_size, store
        self._outputs: dict[int, list[Tensor]] = {}
        self._entries = torch.zeros(0, dtype=torch.int64)

    @property
    def live(self) -> frozenset[int]:
        """Indices of the blocks whose outputs are kept."""
        return frozenset(self._outputs)

    def inputs(self, index: int) -> list[Tensor]:
        """What block `index` reads, one tensor [entries, ...] a slot of its layout; the block itself does not run."""
        found, _ = self._advance(index, keep_inputs=True, execute=False)
        return found

    def compute(self, index: int, keep_inputs: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(inputs, outputs) of block `index`, which runs once for every entry; no inputs unless asked for."""
        return self._advance(index, keep_inputs, execute=True)

    def execute(self, index: int, inputs: Sequence[Tensor], before: Callable[[Tensor], None]) -> list[Tensor]:
        """Outputs of block `index` on cached `inputs`; `before(entries)` runs ahead of every batch."""
        outputs = self._allocate(self._graph.outputs[index])
        module = self._denoiser.get_submodule(self._graph.blocks[index].name)
        with torch.no_grad():
            for entries, _ in self._data.batches(self._batch_size):
                before(entries)
                args, kwargs = self._graph.inputs[index].rebuild(gather(inputs, entries))
                self._keep(index, entries, module(*args, **kwargs), outputs)
        return outputs

    def finish(self, index: int, outputs: list[Tensor], inputs: Sequence[Tensor] = ()) -> None:
        """Replay `outputs` for block `index` from now on; release `inputs` and every output nobody reads any more.

        Outputs of the same tensors must not be released before: a caller that still reads them keeps a reference.
        """
        self._store.release(inputs)
        self._outputs[index] = outputs
        self._drop(index)

    def fill(self, index: int) -> None:
        """Recompute every output that block `index` and later ones read, in one forward: where a killed run goes on."""

        def recording(number: int) -> Callable[[Forward], Forward]:
            def wrap(original: Forward) -> Forward:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    output = original(*args, **kwargs)
                    if self._graph.last_reader[number] >= index:
                        self._keep(number, self._entries, output, self._outputs[number])
                    return output

                return forward

            return wrap

        for number in range(index):
            if self._graph.last_reader[number] >= index:
                self._outputs[number] = self._allocate(self._graph.outputs[number])
        wrappers = {self._graph.blocks[number].name: recording(number) for number in range(index)}
        if index < len(self._graph.blocks):
            wrappers[self._graph.blocks[index].name] = lambda original: _stop
        self._forward_all(wrappers)

    def close(self) -> None:
        """Release everything."""
        for outputs in self._outputs.values():
            self._store.release(outputs)
        self._outputs.clear()

    def _advance(self, index: int, keep_inputs: bool, execute: bool) -> tuple[list[Tensor], list[Tensor]]:
        graph = self._graph
        inputs = self._allocate(graph.inputs[index]) if keep_inputs else []
        outputs = self._allocate(graph.outputs[index]) if execute else []
        name = graph.blocks[index].name

        def capturing(original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if keep_inputs:
                    values = graph.inputs[index].extract((args, kwargs), len(self._entries), name)
                    _store_rows(inputs, self._entries, values)
                if execute:
                    self._keep(index, self._entries, original(*args, **kwargs), outputs)
                raise _ReachedError

            return forward

        wrappers: dict[str, Callable[[Forward], Forward]] = {
            graph.blocks[number].name: self._replaying(number) for number in range(index)
        }
        wrappers[name] = capturing
        self._forward_all(wrappers)
        return inputs, outputs

    def _replaying(self, number: int) -> Callable[[Forward], Forward]:
        layout = self._graph.outputs[number]

        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = self._outputs.get(number)
            if kept is None:  # nobody to come reads it: any values of the right shape will do
                return layout.rebuild(layout.zeros(len(self._entries)))
            return layout.rebuild(gather(kept, self._entries))

        return lambda original: forward

    def _forward_all(self, wrappers: Mapping[str, Callable[[Forward], Forward]]) -> None:
        with _wrapped(self._denoiser, wrappers), torch.no_grad():
            for entries, batch in self._data.batches(self._batch_size):
                self._entries = entries
                try:
                    self._run(batch)
                except _ReachedError:
                    continue

    def _keep(self, index: int, entries: Tensor, output: Any, outputs: Sequence[Tensor]) -> None:
        values = self._graph.outputs[index].extract(output, len(entries), self._graph.blocks[index].name)
        _store_rows(outputs, entries, values)

    def _allocate(self, layout: CallLayout) -> list[Tensor]:
        return [self._store.allocate((len(self._data), *slot.shape), slot.dtype) for slot in layout.slots]

    def _drop(self, finished: int) -> None:
        for number in [number for number in self._outputs if self._graph.last_reader[number] <= finished]:
            self._store.release(self._outputs.pop(number))


def gather(tensors: Sequence[Tensor], entries: Tensor) -> list[Tensor]:
    """The rows `entries` of cached tensors, copied."""
    return [tensor[entries] for tensor in tensors]


def _store_rows(targets: Sequence[Tensor], entries: Tensor, values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target[entries] = value.detach()


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _ReachedError


@contextmanager
def _wrapped(denoiser: nn.Module, wrappers: Mapping[str, Callable[[Forward], Forward]]) -> Iterator[None]:
    """Put `wrapper(forward)` in the place of each module's forward inside the block; hooks of the module still run."""
    changed: list[tuple[nn.Module, Forward | None]] = []
    try:
        for name, wrapper in wrappers.items():
            module = denoiser.get_submodule(name)
            changed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = wrapper(module.forward)
        yield
    finally:
        for module, own in changed:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
