"""Statistics: independent of batch size and order to the bit, exact at the ends, and never silently meaningless."""

from pathlib import Path

import numpy as np
import pytest
import torch
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from torch import Tensor, nn

from calib.observer import (
    ActivationStatistics,
    Observer,
    attention_operands,
    load_statistics,
    save_statistics,
)
from calib.probe import ProbeResult, probe
from calib.sampling import CalibrationSet
from calib.timestep_table import equal_groups
from dmqexport.errors import CalibrationError

FIELDS = ("values", "weights", "low", "high", "second_moment")


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return ParallelDenoiser().eval()


@pytest.fixture(scope="module")
def found(denoiser: nn.Module) -> ProbeResult:
    calibration = random_calibration(4)
    return probe(denoiser, lambda index: run_on(denoiser, calibration, index))


def observe(
    denoiser: nn.Module,
    found: ProbeResult,
    calibration: CalibrationSet,
    *,
    batch_size: int = 4,
    rows: int = 5,
    samples: int = 256,
    attention: bool = True,
) -> dict[str, ActivationStatistics]:
    observer = Observer(found, equal_groups(TIMESTEPS, rows), samples, seed=0, attention=attention)
    return observer.observe(denoiser, calibration, lambda inputs: denoiser(**inputs), batch_size)


def test_every_tensor_has_statistics_in_rows_that_it_needs(denoiser: nn.Module, found: ProbeResult) -> None:
    statistics = observe(denoiser, found, random_calibration(20))
    operands = {f"attention#{operand}" for operand in ("query", "key", "probability", "value")}
    # `conv_shared` reads what `conv` reads.
    assert set(statistics) == {"conv#0", "scaled#0", "joined#0", "joined#1", "time#0", "text#0"} | operands
    for key, part in statistics.items():
        rows = 1 if key == "text#0" else 5
        assert part.low.shape == part.high.shape == (rows,)
        assert part.values.shape == part.weights.shape
        assert part.values.shape[0] == rows
        assert bool((part.values.amin(dim=1) <= part.low + 1e-30).all() or (part.low > 0).any())
    assert statistics["conv#0"].second_moment.shape == (3,)
    assert statistics["joined#1"].second_moment.shape == (2,)
    assert statistics["attention#query"].second_moment.shape == (0,)
    assert "attention#query" not in observe(denoiser, found, random_calibration(20), attention=False)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20, 100])
def test_batch_size_changes_no_bit(denoiser: nn.Module, found: ProbeResult, batch_size: int) -> None:
    calibration = random_calibration(20)
    reference = observe(denoiser, found, calibration, batch_size=20)
    statistics = observe(denoiser, found, calibration, batch_size=batch_size)
    assert statistics.keys() == reference.keys()
    for key, part in statistics.items():
        if key == "attention#probability":  # behind a product, whose rounding may depend on the batch
            continue
        for field in FIELDS:
            assert torch.equal(getattr(part, field), getattr(reference[key], field)), (key, field)


def test_ends_and_moments_are_exact(denoiser: nn.Module, found: ProbeResult) -> None:
    """Values are a sample; the extremes of every row and the mean square of every channel are not."""
    calibration = random_calibration(20)
    statistics = observe(denoiser, found, calibration, samples=64)
    rows = equal_groups(TIMESTEPS, 5)[calibration.timesteps.numpy()]
    sample = calibration.inputs["sample"]
    for row in range(5):
        part = sample[torch.from_numpy(rows == row)]
        assert statistics["conv#0"].low[row] == part.min()
        assert statistics["conv#0"].high[row] == part.max()
    torch.testing.assert_close(statistics["conv#0"].second_moment, sample.square().mean(dim=(0, 2, 3)))
    text = calibration.inputs["encoder_hidden_states"]
    torch.testing.assert_close(statistics["text#0"].second_moment, text.square().mean(dim=(0, 1)))
    assert statistics["text#0"].low[0] == text.min()


def test_weights_stand_for_every_value(denoiser: nn.Module, found: ProbeResult) -> None:
    """The weights of a row add up to the values it saw, so that entries count alike."""
    statistics = observe(denoiser, found, random_calibration(20), samples=64)
    values_per_entry = 3 * 9 * 7
    for row in range(5):
        assert float(statistics["conv#0"].weights[row].sum()) == pytest.approx(4 * values_per_entry, rel=1e-5)


