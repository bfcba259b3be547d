"""What is trained comes back as a plan that computes the same, whatever was trained."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from torch import Tensor, nn

from calib.bit_allocation import uniform
from calib.freeze import freeze
from calib.network_distill import distill_network, guidance_pairs, teacher_outputs, trajectory_loss
from calib.observer import Observer
from calib.probe import ProbeResult, probe
from calib.quantizer import ActivationQuantizer, RowContext, simulate
from calib.sampling import CalibrationSet
from calib.timestep_table import equal_groups
from calib.trainable import Rates, Tables, TrainableActivation, TrainableModel, TrainOptions, WeightMode, trainable
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import ActivationQuant, BitWidths
from dmqexport.quant_weights import QuantWeights

ROWS = 5
ROW_MAP = equal_groups(TIMESTEPS, ROWS)
FAST = Rates(weights=1e-2, adapter=2e-2, zero_points=5e-3, scales=2e-3)
MODES: tuple[WeightMode, ...] = ("none", "full", "rounding", "adapter")


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return ParallelDenoiser().eval()


@pytest.fixture(scope="module")
def found(denoiser: nn.Module) -> ProbeResult:
    calibration = random_calibration(4)
    return probe(denoiser, lambda index: run_on(denoiser, calibration, index))


@pytest.fixture(scope="module")
def planned(
    denoiser: nn.Module, found: ProbeResult, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantPlan, QuantWeights]:
    observer = Observer(found, ROW_MAP, 512, seed=0, attention=True)
    statistics = observer.observe(denoiser, random_calibration(20), lambda inputs: denoiser(**inputs), 5)
    path = tmp_path_factory.mktemp("plan") / "codes"
    chosen = uniform(found, BitWidths.parse("w3a6"), ["joined"], {}, [])
    return freeze(denoiser, found, chosen, statistics, ROW_MAP, 8, "model", "w3a6", path), QuantWeights(path)


def call(denoiser: nn.Module, entries: int = 6) -> Tensor:
    with torch.no_grad():
        output: Tensor = denoiser(**random_calibration(entries, seed=9).inputs)
    return output


def simulated(denoiser: nn.Module, model: TrainableModel, folder: Path) -> Tensor:
    """The output of the frozen plan, as deployment computes it. To be called outside of `trainable`."""
    plan, codes = model.freeze()
    QuantWeights.save(folder / "frozen", codes)
    plan.save(folder)
    with simulate(denoiser, QuantPlan.load(folder), QuantWeights(folder / "frozen")):
        return call(denoiser)


def train(denoiser: nn.Module, model: TrainableModel, data: CalibrationSet, target: Tensor, steps: int) -> list[float]:
    optimizer, losses = model.optimizer(None, steps), []
    for _ in range(steps):
        loss = (denoiser(**data.inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.forget()
    return losses


@pytest.mark.parametrize("mode", MODES)
def test_untrained_it_computes_the_plan(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights], mode: WeightMode
) -> None:
    with simulate(denoiser, *planned):
        expected = call(denoiser)
    with trainable(denoiser, *planned, found, TrainOptions(weights=mode)) as model:
        model.harden()
        actual = call(denoiser)
        _, codes = model.freeze()
    assert torch.allclose(actual, expected, atol=1e-5)
    for key, value in codes.items():
        layer, segment = key.rsplit("#", 1)
        assert np.array_equal(value, planned[1].codes(layer, int(segment))), key


@pytest.mark.parametrize("mode", MODES)
def test_gains_are_those_of_the_plan_and_stay(
    denoiser: nn.Module, found: ProbeResult, mode: WeightMode, tmp_path: Path
) -> None:
    observer = Observer(found, ROW_MAP, 512, seed=0, attention=True)
    statistics = observer.observe(denoiser, random_calibration(20), lambda inputs: denoiser(**inputs), 5)
    chosen = uniform(found, BitWidths.parse("w4a3"), [], {}, [])
    path = tmp_path / "codes"
    plan = freeze(denoiser, found, chosen, statistics, ROW_MAP, None, "model", "w4a3", path, search="unbiased")
    gains = {name: table.gain for name, table in plan.activations() if table.gain is not None}
    assert gains
    weights, data = QuantWeights(path), random_calibration(20)
    with torch.no_grad():
        target = denoiser(**data.inputs)
    with simulate(denoiser, plan, weights):
        expected = call(denoiser)
        alone = torch.cat([denoiser(**random_calibration(6, seed=9).select(torch.tensor([i]))) for i in range(6)])
    torch.testing.assert_close(alone.detach(), expected, atol=1e-5, rtol=0)
    with trainable(denoiser, plan, weights, found, TrainOptions(weights=mode, rates=FAST)) as model:
        model.harden()
        assert torch.allclose(call(denoiser), expected, atol=1e-5)
        one = random_calibration(6, seed=9).select(torch.tensor([3]))
        with torch.no_grad():  # a single row is a number to the quantizer
            assert torch.allclose(denoiser(**one), expected[3:4], atol=1e-5)
        train(denoiser, model, data, target, 5)
        model.harden()
        trained = call(denoiser)
    frozen, codes = model.freeze()
    for name, table in frozen.activations():
        assert (table.gain is None) == (name not in gains)
        if table.gain is not None:
            assert np.array_equal(table.gain, gains[name])
    QuantWeights.save(path, codes)
    with simulate(denoiser, frozen, QuantWeights(path)):
        assert torch.allclose(call(denoiser), trained, atol=1e-5)


@pytest.fixture(scope="module")
def remaining(
    denoiser: nn.Module, found: ProbeResult, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantPlan, QuantWeights]:
    """8 bits, of which three layers leave remainders: one with rows, one of two segments, one of two readers."""
    observer = Observer(found, ROW_MAP, 512, seed=0, attention=True)
    statistics = observer.observe(denoiser, random_calibration(20), lambda inputs: denoiser(**inputs), 5)
    path = tmp_path_factory.mktemp("remaining") / "codes"
    chosen = uniform(found, BitWidths.parse("w4a8"), [], {}, [])
    plan = freeze(
        denoiser, found, chosen, statistics, ROW_MAP, None, "model", "w4a8", path,
        remainders=("scaled", "joined", "conv"),
    )  # fmt: skip
    return plan, QuantWeights(path)


def test_untrained_remainders_are_those_of_the_plan(
    denoiser: nn.Module, found: ProbeResult, remaining: tuple[QuantPlan, QuantWeights]
) -> None:
    plan = remaining[0]
    with simulate(denoiser, *remaining):
        expected = call(denoiser)
    with trainable(denoiser, *remaining, found, TrainOptions(weights="none")) as model:
        shared = model.layers["conv_shared"].quantizers[0], model.layers["conv"].quantizers[0]
        actual = call(denoiser)
        model.forget()
        frozen, _ = model.freeze()
    assert shared[0] is not shared[1], "one of the readers has no remainder"
    equal_but_for_ties(actual, expected)
    for before, after in zip(plan.layers, frozen.layers, strict=True):
        assert [part.remainder for part in after.segments] == [part.remainder for part in before.segments]


def test_trained_remainders_freeze_without_loss(
    denoiser: nn.Module, found: ProbeResult, remaining: tuple[QuantPlan, QuantWeights], tmp_path: Path
) -> None:
    data = random_calibration(20)
    with torch.no_grad():
        target = denoiser(**data.inputs)
    with trainable(denoiser, *remaining, found, TrainOptions(rates=FAST)) as model:
        train(denoiser, model, data, target, 20)
        model.harden()
        trained = call(denoiser)
    equal_but_for_ties(simulated(denoiser, model, tmp_path), trained)


def equal_but_for_ties(actual: Tensor, expected: Tensor) -> None:
    """A tie of a remainder, which float32 decides, is a step of a 254th of 8 bits; few values meet one.

    How many do depends on the order in which a processor adds: one of 20 · 9 · 7 · 3 values of the sample or two. Each
    reaches the 4 channels of 9 pixels.
    """
    difference = (actual - expected).abs()
    assert float(difference.max()) <= 1e-4
    assert int((difference > 1e-5).sum()) <= 3 * 4 * 9


@pytest.mark.parametrize("factor", [None, [0.5, 2.0, 1.0]], ids=["plain", "channel factors"])
@pytest.mark.parametrize("scales", [[0.02], [0.02, 0.05]], ids=["one row", "two rows"])
def test_a_remainder_has_the_simulated_values_and_a_gradient_of_one(
    scales: list[float], factor: list[float] | None
) -> None:
    qparams = ActivationQuant.from_rows(8, scales, [128] * len(scales), factor)
    context = RowContext(torch.tensor([0, len(scales) - 1]))
    context.set_timestep(torch.tensor([0, 1, 1, 0]), 4)
    tables = Tables(2, context)
    activation = TrainableActivation("x", qparams, tables, remainder=True)
    tables.build(train=True)
    limit = 126 * min(scales) * (0.5 if factor else 1.0)
    tensor = (torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1) * limit
    tensor.requires_grad_()
    values = activation(tensor)
    quantizer = ActivationQuantizer("x", qparams, context, remainder=True)
    with torch.no_grad():
        expected = quantizer.rescale(quantizer(tensor))
    # A tie of the remainder, which float32 decides, is a step of a 254th.
    assert float((values - expected).detach().abs().max()) <= 1.01 * max(scales) / 254
    assert float((values - expected).detach().abs().mean()) <= 0.01 * max(scales) / 254
    values.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    assert tensor.grad is not None
    spread = torch.ones(3) if factor is None else torch.tensor(factor)
    torch.testing.assert_close(tensor.grad, (1 / spread).expand_as(tensor))


@pytest.mark.parametrize("mode", MODES)
def test_training_helps_and_freezes_without_loss(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights], mode: WeightMode, tmp_path: Path
) -> None:
    data = random_calibration(20)
    with torch.no_grad():
        target = denoiser(**data.inputs)
    with trainable(denoiser, *planned, found, TrainOptions(weights=mode, rank=2, rates=FAST)) as model:
        losses = train(denoiser, model, data, target, 150)
        model.harden()
        trained = call(denoiser)
    # At such rates codes still jump at the end, on every kind of processor otherwise.
    assert min(losses) < 0.95 * losses[0]
    assert torch.allclose(simulated(denoiser, model, tmp_path), trained, atol=2e-5)
    assert all(parameter.requires_grad for parameter in denoiser.parameters())


def test_rows_that_no_batch_holds_never_move(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights]
) -> None:
    wide, narrow = random_calibration(20), random_calibration(6, timesteps=torch.tensor([0, 1, 2, 3, 35, 36]))
    target = torch.zeros_like(call(denoiser, 20))
    present = {int(row) for row in np.unique(ROW_MAP[narrow.timesteps.numpy()])}
    absent = sorted(set(range(ROWS)) - present)
    with trainable(denoiser, *planned, found, TrainOptions()) as model:
        optimizer = model.optimizer(None, 100)

        def step(data: CalibrationSet) -> Tensor:
            loss = (denoiser(**data.inputs) - target[: len(data)]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return model.tables.get_parameter("scale_rows").detach().clone()

        for _ in range(5):
            before = step(wide)  # every row has momentum now
        for _ in range(5):
            after = step(narrow)
    assert absent
    assert torch.equal(after[absent], before[absent])
    assert not torch.equal(after[sorted(present)], before[sorted(present)])


def test_readers_of_one_tensor_keep_one_table(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights]
) -> None:
    data = random_calibration(20)
    with trainable(denoiser, *planned, found, TrainOptions()) as model:
        train(denoiser, model, data, torch.zeros_like(call(denoiser, 20)), 5)
        plan, _ = model.freeze()
    by_source: dict[tuple[str, int | None], list[str]] = {}
    for info in found.layers:
        by_source.setdefault((info.source, planned[0].layer(info.name).activation_bits), []).append(info.name)
    shared = [names for names in by_source.values() if len(names) > 1]
    assert shared
    for names in shared:
        tables = [plan.layer(name).segments[0].activation for name in names]
        assert all(table is not None and tables[0] is not None and table.same_as(tables[0]) for table in tables)


def test_state_restores_everything(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights]
) -> None:
    data = random_calibration(20)
    with trainable(denoiser, *planned, found, TrainOptions()) as model:
        train(denoiser, model, data, torch.zeros_like(call(denoiser, 20)), 5)
        expected, state = call(denoiser), model.state()
    with trainable(denoiser, *planned, found, TrainOptions()) as model:
        assert not torch.equal(call(denoiser), expected)
        model.load_state(state)
        assert torch.equal(call(denoiser), expected)


def distilled(
    denoiser: nn.Module,
    model: TrainableModel,
    data: CalibrationSet,
    targets: Tensor,
    iterations: int,
    path: Path | None,
    coherence: float = 1.0,
) -> Tensor:
    distill_network(
        model, data, targets, lambda inputs: denoiser(**inputs), names=None, guidance=3.0, guided_share=0.5,
        coherence=coherence, guidance_length=5.0,
        step_weights=torch.ones(int(data.step.max()) + 1), iterations=iterations, batch_size=8, seed=3, checkpoint=path,
    )  # fmt: skip
    return call(denoiser)


@pytest.mark.parametrize("coherence", [0.0, 1.0])
def test_a_killed_distillation_goes_on_to_the_same_bits(
    denoiser: nn.Module,
    found: ProbeResult,
    planned: tuple[QuantPlan, QuantWeights],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    coherence: float,
) -> None:
    data = random_calibration(20)
    targets = teacher_outputs(data, lambda inputs: denoiser(**inputs), 7)
    with trainable(denoiser, *planned, found, TrainOptions()) as model:
        expected = distilled(denoiser, model, data, targets, 9, None, coherence)

    monkeypatch.setattr("calib.network_distill._CHECKPOINT_SECONDS", -1.0)
    path = tmp_path / "checkpoint.pt"
    calls = 0

    def interrupted(inputs: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        output: Tensor = denoiser(**inputs)  # type: ignore[arg-type]
        return output

    with trainable(denoiser, *planned, found, TrainOptions()) as model, pytest.raises(KeyboardInterrupt):
        distill_network(
            model, data, targets, interrupted, names=None, guidance=3.0, guided_share=0.5,
            coherence=coherence, guidance_length=5.0,
            step_weights=torch.ones(10), iterations=9, batch_size=8, seed=3, checkpoint=path,
        )  # fmt: skip
    with trainable(denoiser, *planned, found, TrainOptions()) as model:
        assert torch.equal(distilled(denoiser, model, data, targets, 9, path, coherence), expected)


def test_only_the_named_layers_move(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights]
) -> None:
    data = random_calibration(20)
    targets = torch.zeros_like(call(denoiser, 20))
    with trainable(denoiser, *planned, found, TrainOptions(activations=False)) as model:
        before = model.state()
        distill_network(
            model, data, targets, lambda inputs: denoiser(**inputs), names=["time"], guidance=1.0, guided_share=0.0,
            coherence=0.0,
            step_weights=torch.ones(10), iterations=3, batch_size=8, seed=0,
        )  # fmt: skip
        moved = {key.split("|")[0] for key, value in model.state().items() if not torch.equal(value, before[key])}
    assert moved == {"time"}


def test_a_loss_that_is_no_number_is_told(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights]
) -> None:
    data = random_calibration(20)
    targets = torch.full_like(call(denoiser, 20), float("nan"))
    with (
        trainable(denoiser, *planned, found, TrainOptions()) as model,
        pytest.raises(CalibrationError, match="diverged at iteration 0 of 2"),
    ):
        distilled(denoiser, model, data, targets, 2, None)


def test_the_training_set_must_hold_every_step(
    denoiser: nn.Module, found: ProbeResult, planned: tuple[QuantPlan, QuantWeights]
) -> None:
    data = random_calibration(20)
    calls_of = guidance_pairs(data)
    last = int(data.step.max())
    kept = data.at(calls_of[data.step[calls_of[:, 0]] < last].flatten())
    targets = teacher_outputs(kept, lambda inputs: denoiser(**inputs), 7)
    with (
        trainable(denoiser, *planned, found, TrainOptions()) as model,
        pytest.raises(CalibrationError, match=f"no entry of step {last} of {last + 1}"),
    ):
        distill_network(
            model, kept, targets, lambda inputs: denoiser(**inputs), names=None, guidance=3.0, guided_share=0.5,
            step_weights=torch.ones(last + 1), iterations=1, batch_size=8, seed=0,
        )  # fmt: skip


def test_pairs_are_the_halves_of_one_call() -> None:
    step = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    trajectory = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    inputs = {"timestep": step * 10, "sample": torch.zeros(8, 1)}
    assert guidance_pairs(CalibrationSet(inputs, trajectory, step)).tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]
    mixed = CalibrationSet({name: value[:7] for name, value in inputs.items()}, trajectory[:7], step[:7])
    with pytest.raises(CalibrationError, match="guided and unguided"):
        guidance_pairs(mixed)


def test_the_loss_sees_what_the_sampler_sees() -> None:
    same = torch.ones(1, 1, 2, 4)
    opposite = torch.stack([torch.ones(1, 1, 4), -torch.ones(1, 1, 4)], dim=2)
    weights = torch.ones(1, 1)

    def loss(error: Tensor, share: float) -> float:
        return float(trajectory_loss(error, weights, 1, 3.0, share, 1.0))

    assert loss(same, 0.0) == pytest.approx(1.0)
    assert loss(same, 1.0) == pytest.approx(1 / 13)
    assert loss(opposite, 1.0) == pytest.approx(25 / 13)


def test_errors_of_one_sign_count_as_their_sum() -> None:
    weights = torch.tensor([[1.0, 4.0, 1.0, 1.0]])
    error = torch.ones(1, 4, 1, 3)
    assert float(trajectory_loss(error, weights, 4, 1.0, 1.0, 0.0)) == pytest.approx(7 / 4)
    assert float(trajectory_loss(error, weights, 4, 1.0, 1.0, 1.0)) == pytest.approx(5**2 / 4)
    alternating = error * torch.tensor([1.0, -1.0, 1.0, 0.0]).reshape(1, 4, 1, 1)
    assert float(trajectory_loss(alternating, weights, 4, 1.0, 1.0, 1.0)) == pytest.approx(0.0, abs=1e-6)


def test_some_steps_estimate_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    error, weights = torch.randn(1, 6, 1, 5, generator=generator) + 0.5, torch.rand(1, 6, generator=generator)
    whole = float(trajectory_loss(error, weights, 6, 1.0, 1.0, 1.0))
    subsets = list(combinations(range(6), 3))
    parts = [float(trajectory_loss(error[:, list(s)], weights[:, list(s)], 6, 1.0, 1.0, 1.0)) for s in subsets]
    assert sum(parts) / len(parts) == pytest.approx(whole, rel=1e-5)
