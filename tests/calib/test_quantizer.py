"""The simulation swaps layers for as long as its block lasts, and follows the timestep the denoiser is called with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from torch import Tensor, nn

from calib.bit_allocation import uniform
from calib.freeze import freeze
from calib.observer import Observer
from calib.probe import ProbeResult, probe
from calib.quantizer import ActivationQuantizer, QuantizedLayer, RowContext, simulate
from calib.timestep_table import equal_groups
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import (
    ActivationQuant,
    BitWidths,
    WeightQuant,
    dequantize_weight,
    quantize_weight,
    remainder_name,
)
from dmqexport.quant_weights import QuantWeights

ROW_MAP = equal_groups(TIMESTEPS, 5)


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return ParallelDenoiser().eval()


@pytest.fixture(scope="module")
def found(denoiser: nn.Module) -> ProbeResult:
    calibration = random_calibration(4)
    return probe(denoiser, lambda index: run_on(denoiser, calibration, index))


def frozen(
    denoiser: nn.Module,
    found: ProbeResult,
    folder: Path,
    bits: str,
    attention_bits: int | None = 8,
    remainders: tuple[str, ...] = (),
) -> tuple[QuantPlan, QuantWeights]:
    folder.mkdir(exist_ok=True)
    observer = Observer(found, ROW_MAP, 512, seed=0, attention=True)
    statistics = observer.observe(denoiser, random_calibration(20), lambda inputs: denoiser(**inputs), 5)
    chosen = uniform(found, BitWidths.parse(bits), ["conv"], {}, [])
    plan = freeze(
        denoiser, found, chosen, statistics, ROW_MAP, attention_bits, "model", bits, folder / "codes",
        remainders=remainders,
    )  # fmt: skip
    return plan, QuantWeights(folder / "codes")


def call(denoiser: nn.Module, entries: int = 6) -> Tensor:
    with torch.no_grad():
        output: Tensor = denoiser(**random_calibration(entries, seed=9).inputs)
    return output


def structure(denoiser: nn.Module) -> list[tuple[str, int, int, int]]:
    """Names, identities and numbers of hooks of every module."""
    return [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in denoiser.named_modules()
    ]


def test_modules_come_back_when_the_block_ends(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w4a4")
    before, reference, state = structure(denoiser), call(denoiser), list(denoiser.state_dict())
    with simulate(denoiser, plan, weights):
        assert isinstance(denoiser.get_submodule("conv"), QuantizedLayer)
        assert not torch.equal(call(denoiser), reference)
    assert structure(denoiser) == before
    assert list(denoiser.state_dict()) == state
    assert torch.equal(call(denoiser), reference)


def test_modules_come_back_after_an_exception(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w4a4")
    before, reference = structure(denoiser), call(denoiser)

    def fail_within() -> None:
        with simulate(denoiser, plan, weights):
            denoiser(torch.zeros(1, 5, 8, 8), torch.tensor([0]), torch.zeros(1, 2, 6))

    with pytest.raises(RuntimeError):
        fail_within()
    assert structure(denoiser) == before
    assert torch.equal(call(denoiser), reference)


def test_modules_come_back_when_the_plan_does_not_fit(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w4a4")
    stranger = replace(plan.layers[-1], name="nowhere.layer")
    before = structure(denoiser)
    with (
        pytest.raises(CalibrationError, match=r"'nowhere.layer', which this model does not have"),
        simulate(denoiser, replace(plan, layers=(*plan.layers[:-1], stranger)), weights),
    ):
        pass
    assert structure(denoiser) == before


def test_a_call_without_a_timestep_is_refused(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w4a4")
    with (
        simulate(denoiser, plan, weights),
        pytest.raises(CalibrationError, match="'sample' and 'timestep'"),
    ):
        denoiser(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("timestep", [-1, TIMESTEPS, 10**6])
def test_a_timestep_outside_the_table_is_refused(timestep: int) -> None:
    context = RowContext(torch.from_numpy(ROW_MAP.copy()))
    with pytest.raises(CalibrationError, match=f"timestep {timestep} outside the table's 0 to {TIMESTEPS - 1}"):
        context.set_timestep(torch.tensor([0, timestep] if timestep > 0 else [5, timestep]), 2)


def test_more_bits_are_nearer_to_float(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    reference = call(denoiser, 20)
    errors = []
    for bits in ("w2a2", "w4a4", "w6a6", "w8a8", "w8a16"):
        (tmp_path / bits).mkdir()
        plan, weights = frozen(denoiser, found, tmp_path / bits, bits, None if bits == "w8a16" else 8)
        with simulate(denoiser, plan, weights):
            errors.append(float((call(denoiser, 20) - reference).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 1e-3 * float(reference.square().mean())


def test_scalar_and_batched_timesteps_are_the_same(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w4a4")
    inputs = random_calibration(3, seed=4).inputs
    with torch.no_grad(), simulate(denoiser, plan, weights):
        results = [
            denoiser(inputs["sample"], timestep, encoder_hidden_states=inputs["encoder_hidden_states"])
            for timestep in (torch.full((3,), 17), torch.tensor([17]), torch.tensor(17))
        ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_codes_are_recorded_under_the_names_of_the_plan(
    denoiser: nn.Module, found: ProbeResult, tmp_path: Path
) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w4a4")
    with simulate(denoiser, plan, weights) as context:
        context.codes = {}
        call(denoiser)
        assert set(context.codes) == {name for name, _ in plan.activations()}
        for name, activation in plan.activations():
            codes = context.codes[name]
            assert codes.dtype == torch.int8
            if activation.bits < 8:
                assert int(codes.min()) >= -int(activation.zero_point.max())
                assert int(codes.max()) <= 2**activation.bits - 1 - int(activation.zero_point.min())


def test_a_remainder_makes_16_bits_of_8_and_has_codes_of_its_own(
    denoiser: nn.Module, found: ProbeResult, tmp_path: Path
) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w8a8", remainders=("conv", "joined", "time", "text"))
    plain, other = frozen(denoiser, found, tmp_path / "plain", "w8a8")
    own = {f"{layer.name}#{index}" for layer in plan.layers for index, part in enumerate(layer.segments)
           if part.remainder}  # fmt: skip
    assert len(own) == 5
    with simulate(denoiser, plan, weights) as context:
        context.codes = {}
        call(denoiser)
    assert set(context.codes) == {name for name, _ in plan.activations()} | {remainder_name(name) for name in own}
    for name in own:
        codes = context.codes[remainder_name(name)]
        assert codes.dtype == torch.int8
        assert int(codes.min()) >= -127
        assert int(codes.max()) > 64

    def error(chosen: QuantPlan, codes: QuantWeights, name: str) -> float:
        """Of one layer, given what a weight of 8 bits computes without any rounding of its input."""
        inputs = random_calibration(6, seed=9).inputs["sample"]
        base = denoiser.get_submodule(name)
        assert isinstance(base, nn.Conv2d)
        context = RowContext(torch.from_numpy(ROW_MAP.copy()))
        context.set_timestep(random_calibration(6, seed=9).inputs["timestep"], 6)
        layer, float_layer = chosen.layer(name), chosen.layer(name).segments[0].weight
        weight = torch.from_numpy(dequantize_weight(codes.codes(name, 0), float_layer))
        exact = F.conv2d(inputs, weight, base.bias, padding=base.padding)
        with torch.no_grad():
            wrong = QuantizedLayer(base, layer, codes, context)(inputs) - exact
        return float(wrong.abs().max() / exact.detach().abs().max())

    assert error(plan, weights, "conv") < 1e-4
    assert error(plain, other, "conv") > 1e-3


def test_each_sample_is_quantized_with_the_row_of_its_timestep() -> None:
    context = RowContext(torch.tensor([0, 1, 1]))
    quantizer = ActivationQuantizer("x", ActivationQuant.from_rows(4, [1.0, 0.25], [0, 8]), context)
    context.set_timestep(torch.tensor([0, 2, 1]), 3)
    values = torch.tensor([[-3.0, 0.6, 40.0]]).repeat(3, 1)
    returned = quantizer.rescale(quantizer(values))
    torch.testing.assert_close(returned[0], torch.tensor([0.0, 1.0, 15.0]))
    torch.testing.assert_close(returned[1], torch.tensor([-2.0, 0.5, 1.75]))
    assert torch.equal(returned[1], returned[2])
    with pytest.raises(CalibrationError, match="x: batch 2 but 3 timesteps"):
        quantizer(values[:2])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 3, 3, stride=2, padding=(1, 2)), (2, 4, 7, 6)),
        (nn.Conv2d(4, 6, (3, 1), dilation=2, groups=2, bias=False), (2, 4, 7, 6)),
        (nn.Linear(4, 3), (2, 4)),
        (nn.Linear(4, 3, bias=False), (2, 5, 4)),
    ],
    ids=["strided", "grouped", "flat", "tokens"],
)
@pytest.mark.parametrize("zero_point", [128, 10])
def test_fine_quantizers_leave_the_layer_as_it_is(
    layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], zero_point: int, tmp_path: Path
) -> None:
    """8 bits that represent input and weight exactly: padding, stride, groups and bias must be the layer's."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-10, 100, shape, generator=generator).float() / 16
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-100, 100, layer.weight.shape, generator=generator).float() / 32)
    qparams = WeightQuant(8, np.full(layer.weight.shape[0], 1 / 32), np.full(layer.weight.shape[0], 128))
    QuantWeights.save(tmp_path / "codes", {"a#0": quantize_weight(layer.weight.detach().numpy(), qparams)})
    activation = ActivationQuant.from_rows(8, [1 / 16, 1 / 16], [zero_point, zero_point])
    op = LayerOp.CONV if isinstance(layer, nn.Conv2d) else LayerOp.LINEAR
    plan = LayerQuant("a", op, (Segment(0, 4, qparams, activation),), 1)
    context = RowContext(torch.tensor([0]), torch.tensor([0, 0]))
    with torch.no_grad():
        quantized = QuantizedLayer(layer, plan, QuantWeights(tmp_path / "codes"), context)(values)
        torch.testing.assert_close(quantized, layer(values), rtol=0, atol=1e-4)


