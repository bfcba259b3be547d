"""Factors change nothing in float, are chosen by what they do, and arrive in the plan as they were chosen."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from torch import Tensor, nn

from calib import channel_scaling, scaling_samples
from calib.bit_allocation import uniform
from calib.channel_scaling import ChannelScaling, Method, ScalingSettings, choose_scaling
from calib.equalize import apply_folds, fold_sites
from calib.freeze import freeze
from calib.observer import Observer
from calib.probe import ProbeResult, probe
from calib.quantizer import simulate
from calib.range_search import quantization_error, quick_range, search_asymmetric
from calib.sampling import CalibrationSet
from calib.second_order import refine_weights
from calib.timestep_table import equal_groups
from calib.weight_dilation import scaled_columns
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import BitWidths
from dmqexport.quant_weights import QuantWeights

ROW_MAP = equal_groups(TIMESTEPS, 4)
METHODS = get_args(Method)
_CHOSEN: dict[tuple[ScalingSettings, str], ChannelScaling] = {}


class Outlying(nn.Module):
    """Layers of each kind whose inputs have channels of very different sizes, and a transformer-like norm → linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ParallelDenoiser()
        self.register_buffer("sizes", torch.tensor([1.0, 12.0, 0.2]).reshape(1, -1, 1, 1))
        self.register_buffer("widths", torch.tensor([1.0, 0.1, 8.0, 1.0, 20.0, 0.5]))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.inner(sample * self.sizes, timestep, encoder_hidden_states * self.widths)
        return output


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return Outlying().eval()


@pytest.fixture(scope="module")
def found(denoiser: nn.Module) -> ProbeResult:
    calibration = random_calibration(4)
    return probe(denoiser, lambda index: run_on(denoiser, calibration, index))


@pytest.fixture(autouse=True, scope="module")
def _little_work() -> Iterator[None]:
    """Fewer vectors and steps: what is tested is not how good the choice is on a real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_scaling, "_VECTORS", 96)
        patch.setattr(channel_scaling, "_LEARNING_STEPS", 10)
        yield


def choose(
    denoiser: nn.Module, found: ProbeResult, settings: ScalingSettings, bits: str = "w4a4", *, again: bool = False
) -> ChannelScaling:
    """The same choice is made once, unless `again`."""
    if (settings, bits) not in _CHOSEN or again:
        chosen = uniform(found, BitWidths.parse(bits), [], {}, [])
        _CHOSEN[settings, bits] = choose_scaling(
            denoiser, found, chosen, ROW_MAP, random_calibration(24), lambda batch: denoiser(**batch), 7, settings, 0
        )
    return _CHOSEN[settings, bits]


def call(denoiser: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = denoiser(**random_calibration(12, seed=5).inputs)
    return output


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_float_function_as_it_is(
    denoiser: nn.Module, found: ProbeResult, method: Method
) -> None:
    """Inputs divided, weight columns multiplied: at most 1e-5 of the output's range may differ."""
    before = call(denoiser)
    scaling = choose(denoiser, found, ScalingSettings(method, merge="always"))
    assert bool(scaling.factors) == (method != "none")
    handles: list[Any] = []
    original = {name: value.clone() for name, value in denoiser.state_dict().items()}
    try:
        for info in found.layers:
            layer = denoiser.get_submodule(info.name)
            axis = 1 if isinstance(layer, nn.Conv2d) else -1
            factors = [
                torch.from_numpy(
                    scaling.factors.get(f"{info.source}#{index}", np.ones(stop - start, np.float32)).copy()
                )
                for index, (start, stop) in enumerate(info.segments)
            ]
            factor = torch.cat(factors)
            with torch.no_grad():
                layer.weight.copy_(scaled_columns(layer.weight, factor))

            def divide(
                module: nn.Module, args: tuple[Tensor], factor: Tensor = factor, axis: int = axis
            ) -> tuple[Tensor]:
                return (args[0] / factor.reshape(-1, *([1] * (args[0].ndim - 2 if axis == 1 else 0))),)

            handles.append(layer.register_forward_pre_hook(divide))
        after = call(denoiser)
    finally:
        for handle in handles:
            handle.remove()
        denoiser.load_state_dict(original)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-5


