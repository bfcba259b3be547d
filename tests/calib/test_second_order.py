"""Second-order rounding: better than nearest in what it minimises, exact where nothing is to be gained."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from torch import Tensor, nn

from calib.bit_allocation import uniform
from calib.freeze import freeze
from calib.observer import Observer
from calib.probe import probe
from calib.range_search import search_weight
from calib.sampling import CalibrationSet
from calib.second_order import fit_least_squares, refine_weights, round_second_order, rounding_errors
from calib.timestep_table import equal_groups
from dmqexport.quant_plan import LayerQuant, QuantPlan
from dmqexport.quant_types import BitWidths, dequantize_weight
from dmqexport.quant_weights import QuantWeights


def correlated(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width // 4, generator=generator) @ torch.randn(
        width // 4, width, generator=generator
    ) + 0.1 * torch.randn(count, width, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("width", [16, 160, 640], ids=["one block", "two blocks", "searched by a sample"])
def test_output_error_is_smaller_than_with_nearest_rounding(bits: int, width: int) -> None:
    inputs = correlated(2000, width, seed=bits)
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(7))
    moment = inputs.T @ inputs
    codes, qparams = round_second_order(weight, [moment], bits)
    found = search_weight(weight, moment.diagonal() / moment.diagonal().mean(), bits)
    assert np.array_equal(found.zero_point.numpy(), qparams.zero_point) or width > 512
    zero = found.zero_point.unsqueeze(1).float()
    searched = found.scale.unsqueeze(1)
    nearest = torch.round(weight / searched).clamp(-zero, 2**bits - 1 - zero)

    def error(chosen: Tensor, scale: Tensor) -> float:
        return float((inputs @ (chosen * scale - weight).T).square().mean())

    fitted = torch.from_numpy(qparams.scale.copy()).unsqueeze(1)
    assert error(codes, fitted) < 0.7 * error(nearest, searched)
    lowest = -torch.from_numpy(qparams.zero_point.copy()).unsqueeze(1)
    assert bool((codes >= lowest).all() and (codes <= 2**bits - 1 + lowest).all())
    assert torch.equal(codes, codes.round())


@pytest.mark.parametrize("blocks", [1, 2])
def test_every_sweep_of_descent_lowers_the_output_error(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 192
    inputs = correlated(3000, width, seed=4)
    weight = torch.randn(16, width, generator=torch.Generator().manual_seed(9))
    parts = inputs.split(width // blocks, dim=1)  # type: ignore[no-untyped-call]  # torch's own
    moments = [part.T @ part for part in parts]
    errors = []
    for sweeps in range(4):
        monkeypatch.setattr("calib.second_order._SWEEPS", sweeps)
        codes, qparams = round_second_order(weight, moments, 4)
        wrong = codes * torch.from_numpy(qparams.scale.copy()).unsqueeze(1) - weight
        halves = wrong.split(width // blocks, dim=1)
        errors.append(sum(float(((h @ m) * h).sum()) for h, m in zip(halves, moments, strict=True)))
    assert errors[1] < 0.97 * errors[0], "compensation looks forward only, and leaves something to gain"
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))


def test_independent_inputs_round_to_nearest() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
    codes, qparams = round_second_order(weight, [100 * torch.eye(12)], 4)
    scale, zero = torch.from_numpy(qparams.scale.copy()), torch.from_numpy(qparams.zero_point.copy()).float()
    expected = torch.round(weight / scale[:, None]).clamp(-zero[:, None], 15 - zero[:, None])
    assert torch.equal(codes, expected)


def test_refitting_lowers_the_output_error_of_noisy_inputs() -> None:
    inputs = correlated(4000, 32, seed=1)
    step = 2.0
    seen = torch.round(inputs / step) * step
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    fitted = fit_least_squares(weight, seen.T @ seen, inputs.T @ seen)
    target = inputs @ weight.T
    assert float((seen @ fitted.T - target).square().mean()) < 0.9 * float((seen @ weight.T - target).square().mean())


def test_exact_inputs_keep_the_weight() -> None:
    inputs = correlated(500, 16, seed=2)
    moment = inputs.T @ inputs
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(fit_least_squares(weight, moment, moment), weight, rtol=1e-3, atol=1e-3)


def test_what_is_fitted_sees_the_activation_and_its_remainder(tmp_path: Path) -> None:
    """With 16 bits there is next to nothing to make up for: the weights are those of exact inputs."""
    torch.manual_seed(0)
    denoiser, calibration, rows = ParallelDenoiser().eval(), random_calibration(20), equal_groups(TIMESTEPS, 5)
    found = probe(denoiser, lambda index: run_on(denoiser, calibration, index))
    observed = Observer(found, rows, 512, seed=0, attention=False).observe(
        denoiser, calibration, lambda inputs: denoiser(**inputs), 5
    )
    names = ("scaled", "joined", "text")
    codes = tmp_path / "codes"
    chosen = uniform(found, BitWidths.parse("w4a8"), [], {}, [])
    plan = freeze(denoiser, found, chosen, observed, rows, None, "model", "w4a8", codes, remainders=names)

    def refined(changed: QuantPlan) -> tuple[QuantPlan, dict[str, np.ndarray]]:
        return refine_weights(
            denoiser, changed, QuantWeights(codes), calibration, lambda inputs: denoiser(**inputs), 5, 0
        )

    def only(change: str) -> QuantPlan:
        def changed(layer: LayerQuant) -> LayerQuant:
            without = {"activation": None, "remainder": False} if change == "float" else {"remainder": False}
            return replace(layer, segments=tuple(replace(part, **without) for part in layer.segments))  # type: ignore[arg-type]

        return replace(plan, layers=tuple(changed(item) if item.name in names else item for item in plan.layers))

    exact, first, both = refined(only("float")), refined(only("codes")), refined(plan)

    def distance(result: tuple[QuantPlan, dict[str, np.ndarray]], name: str) -> float:
        pairs = zip(result[0].layer(name).segments, exact[0].layer(name).segments, strict=True)
        return max(float(np.abs(one.weight.scale / other.weight.scale - 1).max()) for one, other in pairs)

    for name in names:
        assert distance(both, name) < 1e-4
        assert distance(first, name) > 5 * distance(both, name)
        assert [part.remainder for part in both[0].layer(name).segments] == [True] * len(plan.layer(name).segments)


def test_errors_at_other_widths_are_those_of_the_codes_that_would_be_chosen(tmp_path: Path) -> None:
    """With channel factors and two segments: undone, and side by side."""
    torch.manual_seed(0)
    denoiser, calibration, rows = ParallelDenoiser().eval(), random_calibration(20), equal_groups(TIMESTEPS, 5)
    found = probe(denoiser, lambda index: run_on(denoiser, calibration, index))
    sources = {f"{info.source}#0": denoiser.get_submodule(info.name) for info in found.layers if info.name == "scaled"}
    factors = {key: np.linspace(0.5, 2.0, module.weight.shape[1], dtype=np.float32) for key, module in sources.items()}
    observed = Observer(found, rows, 512, seed=0, attention=False, factors=factors).observe(
        denoiser, calibration, lambda inputs: denoiser(**inputs), 5
    )

    def planned(bits: str) -> tuple[QuantPlan, Path]:
        codes = tmp_path / bits
        chosen = uniform(found, BitWidths.parse(bits), [], {}, [])
        return freeze(denoiser, found, chosen, observed, rows, None, "model", bits, codes, factors=factors), codes

    def run(inputs: object) -> object:
        return denoiser(**inputs)  # type: ignore[arg-type]

    plan, _ = planned("w4a6")
    names = [layer.name for layer in plan.layers]
    errors = dict(rounding_errors(denoiser, plan, dict.fromkeys(names, (3, 5)), calibration, run, 5, 0))
    assert set(errors) == set(names)
    changed = {}
    for bits in (3, 5):
        other, codes = planned(f"w{bits}a6")
        refined, rounded = refine_weights(denoiser, other, QuantWeights(codes), calibration, run, 5, 0)
        for layer in refined.layers:
            parts = []
            for index, segment in enumerate(layer.segments):
                values = torch.from_numpy(rounded[f"{layer.name}#{index}"].copy()).float()
                values *= torch.from_numpy(segment.weight.scale.copy()).reshape(-1, *[1] * (values.ndim - 1))
                factor = segment.activation.channel_factor if segment.activation is not None else None
                if factor is not None:
                    values /= torch.from_numpy(factor.copy()).reshape(1, -1, *[1] * (values.ndim - 2))
                parts.append(values)
            changed[layer.name, bits] = torch.cat(parts, dim=1)
    for name in names:
        # Both are of one refitted weight, which their difference does not hold.
        between = errors[name][3] - errors[name][5]
        torch.testing.assert_close(between, changed[name, 3] - changed[name, 5], rtol=1e-4, atol=1e-6)
        assert errors[name][5].square().sum() < errors[name][3].square().sum()
    assert any(len(layer.segments) > 1 for layer in plan.layers)
    assert any(
        part.activation is not None and part.activation.channel_factor is not None
        for layer in plan.layers
        for part in layer.segments
    )


def test_layers_that_read_the_timestep_alone_are_right_at_other_timesteps_too(tmp_path: Path) -> None:
    """Calibration sees three timesteps; codes fitted to those alone are far off between them."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.time, self.body = nn.Linear(32, 16), nn.Linear(8, 16)
            self.register_buffer("waves", torch.linspace(0.05, 1.5, 16))

        def curve(self, timestep: torch.Tensor) -> torch.Tensor:
            angles = timestep.float().unsqueeze(1) * self.waves
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.body(sample) + self.time(self.curve(timestep))

    denoiser = Timed().eval()
    timesteps = torch.tensor([2, 20, 38]).repeat(20)
    inputs = {"sample": torch.randn(60, 8), "timestep": timesteps}
    calibration = CalibrationSet(inputs, torch.arange(60) // 3, torch.arange(60) % 3)
    rows = equal_groups(TIMESTEPS, 1)
    found = probe(denoiser, lambda index: run_on(denoiser, calibration, index))
    run = lambda batch: denoiser(**batch)  # noqa: E731
    observed = Observer(found, rows, 512, seed=0, attention=False).observe(denoiser, calibration, run, 5)
    chosen = uniform(found, BitWidths.parse("w3a8"), [], {}, [])
    plan = freeze(denoiser, found, chosen, observed, rows, None, "model", "w3a8", tmp_path / "codes")

    def errors(names: tuple[str, ...]) -> tuple[float, float]:
        refined, codes = refine_weights(
            denoiser, plan, QuantWeights(tmp_path / "codes"), calibration, run, 5, 0, timestep_only=names
        )
        weight = torch.from_numpy(dequantize_weight(codes["time#0"], refined.layer("time").segments[0].weight))
        factor = refined.layer("time").segments[0].activation.channel_factor  # type: ignore[union-attr]
        assert factor is None
        change = weight - denoiser.time.weight.detach()

        def of(timesteps: torch.Tensor) -> float:
            return float((denoiser.curve(timesteps) @ change.T).square().mean())

        return of(timesteps), of(torch.arange(TIMESTEPS))

    here, everywhere = errors(())
    fitted_here, fitted_everywhere = errors(("time",))
    assert fitted_everywhere < 0.6 * everywhere
    assert fitted_here < 0.5 * fitted_everywhere
    assert here < fitted_here


def test_weights_that_are_not_refitted_are_rounded_where_they_are(tmp_path: Path) -> None:
    """Coarse activations, fine weights: what least squares would change is plain to see."""
    torch.manual_seed(0)
    denoiser, calibration, rows = ParallelDenoiser().eval(), random_calibration(20), equal_groups(TIMESTEPS, 5)
    found = probe(denoiser, lambda index: run_on(denoiser, calibration, index))
    run = lambda batch: denoiser(**batch)  # noqa: E731
    observed = Observer(found, rows, 512, seed=0, attention=False).observe(denoiser, calibration, run, 5)
    chosen = uniform(found, BitWidths.parse("w8a2"), [], {}, [])
    plan = freeze(denoiser, found, chosen, observed, rows, None, "model", "w8a2", tmp_path / "codes")
    weights = QuantWeights(tmp_path / "codes")

    def distances(refit: bool) -> dict[str, float]:
        refined, codes = refine_weights(denoiser, plan, weights, calibration, run, 5, 0, refit=refit)
        apart = {}
        for layer in refined.layers:
            parts = [
                torch.from_numpy(dequantize_weight(codes[f"{layer.name}#{index}"], segment.weight))
                for index, segment in enumerate(layer.segments)
            ]
            weight = denoiser.get_submodule(layer.name).get_parameter("weight").detach()
            apart[layer.name] = float((torch.cat(parts, dim=1) - weight).norm() / weight.norm())
        return apart

    moved, kept = distances(refit=True), distances(refit=False)
    assert all(kept[name] < 0.05 for name in kept), kept
    assert all(moved[name] > 2 * kept[name] for name in ("scaled", "joined")), (moved, kept)
    errors = dict(rounding_errors(denoiser, plan, {"scaled": (8,)}, calibration, run, 5, 0, refit=False))
    weight = denoiser.get_submodule("scaled").get_parameter("weight").detach()
    assert float(errors["scaled"][8].norm() / weight.norm()) == pytest.approx(kept["scaled"], rel=1e-3)