def test_attention_without_a_plan_is_untouched(denoiser: nn.Module, found: ProbeResult, tmp_path: Path) -> None:
    plan, weights = frozen(denoiser, found, tmp_path, "w8a16", None)
    with simulate(denoiser, replace(plan, layers=()), weights):
        simulated = call(denoiser)
    assert torch.equal(simulated, call(denoiser))


def test_attention_keeps_the_scale_it_is_called_with() -> None:
    class Scaled(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            heads = sample.unsqueeze(1)
            return F.scaled_dot_product_attention(heads, heads, heads, scale=2.0)

    from calib.quantizer import QuantizedAttention
    from dmqexport.quant_plan import AttentionQuant

    fine = ActivationQuant.from_rows(8, [1 / 32], [128])
    plan = AttentionQuant("", fine, fine, ActivationQuant.from_rows(8, [1 / 255], [0]), fine)
    heads = torch.randn((1, 2, 6, 4), generator=torch.Generator().manual_seed(0))
    attention = QuantizedAttention(plan, RowContext(torch.tensor([0])))
    expected = F.scaled_dot_product_attention(heads, heads, heads, scale=2.0)
    torch.testing.assert_close(attention(heads, heads, heads, {"scale": 2.0}), expected, rtol=0, atol=0.05)


def test_every_constant_moves_with_the_module() -> None:
    """A CUDA tensor divided by a scalar that stayed on the CPU is multiplied by its reciprocal: other codes on ties."""
    qparams = ActivationQuant.from_rows(4, [0.1, 0.3], [3, 4])
    quantizer = ActivationQuantizer("x", qparams, RowContext(torch.tensor([0]))).to("meta")
    constants = {name: value for name, value in vars(quantizer).items() if isinstance(value, Tensor)}
    constants.update(quantizer.named_buffers())
    assert "scale_ref" in constants
    assert {name for name, value in constants.items() if value.device.type != "meta"} == set()