@pytest.mark.parametrize("method", ["dilation", "dilation-symmetric", "capped-dilation", "dgq", "os+", "awq"])
def test_methods_that_only_dilate_never_go_below_one(denoiser: nn.Module, found: ProbeResult, method: Method) -> None:
    scaling = choose(denoiser, found, ScalingSettings(method, merge="always", cap=3.0))
    assert min(float(factor.min()) for factor in scaling.factors.values()) >= 1.0
    assert max(float(factor.max()) for factor in scaling.factors.values()) <= (
        3.0 if method == "capped-dilation" else 64
    )


def test_tensors_are_shared_and_halves_are_not(denoiser: nn.Module, found: ProbeResult) -> None:
    scaling = choose(denoiser, found, ScalingSettings("smoothquant", merge="always"))
    sizes = {key: len(factor) for key, factor in scaling.factors.items()}
    assert sizes["inner.conv#0"] == 3
    assert "inner.conv_shared#0" not in sizes, "it reads the tensor of conv"
    assert (sizes["inner.joined#0"], sizes["inner.joined#1"]) == (3, 2)


def test_factors_are_merged_only_where_they_lower_the_error(denoiser: nn.Module, found: ProbeResult) -> None:
    scaling = choose(denoiser, found, ScalingSettings("auto"))
    merged = {key: item for key, item in scaling.record["tensors"].items() if item["applied"] == "merged"}
    assert set(merged) == set(scaling.factors)
    assert merged
    assert all(item["output_error"] <= 0.97 for item in merged.values())
    # One channel is twelve times as large as another: what 4 bits lose in the small ones is what factors are for.
    assert merged["inner.conv#0"]["output_error"] < 0.85
    assert not choose(denoiser, found, ScalingSettings("auto", merge="never")).factors
    assert not choose(denoiser, found, ScalingSettings("auto"), bits="w4a16").factors


def test_auto_is_no_worse_than_what_it_chooses_from(denoiser: nn.Module, found: ProbeResult) -> None:
    auto = choose(denoiser, found, ScalingSettings("auto"))
    for method in ("dilation", "smoothquant", "os+"):
        single = choose(denoiser, found, ScalingSettings(method, merge="always", strength=0.4))
        for key, item in single.record["tensors"].items():
            chosen = auto.record["tensors"][key]
            if chosen["applied"] == "none":
                assert item["output_error"] > 0.97, "nothing was worth a table"
            else:
                assert chosen["output_error"] <= item["output_error"]


