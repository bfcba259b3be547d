"""Caches equal a plain forward, each block runs once, dead outputs go, and what exceeds the memory bound is on disk."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import FAMILIES, Denoiser, conditional, dit
from torch import Tensor, nn

from calib.block_cache import BlockGraph, BlockStream, TensorStore, trace_blocks
from calib.sampling import CalibrationSet
from dmqexport.errors import CalibrationError, ResourceError

BATCH = 4


@contextmanager
def counting(denoiser: Denoiser, graph: BlockGraph) -> Any:
    """Count the entries that each block really computes."""
    counts = dict.fromkeys((block.name for block in graph.blocks), 0)
    changed = []
    for block in graph.blocks:
        module = denoiser.model.get_submodule(block.name)

        def forward(*args: Any, name: str = block.name, original: Any = module.forward, **kwargs: Any) -> Any:
            tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
            counts[name] += tensors[0].shape[0]
            return original(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]
        changed.append(module)
    yield counts
    for module in changed:
        del module.forward


def graph_of(denoiser: Denoiser) -> BlockGraph:
    return trace_blocks(denoiser.model, denoiser.data, denoiser.run, denoiser.layers())


def stream_of(denoiser: Denoiser, graph: BlockGraph, store: TensorStore) -> BlockStream:
    return BlockStream(denoiser.model, graph, denoiser.data, denoiser.run, BATCH, store)


def plain(denoiser: Denoiser, graph: BlockGraph) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Inputs and outputs of every block in ordinary forwards."""
    seen: dict[str, tuple[list[list[Tensor]], list[list[Tensor]]]] = {block.name: ([], []) for block in graph.blocks}
    handles = []
    for index, block in enumerate(graph.blocks):

        def hook(
            module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index, name: str = block.name
        ) -> None:
            inputs = graph.inputs[index].extract((args, kwargs), len(seen_entries), name)
            seen[name][0].append([tensor.clone() for tensor in inputs])
            outputs = graph.outputs[index].extract(output, len(seen_entries), name)
            seen[name][1].append([tensor.clone() for tensor in outputs])

        handles.append(denoiser.model.get_submodule(block.name).register_forward_hook(hook, with_kwargs=True))
    for entries, batch in denoiser.data.batches(BATCH):
        seen_entries = entries
        denoiser.run(batch)
    for handle in handles:
        handle.remove()
    return {
        name: tuple([torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in pair)  # type: ignore[misc]
        for name, pair in seen.items()
    }


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_caches_are_what_a_plain_forward_sees(make: Callable[[], Denoiser], tmp_path: Path) -> None:
    denoiser = make()
    graph = graph_of(denoiser)
    expected, store = plain(denoiser, graph), TensorStore(None, tmp_path)
    stream = stream_of(denoiser, graph, store)
    with counting(denoiser, graph) as counts:
        for index, block in enumerate(graph.blocks):
            inputs, outputs = stream.compute(index, keep_inputs=True)
            for found, wanted in zip(
                [*inputs, *outputs], [*expected[block.name][0], *expected[block.name][1]], strict=True
            ):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            stream.finish(index, outputs, inputs)
    # The cost is linear: every block has computed every entry once, however many blocks came after it.
    assert set(counts.values()) == {len(denoiser.data)}
    assert not stream.live
    assert store.resident_bytes == 0


def test_executing_a_block_on_cached_inputs_is_the_same(tmp_path: Path) -> None:
    denoiser = conditional()
    graph = graph_of(denoiser)
    stream = stream_of(denoiser, graph, TensorStore(None, tmp_path))
    order: list[list[int]] = []
    for index in range(len(graph.blocks)):
        inputs, outputs = stream.compute(index, keep_inputs=True)
        again = stream.execute(index, inputs, lambda entries: order.append(entries.tolist()))
        for found, wanted in zip(again, outputs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        stream.finish(index, outputs)
    assert order[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_stream_filled_in_the_middle_goes_on_as_if_nothing_had_happened(
    make: Callable[[], Denoiser], tmp_path: Path
) -> None:
    denoiser = make()
    graph = graph_of(denoiser)
    whole = stream_of(denoiser, graph, TensorStore(None, tmp_path))
    middle = len(graph.blocks) // 2
    for index in range(middle):
        whole.finish(index, whole.compute(index, keep_inputs=False)[1])
    resumed = stream_of(denoiser, graph, TensorStore(None, tmp_path))
    resumed.fill(middle)
    assert resumed.live == whole.live
    for index in range(middle, len(graph.blocks)):
        expected, found = whole.compute(index, keep_inputs=True), resumed.compute(index, keep_inputs=True)
        for left, right in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
        whole.finish(index, expected[1], expected[0])
        resumed.finish(index, found[1], found[0])


def test_skip_connections_and_shared_embeddings_stay_until_their_last_reader() -> None:
    denoiser = conditional()
    graph = graph_of(denoiser)
    order = [block.name for block in graph.blocks]
    reader = {block.name: order[last] for block, last in zip(graph.blocks, graph.last_reader, strict=True)}
    assert reader["conv_in"] == "up_blocks.1.resnets.1"  # the longest skip of a U
    assert reader["down_blocks.0.downsamplers.0.conv"] == "up_blocks.0.resnets.1"
    assert reader["down_blocks.1.resnets.0"] == "up_blocks.0.resnets.0"
    assert reader["time_embedding.linear_1"] == "time_embedding.linear_2"
    assert reader["time_embedding.linear_2"] == "up_blocks.1.resnets.1"
    assert reader["mid_block.resnets.1"] == "up_blocks.0.resnets.0"
    assert reader["conv_out"] == "conv_out"


def test_no_output_outlives_its_readers(tmp_path: Path) -> None:
    denoiser = conditional()
    graph = graph_of(denoiser)
    stream = stream_of(denoiser, graph, TensorStore(None, tmp_path))
    kept = []
    for index in range(len(graph.blocks)):
        stream.finish(index, stream.compute(index, keep_inputs=False)[1])
        assert stream.live == {number for number in range(index + 1) if graph.last_reader[number] > index}
        kept.append(len(stream.live))
    assert max(kept) < len(graph.blocks) / 2


def test_what_exceeds_the_memory_bound_lies_on_disk_and_leaves_nothing(tmp_path: Path) -> None:
    denoiser = dit()
    graph = graph_of(denoiser)
    results = {}
    for bound in (None, 0, 20_000):
        store = TensorStore(bound, tmp_path / "spill")
        stream = stream_of(denoiser, graph, store)
        resident = spilled = 0
        for index in range(len(graph.blocks)):
            inputs, outputs = stream.compute(index, keep_inputs=True)
            resident, spilled = max(resident, store.resident_bytes), max(spilled, store.spilled_bytes)
            results.setdefault(index, []).append([tensor.clone() for tensor in [*inputs, *outputs]])
            stream.finish(index, outputs, inputs)
        stream.close()
        assert (store.resident_bytes, store.spilled_bytes) == (0, 0)
        if bound is not None:
            assert spilled > 0
            assert resident <= bound
            assert list((tmp_path / "spill").iterdir()) == []
    for whole, *others in results.values():
        assert all(torch.equal(one, other) for found in others for one, other in zip(whole, found, strict=True))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match=r"file.*: no room for 4 MiB"):
        TensorStore(0, tmp_path / "file").allocate((1024, 1024), torch.float32)


class Counter(nn.Module):
    """A denoiser whose block gets a number that changes with every call."""

    class PlainBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, values: Tensor, number: int) -> Tensor:
            result: Tensor = self.layer(values)
            return result

    def __init__(self) -> None:
        super().__init__()
        self.block = Counter.PlainBlock()
        self.calls = 0

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.calls += 1
        return (self.block(sample, self.calls),)


def test_inputs_that_vary_without_a_batch_axis_are_refused() -> None:
    data = CalibrationSet(
        {"sample": torch.zeros(5, 2), "timestep": torch.zeros(5, dtype=torch.int64)}, *[torch.arange(5)] * 2
    )
    denoiser = Denoiser(Counter(), data)
    with pytest.raises(CalibrationError, match=r"inputs of 'block': calls differ in more than the batch"):
        trace_blocks(denoiser.model, data, denoiser.run, ["block.layer"])


def test_too_few_entries_are_refused() -> None:
    denoiser = conditional(2)
    with pytest.raises(CalibrationError, match="2 calibration entries, block-wise training needs 3 or more"):
        graph_of(denoiser)
