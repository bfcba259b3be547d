"""Training block by block helps where it can, keeps what it cannot better, and goes on exactly where it was killed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import TIMESTEPS, Denoiser, small
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from calib.bit_allocation import uniform
from calib.block_cache import trace_blocks
from calib.block_distill import BlockDistillResult, distill_blocks, split_entries
from calib.freeze import freeze
from calib.observer import Observer
from calib.probe import ProbeResult, probe
from calib.quantizer import simulate
from calib.sampling import CalibrationSet
from calib.timestep_table import equal_groups
from calib.trainable import Rates, TrainableModel, TrainOptions, trainable
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import BitWidths
from dmqexport.quant_weights import QuantWeights

ROW_MAP = equal_groups(TIMESTEPS, 4)


@dataclass(frozen=True)
class Planned:
    denoiser: Denoiser
    found: ProbeResult
    plan: QuantPlan
    weights: QuantWeights

    def output(self) -> Tensor:
        return torch.cat([self.denoiser.run(batch) for _, batch in self.denoiser.data.batches(10)])


def planned(denoiser: Denoiser, folder: Path, attention_bits: int | None) -> Planned:
    data = denoiser.data
    first, last = int(data.timesteps.argmin()), int(data.timesteps.argmax())

    def run(index: int) -> Tensor:
        inputs, other = data.select(torch.tensor([first])), data.select(torch.tensor([last]))
        return denoiser.run({**inputs, "sample": other["sample"], "timestep": other["timestep"]} if index else inputs)

    found = probe(denoiser.model, run)
    statistics = Observer(found, ROW_MAP, 256, seed=0, attention=True).observe(denoiser.model, data, denoiser.run, 10)
    bits = uniform(found, BitWidths.parse("w3a4"), ["conv_in", "conv_out"], {}, [])
    folder.mkdir(parents=True, exist_ok=True)
    codes = folder / "codes.safetensors"
    plan = freeze(denoiser.model, found, bits, statistics, ROW_MAP, attention_bits, "model", "w3a4", codes)
    return Planned(denoiser, found, plan, QuantWeights(codes))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return planned(small(30), tmp_path_factory.mktemp("plan"), 8)


def distill(
    subject: Planned, model: TrainableModel, scratch: Path, data: CalibrationSet | None = None, **changed: Any
) -> BlockDistillResult:
    options: dict[str, Any] = {
        "iterations": 4, "batch_size": 8, "held_out": 6, "mix_until": 0.5, "max_ram": None, "seed": 3, **changed,
    }  # fmt: skip
    denoiser = subject.denoiser
    return distill_blocks(denoiser.model, model, data or denoiser.data, denoiser.run, scratch=scratch, **options)


def trained(
    subject: Planned, scratch: Path, options: TrainOptions | None = None, **changed: Any
) -> tuple[BlockDistillResult, dict[str, Tensor]]:
    with trainable(
        subject.denoiser.model, subject.plan, subject.weights, subject.found, options or TrainOptions()
    ) as model:
        return distill(subject, model, scratch, **changed), model.state()


def _key(name: str) -> tuple[str, int]:
    layer, _, segment = name.rpartition("#")
    return layer, int(segment)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("weights", ["full", "rounding", "adapter", "none"])
def test_the_trained_model_is_nearer_to_float_and_deploys_as_trained(
    subject: Planned, weights: Any, tmp_path: Path
) -> None:
    reference, model = subject.output(), subject.denoiser.model
    with simulate(model, subject.plan, subject.weights):
        start = float((subject.output() - reference).square().mean())
    options = TrainOptions(weights=weights, rank=4)
    with trainable(model, subject.plan, subject.weights, subject.found, options) as training:
        result = distill(subject, training, tmp_path / "scratch", iterations=25)
        after = subject.output()
        plan, codes = training.freeze()
    QuantWeights.save(tmp_path / "codes", codes)
    with simulate(model, plan, QuantWeights(tmp_path / "codes")):
        deployed = subject.output()
    error = float((after - reference).square().mean())
    assert error < 0.9 * start
    # Training divides by the scale where deployment multiplies first: a value on a tie may take the other code.
    assert float((deployed - after).square().mean()) < 0.01 * error
    assert torch.equal(subject.output(), reference)
    moved = sum(int((array != subject.weights.codes(*_key(name))).sum()) for name, array in codes.items())
    assert (moved > 0) == (weights != "none")
    for block in result.blocks:
        assert block.kept == (block.after < block.before)
    assert sum(block.layers for block in result.blocks) == len(subject.plan.layers)


def test_a_killed_run_goes_on_at_the_last_finished_block(subject: Planned, tmp_path: Path) -> None:
    whole, expected = trained(subject, tmp_path / "whole")
    stop_after = 6

    class KilledError(Exception):
        pass

    finished: list[int] = []

    def kill(done: int, total: int) -> None:
        finished.append(done)
        if len(list((tmp_path / "killed").glob("block-*.safetensors"))) == stop_after:
            raise KilledError

    with pytest.raises(KilledError):
        trained(subject, tmp_path / "killed", progress=kill)
    reported: list[tuple[int, int]] = []
    resumed, found = trained(subject, tmp_path / "killed", progress=lambda done, total: reported.append((done, total)))
    assert same(found, expected)
    assert [replace(block, seconds=0) for block in resumed.blocks] == [
        replace(block, seconds=0) for block in whole.blocks
    ]
    # Only what was not finished has been trained: 4 iterations a block, one call each and one at the end.
    assert len(reported) == (len(whole.blocks) - stop_after) * 5
    again, final = trained(subject, tmp_path / "killed", progress=lambda done, total: pytest.fail("trained again"))
    assert same(final, expected)
    assert again == resumed


def test_checkpoints_of_another_run_or_damaged_ones_are_not_used(subject: Planned, tmp_path: Path) -> None:
    _, expected = trained(subject, tmp_path, seed=4)
    trained(subject, tmp_path, seed=3)  # overwrites them all
    path = tmp_path / "block-0004.safetensors"
    assert same(trained(subject, tmp_path, seed=4)[1], expected)
    path.write_bytes(path.read_bytes()[:100])
    reported: list[int] = []
    assert same(trained(subject, tmp_path, seed=4, progress=lambda done, total: reported.append(done))[1], expected)
    assert reported


def test_memory_bound_and_batches_of_caching_change_nothing(subject: Planned, tmp_path: Path) -> None:
    _, expected = trained(subject, tmp_path / "memory")
    result, found = trained(subject, tmp_path / "disk", max_ram=0)
    assert same(found, expected)
    assert len(list((tmp_path / "disk").iterdir())) == len(result.blocks)


def test_a_block_that_training_would_spoil_keeps_the_plan(subject: Planned, tmp_path: Path) -> None:
    wild = Rates(weights=1e4, scales=30.0, weight_scales=30.0, zero_points=1e3, biases=1e3)
    model = subject.denoiser.model
    with trainable(model, subject.plan, subject.weights, subject.found, TrainOptions(rates=wild)) as training:
        result = distill(subject, training, tmp_path / "scratch")
        plan, codes = training.freeze()
    assert not any(block.kept for block in result.blocks)
    assert all(block.error == block.before for block in result.blocks)
    assert [
        name for name, table in plan.activations() if not table.same_as(dict(subject.plan.activations())[name])
    ] == []
    for name, array in codes.items():
        assert (array == subject.weights.codes(*_key(name))).all()


def test_a_table_belongs_to_the_block_that_reads_its_tensor_first(subject: Planned, tmp_path: Path) -> None:
    """Every cross-attention reads the prompt: one table, moved by the first of them alone."""
    layers = [layer for layer in subject.plan.layers if layer.name.endswith("attn2.to_k")]
    assert len(layers) == 2
    blocks = {layer.name.removesuffix(".attn2.to_k"): layer.name for layer in layers}
    options = TrainOptions(weight_scales=False, biases=False, rates=Rates(scales=0.02))
    with trainable(subject.denoiser.model, subject.plan, subject.weights, subject.found, options) as model:
        graph = trace_blocks(subject.denoiser.model, subject.denoiser.data, subject.denoiser.run, list(model.layers))
        tables = {model.layers[name].quantizers[0].index for name in blocks.values()}  # type: ignore[union-attr]
        assert len(tables) == 1
        distill(subject, model, tmp_path, iterations=12)
        moved = model.tables.rows_of(tables.pop(), "scale")
    assert float(moved.abs().max()) > 0
    first = next(index for index, block in enumerate(graph.blocks) if block.name in blocks)
    number = sum(1 for block in graph.blocks[:first] if block.layers)
    kept = load_file(tmp_path / f"block-{number:04d}.safetensors")
    assert torch.equal(kept[f"{blocks[graph.blocks[first].name]}#0|scale"], moved)


def test_attention_tables_are_trained_with_their_block(subject: Planned, tmp_path: Path) -> None:
    _, state = trained(subject, tmp_path, TrainOptions(weights="none", rates=Rates(scales=0.02)), iterations=20)
    moved = [key for key, value in state.items() if "#probability|scale" in key and float(value.abs().max()) > 0]
    assert moved


def test_progress_counts_up_to_its_total(tmp_path: Path) -> None:
    subject = planned(small(20), tmp_path / "plan", None)
    reported: list[tuple[int, int]] = []
    trained(subject, tmp_path / "scratch", progress=lambda done, total: reported.append((done, total)), iterations=2)
    totals = {total for _, total in reported}
    assert len(totals) == 1
    counts = [done for done, _ in reported]
    assert counts == sorted(counts)
    assert counts[-1] == totals.pop()


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=8),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_held_out_trajectories_are_whole_and_enough(sizes: list[int], share: float, seed: int) -> None:
    trajectory = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes)])
    total = len(trajectory)
    data = CalibrationSet({"timestep": torch.zeros(total, dtype=torch.int64)}, trajectory, torch.arange(total))
    wanted = max(1, int(share * total))
    try:
        fitted, held = split_entries(data, wanted, seed)
    except CalibrationError:
        assert total - wanted < max(sizes)
        return
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(total))
    assert not set(trajectory[fitted].tolist()) & set(trajectory[held].tolist())
    assert wanted <= len(held) < wanted + max(sizes)


def test_nothing_left_to_train_on_is_refused(subject: Planned, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="30 of 30 entries held out leaves 0 to train on and 30 to judge by"):
        trained(subject, tmp_path, held_out=30)
