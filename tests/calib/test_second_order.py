"""Second-order rounding: better than nearest in what it minimises, exact where nothing is to be gained."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from torch import Tensor

from calib.bit_allocation import uniform
from calib.freeze import freeze
from calib.observer import Observer
from calib.probe import probe
from calib.range_search import search_weight
from calib.second_order import fit_least_squares, refine_weights, round_second_order
from calib.timestep_table import equal_groups
from dmqexport.quant_plan import LayerQuant, QuantPlan, QuantWeights
from dmqexport.quant_types import BitWidths


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