def test_weighted_values_estimate_the_mean(denoiser: nn.Module, found: ProbeResult) -> None:
    calibration = random_calibration(20)
    for samples in (64, 4096):
        part = observe(denoiser, found, calibration, samples=samples)["conv#0"]
        estimate = (part.values * part.weights).sum() / part.weights.sum()
        assert float(estimate - calibration.inputs["sample"].mean()) == pytest.approx(0.0, abs=0.15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(denoiser: nn.Module, found: ProbeResult, bad: float) -> None:
    """One bad value anywhere is found, even where the sample does not look."""
    calibration = random_calibration(20)
    for position in ((0, 0, 0, 0), (13, 2, 8, 6), (19, 1, 4, 3)):
        broken = calibration.inputs["sample"].clone()

        def run(inputs: dict[str, Tensor], broken: Tensor = broken) -> object:
            start = int(torch.nonzero(calibration.timesteps == inputs["timestep"][0])[0])
            return denoiser(**{**inputs, "sample": broken[start : start + len(inputs["sample"])]})

        broken[position] = bad
        observer = Observer(found, equal_groups(TIMESTEPS, 5), 16, seed=0, attention=False)
        with pytest.raises(CalibrationError, match="conv#0: NaN or infinity"):
            observer.observe(denoiser, calibration, run, 4)


def test_a_row_without_entries_is_refused_by_number(denoiser: nn.Module, found: ProbeResult) -> None:
    calibration = random_calibration(6, timesteps=torch.tensor([0, 1, 2, 3, 30, 39]))
    with pytest.raises(CalibrationError, match=r"no calibration sample falls into rows \[1, 2\]"):
        observe(denoiser, found, calibration)


def test_a_failed_observation_leaves_no_hook(denoiser: nn.Module, found: ProbeResult) -> None:
    observer = Observer(found, equal_groups(TIMESTEPS, 5), 16, seed=0, attention=True)

    def run(inputs: dict[str, Tensor]) -> object:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        observer.observe(denoiser, random_calibration(20), run, 4)
    for module in denoiser.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("cut", [(), (1,), (2, 3, 4)])
def test_parts_of_the_batches_make_the_whole(denoiser: nn.Module, found: ProbeResult, cut: tuple[int, ...]) -> None:
    """Whoever observes which batches: put together in order, they say what one observer says."""
    calibration = random_calibration(20)
    whole = observe(denoiser, found, calibration, samples=64)
    observer = Observer(found, equal_groups(TIMESTEPS, 5), 64, seed=0, attention=True)
    parts = [
        observer.observe_part(denoiser, calibration, lambda inputs: denoiser(**inputs), 4, range(*ends))
        for ends in zip((0, *cut), (*cut, 5), strict=True)
    ]
    statistics = observer.combine(parts)
    assert statistics.keys() == whole.keys()
    for key, part in statistics.items():
        for field in FIELDS:
            torch.testing.assert_close(getattr(part, field), getattr(whole[key], field), rtol=0, atol=0)


def test_a_second_observation_forgets_the_first(denoiser: nn.Module, found: ProbeResult) -> None:
    observer = Observer(found, equal_groups(TIMESTEPS, 5), 256, seed=0, attention=False)
    first = random_calibration(20, seed=1)
    observer.observe(denoiser, first, lambda inputs: denoiser(**inputs), 4)
    second = random_calibration(20, seed=2)
    observer.observe(denoiser, second, lambda inputs: denoiser(**inputs), 4)
    fresh = observe(denoiser, found, second, attention=False)
    for key, part in observer.statistics_.items():
        for field in FIELDS:
            assert torch.equal(getattr(part, field), getattr(fresh[key], field))


def test_progress_counts_entries(denoiser: nn.Module, found: ProbeResult) -> None:
    seen: list[tuple[int, int]] = []
    observer = Observer(found, equal_groups(TIMESTEPS, 1), 64, seed=0, attention=False)
    observer.observe(
        denoiser, random_calibration(5), lambda inputs: denoiser(**inputs), 2, lambda *done: seen.append(done)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_statistics_round_trip(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    statistics = observe(denoiser, found, random_calibration(20))
    save_statistics(tmp_path / "statistics", statistics)
    loaded = load_statistics(tmp_path / "statistics")
    assert loaded.keys() == statistics.keys()
    for key, part in statistics.items():
        for field in FIELDS:
            assert torch.equal(getattr(part, field), getattr(loaded[key], field))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_operands_make_the_attention(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((2, 3, 5, 4), generator=generator) for _ in range(3))
    extra = {} if scale is None else {"scale": scale}
    expected = nn.functional.scaled_dot_product_attention(query, key, value, **extra)
    scaled_query, scaled_key, probability, values = attention_operands(query, key, value, extra)
    torch.testing.assert_close(torch.softmax(scaled_query @ scaled_key, dim=-1), probability)
    torch.testing.assert_close(probability @ values, expected)


def test_tiny_tensors_are_observed_whole() -> None:
    """Fewer values than are asked for: each appears, none twice beyond the exact ends."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(3, 2)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.only(sample)

    tiny = Tiny().eval()
    sample = torch.randn((4, 3), generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet(
        {"sample": sample, "timestep": torch.arange(4) * 10}, torch.arange(4), torch.zeros(4, dtype=torch.int64)
    )
    found = probe(tiny, lambda index: tiny(sample[index : index + 1], torch.tensor([index])))
    observer = Observer(found, equal_groups(TIMESTEPS, 1), 1000, seed=0, attention=False)
    part = observer.observe(tiny, calibration, lambda inputs: tiny(**inputs), 3)["only#0"]
    seen = sorted(part.values[part.weights > 0].tolist())
    np.testing.assert_allclose(seen, sorted(sample.flatten().tolist()))
