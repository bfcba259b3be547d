"""Training on where trajectories end: what is measured, what is kept, and that a killed run goes on."""

from collections.abc import Mapping
from math import log
from pathlib import Path

import pytest
import torch
from calib_fixture import ParallelDenoiser, random_calibration, run_on
from thread_ranks import together
from torch import Tensor, nn

from calib.bit_allocation import uniform
from calib.freeze import freeze
from calib.observer import Observer
from calib.optimizer import MatrixOptimizer
from calib.probe import ProbeResult, probe
from calib.sampling import CalibrationSet
from calib.timestep_table import equal_groups
from calib.trainable import Rates, TrainOptions, trainable
from calib.trajectory_distill import (
    TrajectoryDistillResult,
    distill_trajectories,
    first_calls,
    log_errors,
)
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import BitWidths
from dmqexport.quant_weights import QuantWeights
from dmqexport.ranks import ALONE, Ranks

TIMES = (36, 20, 4)
TRAJECTORIES = 40
ROW_MAP = equal_groups(40, 4)


class Subject:
    """A float model of its own, its plan, and trajectories of three steps with a guided half."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.denoiser: nn.Module = ParallelDenoiser().eval()
        calibration = random_calibration(4)
        self.found: ProbeResult = probe(self.denoiser, lambda index: run_on(self.denoiser, calibration, index))
        observer = Observer(self.found, ROW_MAP, 512, seed=0, attention=True)
        statistics = observer.observe(self.denoiser, random_calibration(20), lambda inputs: self.denoiser(**inputs), 5)
        chosen = uniform(self.found, BitWidths.parse("w3a6"), [], {}, [])
        path = folder / "codes"
        self.plan: QuantPlan = freeze(self.denoiser, self.found, chosen, statistics, ROW_MAP, 8, "model", "w3a6", path)
        self.weights = QuantWeights(path)
        self.starts = guided(TRAJECTORIES)
        with torch.no_grad():
            pairs = torch.arange(2 * TRAJECTORIES).reshape(TRAJECTORIES, 2)
            self.finished = self.finish(first_calls(self.starts, pairs))

    def finish(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Three steps of a guided sampler."""
        half = len(inputs["sample"]) // 2
        latents = inputs["sample"][:half]
        for time in TIMES:
            timestep = torch.full((2 * half,), time)
            answer = self.denoiser(torch.cat([latents, latents]), timestep, inputs["encoder_hidden_states"])[:, :3]
            without, having = answer.chunk(2)
            latents = latents - 0.1 * (without + 2.0 * (having - without))
        return latents

    def train(
        self,
        options: TrainOptions,
        iterations: int,
        *,
        batch_size: int = 3,
        held_out: int = 4,
        checkpoint: Path | None = None,
        ranks: Ranks = ALONE,
        finish: object = None,
    ) -> tuple[TrajectoryDistillResult, dict[str, Tensor]]:
        """(result, state afterwards)"""
        with trainable(self.denoiser, self.plan, self.weights, self.found, options) as model:
            result = distill_trajectories(
                model, self.starts, self.finished, finish or self.finish,  # type: ignore[arg-type]
                names=None, iterations=iterations, batch_size=batch_size, held_out=held_out, seed=5,
                checkpoint=checkpoint, ranks=ranks,
            )  # fmt: skip
            return result, model.state()