def test_the_choice_is_repeatable_and_memory_only_changes_the_passes(
    denoiser: nn.Module, found: ProbeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose(denoiser, found, ScalingSettings("auto"))
    monkeypatch.setattr(scaling_samples, "_MEMORY_BYTES", 1)
    second = choose(denoiser, found, ScalingSettings("auto"), again=True)
    assert first.record == second.record
    for key, factor in first.factors.items():
        np.testing.assert_array_equal(factor, second.factors[key])


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    from test_equalize import text_unet

    unet, inputs = text_unet()
    calibration = CalibrationSet(inputs, torch.arange(6), torch.zeros(6, dtype=torch.int64))

    def run(batch: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = unet(**batch, return_dict=False)[0]
        return output

    def run_once(index: int) -> Tensor:
        one = calibration.select(torch.tensor([0]))
        return run({**one, "timestep": one["timestep"] + index, "sample": one["sample"] + index})

    layers = probe(unet, run_once)
    bits = uniform(layers, BitWidths(4, 4), [], {}, [])
    scaling = choose_scaling(
        unet, layers, bits, equal_groups(1000, 2), calibration, run, 6, ScalingSettings("smoothquant"), 0
    )
    assert len(scaling.folds) == len(fold_sites(unet))
    scaling.save(tmp_path)
    loaded = ChannelScaling.load(tmp_path)
    assert loaded.record == scaling.record
    assert loaded.factors.keys() == scaling.factors.keys()
    before = run(inputs)
    apply_folds(unet, fold_sites(unet), loaded.folds, lambda: run(inputs))
    assert float((run(inputs) - before).abs().max() / before.abs().max()) <= 1e-5


def planned(
    denoiser: nn.Module, found: ProbeResult, scaling: ChannelScaling, folder: Path, refine: bool
) -> tuple[QuantPlan, QuantWeights]:
    bits = uniform(found, BitWidths(4, 4), [], {"inner.text": BitWidths(4, None)}, [])
    calibration = random_calibration(24)
    observer = Observer(found, ROW_MAP, 512, 0, False, scaling.factors)
    statistics = observer.observe(denoiser, calibration, lambda batch: denoiser(**batch), 8)
    plan = freeze(
        denoiser, found, bits, statistics, ROW_MAP, None, "model", "w4a4", folder / "codes", factors=scaling.factors
    )
    if refine:
        plan, codes = refine_weights(
            denoiser, plan, QuantWeights(folder / "codes"), calibration, lambda batch: denoiser(**batch), 8, 0
        )
        QuantWeights.save(folder / "codes", codes)
    return replace(plan, scaling=scaling.record), QuantWeights(folder / "codes")


@pytest.mark.parametrize("refine", [False, True], ids=["nearest", "second-order"])
def test_the_plan_has_the_factors_and_is_better_for_it(
    denoiser: nn.Module, found: ProbeResult, tmp_path: Path, refine: bool
) -> None:
    reference = call(denoiser)
    errors = []
    for name, scaling in (
        ("plain", ChannelScaling()),
        ("scaled", choose(denoiser, found, ScalingSettings("auto"))),
    ):
        (tmp_path / name).mkdir()
        plan, weights = planned(denoiser, found, scaling, tmp_path / name, refine)
        with simulate(denoiser, plan, weights):
            errors.append(float((call(denoiser) - reference).square().mean()))
    assert errors[1] < 0.7 * errors[0]
    assert plan.layer("inner.text").segments[0].activation is None, "weight-only layers have no table to put factors in"
    for info in found.layers:
        for index, segment in enumerate(plan.layer(info.name).segments):
            factor = scaling.factors.get(f"{info.source}#{index}")
            if segment.activation is not None and factor is not None:
                assert segment.activation.channel_factor is not None
                np.testing.assert_array_equal(segment.activation.channel_factor, factor)
    plan.save(tmp_path)
    assert QuantPlan.load(tmp_path).scaling == plan.scaling


def test_an_empty_calibration_set_is_refused(denoiser: nn.Module, found: ProbeResult) -> None:
    bits = uniform(found, BitWidths(4, 4), [], {}, [])
    empty = random_calibration(4).subset(4, 0)
    none = CalibrationSet(
        {name: value[:0] for name, value in empty.inputs.items()}, empty.trajectory[:0], empty.step[:0]
    )
    with pytest.raises(CalibrationError, match="calibration set is empty"):
        choose_scaling(denoiser, found, bits, ROW_MAP, none, lambda batch: None, 4, ScalingSettings(), 0)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_quick_range_is_nearly_as_good_as_the_searched_one(bits: int) -> None:
    values = torch.randn(6, 400, generator=torch.Generator().manual_seed(bits))
    values[3:] = nn.functional.silu(3 * values[3:])
    weights = torch.ones_like(values)
    best = search_asymmetric(values, weights, values.amin(dim=1), values.amax(dim=1), bits)
    scale, zero = quick_range(values, weights, bits)
    assert bool((quantization_error(values, weights, scale, zero, bits) <= 1.15 * best.error).all())