def guided(trajectories: int) -> CalibrationSet:
    """First calls: both halves start from one noise."""
    found = random_calibration(2 * trajectories, seed=2)
    inputs = dict(found.inputs)
    inputs["sample"] = found.inputs["sample"][:trajectories].repeat_interleave(2, dim=0)
    number = torch.arange(2 * trajectories)
    return CalibrationSet(inputs, number // 2, torch.zeros_like(number))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("plan"))


def test_an_error_is_a_share_of_the_signal() -> None:
    exact = torch.randn(3, 2, 4, 4)
    found = exact * torch.tensor([1.0, 1.1, 0.0]).reshape(3, 1, 1, 1)
    assert log_errors(found, exact).tolist() == pytest.approx([log(1e-6), log(0.01 + 1e-6), 0.0], abs=1e-4)
    assert bool(torch.isfinite(log_errors(torch.zeros(1, 4), torch.zeros(1, 4))).all())


def test_the_unguided_halves_come_first() -> None:
    starts = guided(4)
    inputs = first_calls(starts, torch.tensor([[4, 5], [0, 1]]))
    assert torch.equal(inputs["encoder_hidden_states"], starts.inputs["encoder_hidden_states"][[4, 0, 5, 1]])
    assert torch.equal(inputs["sample"][:2], inputs["sample"][2:])


@pytest.mark.parametrize(
    "options",
    [TrainOptions(), TrainOptions(optimizer="muon"), TrainOptions(weights="adapter")],
    ids=["full", "muon", "adapter"],
)
def test_ends_get_nearer_and_the_nearest_state_is_kept(options: TrainOptions, subject: Subject) -> None:
    result, state = subject.train(options, 40)
    trials = dict(result.held_out)
    assert list(trials) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert trials[result.kept] == min(trials.values())
    assert trials[result.kept] < trials[0] - 0.5, "at least half a decibel"
    with trainable(subject.denoiser, subject.plan, subject.weights, subject.found, options) as model:
        model.load_state(state)
        with torch.no_grad():
            pairs = torch.arange(72, 80).reshape(4, 2)
            found = subject.finish(first_calls(subject.starts, pairs))
        error = float(log_errors(found, subject.finished[36:]).mean()) * 10 / log(10)
    assert error == pytest.approx(trials[result.kept], abs=1e-3)


def test_training_that_only_does_harm_changes_nothing(subject: Subject) -> None:
    wild = TrainOptions(rates=Rates(weights=3.0, weight_scales=0.7, scales=0.7, zero_points=3.0, biases=3.0))
    result, state = subject.train(wild, 8)
    assert result.kept == 0
    assert min(value for done, value in result.held_out if done) > result.held_out[0][1]
    with trainable(subject.denoiser, subject.plan, subject.weights, subject.found, wild) as model:
        untrained = model.state()
    assert all(torch.equal(state[name], value) for name, value in untrained.items())


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_killed_run_goes_on_to_the_same_bits(
    optimizer: MatrixOptimizer, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainOptions(optimizer=optimizer)
    expected, state = subject.train(options, 9)
    monkeypatch.setattr("calib.trajectory_distill._CHECKPOINT_SECONDS", -1.0)
    path, calls = tmp_path / "checkpoint.pt", 0

    def interrupted(inputs: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise KeyboardInterrupt
        return subject.finish(inputs)

    with pytest.raises(KeyboardInterrupt):
        subject.train(options, 9, checkpoint=path, finish=interrupted)
    resumed, found = subject.train(options, 9, checkpoint=path)
    assert resumed == expected
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_three_ranks_train_what_one_does(tmp_path: Path) -> None:
    """Batches of two trajectories, so that one rank has none."""
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    subjects = [Subject(folder) for folder in folders]
    expected, state = subjects[3].train(TrainOptions(), 5, batch_size=2)
    results = together(3, lambda ranks: subjects[ranks.rank].train(TrainOptions(), 5, batch_size=2, ranks=ranks))
    for result, found in results:
        assert result.losses == pytest.approx(expected.losses, rel=1e-4)
        assert [value for _, value in result.held_out] == pytest.approx([v for _, v in expected.held_out], rel=1e-4)
        for name, value in state.items():
            assert torch.equal(found[name], results[0][1][name]), "ranks must hold one model"
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("held_out", [0, 40, 42])
def test_something_must_be_left_to_train_on_and_to_judge_by(held_out: int, subject: Subject) -> None:
    with pytest.raises(CalibrationError, match=f"of which {held_out} are held out"):
        subject.train(TrainOptions(), 1, held_out=held_out)


def test_a_loss_that_is_no_number_is_told(subject: Subject) -> None:
    with pytest.raises(CalibrationError, match="diverged at iteration 0 of 3"):
        subject.train(TrainOptions(), 3, finish=lambda inputs: subject.finish(inputs) * float("nan"))
