"""From statistics to a plan: shared quantizers, codes that fit their scales, a full account of what is float."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calib_fixture import TIMESTEPS, ParallelDenoiser, random_calibration, run_on
from torch import nn

from calib.bit_allocation import uniform
from calib.freeze import RowBits, freeze, with_row_bits
from calib.observer import ActivationStatistics, Observer
from calib.probe import ProbeResult, probe
from calib.timestep_table import equal_groups
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import CENTERED_ZERO_POINT, BitWidths, dequantize_weight
from dmqexport.quant_weights import QuantWeights

ROW_MAP = equal_groups(TIMESTEPS, 5)
W4A4 = BitWidths(4, 4)
Calibrated = tuple[nn.Module, ProbeResult, dict[str, ActivationStatistics]]


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    torch.manual_seed(0)
    denoiser, calibration = ParallelDenoiser().eval(), random_calibration(20)
    found = probe(denoiser, lambda index: run_on(denoiser, calibration, index))
    observer = Observer(found, ROW_MAP, 512, seed=0, attention=True)
    return denoiser, found, observer.observe(denoiser, calibration, lambda inputs: denoiser(**inputs), 5)


def make(
    calibrated: Calibrated,
    folder: Path,
    bits: BitWidths = W4A4,
    overrides: dict[str, BitWidths] | None = None,
    keep_float: list[str] | None = None,
    attention_bits: int | None = None,
    remainders: tuple[str, ...] = (),
) -> QuantPlan:
    denoiser, found, statistics = calibrated
    chosen = uniform(found, bits, ["conv"], overrides or {}, keep_float or [])
    return freeze(
        denoiser, found, chosen, statistics, ROW_MAP, attention_bits, "model", str(bits), folder / "codes",
        remainders=remainders,
    )  # fmt: skip


def test_readers_of_one_tensor_share_a_quantizer_only_at_equal_bits(calibrated: Calibrated, tmp_path: Path) -> None:
    def activations(plan: QuantPlan) -> dict[str, object]:
        return dict(plan.activations())

    same = activations(make(calibrated, tmp_path, overrides={"conv": W4A4}))
    assert same["conv#0"] is same["conv_shared#0"]
    other = activations(make(calibrated, tmp_path))
    assert other["conv#0"] is not other["conv_shared#0"]
    assert "joined#1" in other


def test_rows_follow_the_timestep_only_where_the_tensor_does(calibrated: Calibrated, tmp_path: Path) -> None:
    plan = make(calibrated, tmp_path)
    rows = {name: activation.rows for name, activation in plan.activations()}
    assert plan.rows == 5
    assert rows["text#0"] == 1
    assert rows["scaled#0"] == 5
    scale = dict(plan.activations())["scaled#0"].scale
    assert bool(np.all(np.diff(scale) > 0))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_on_disk_are_the_weights(calibrated: Calibrated, tmp_path: Path, bits: int) -> None:
    denoiser = calibrated[0]
    plan = make(calibrated, tmp_path, BitWidths(bits, None), {"conv": BitWidths(bits, None)})
    weights = QuantWeights(tmp_path / "codes")
    for layer in plan.layers:
        assert (layer.weight_bits, layer.activation_bits) == (bits, None)
        weight = denoiser.get_submodule(layer.name).weight.detach().numpy()
        for index, segment in enumerate(layer.segments):
            codes = weights.codes(layer.name, index)
            part = weight[:, segment.start : segment.stop] if len(layer.segments) > 1 else weight
            assert codes.shape == part.shape
            error = np.sqrt(np.mean((dequantize_weight(codes, segment.weight) - part) ** 2) / np.mean(part**2))
            assert error < {2: 0.6, 3: 0.3, 4: 0.15, 5: 0.08, 6: 0.04, 7: 0.02, 8: 0.01}[bits]


def test_every_layer_is_either_planned_or_float_with_a_reason(calibrated: Calibrated, tmp_path: Path) -> None:
    denoiser = calibrated[0]
    plan = make(calibrated, tmp_path, keep_float=["t*"])
    planned = {layer.name for layer in plan.layers}
    parametric = {name for name, module in denoiser.named_modules() if hasattr(module, "weight")}
    assert planned | set(plan.float_layers) == parametric | {"attention (attention matmuls)"}
    assert not planned & set(plan.float_layers)
    assert all(plan.float_layers.values())
    assert plan.float_layers["text"] == "kept in float by the recipe"
    assert "fused attention kernel" in plan.float_layers["attention (attention matmuls)"]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_attention_quantizers_fit_the_two_matmuls(calibrated: Calibrated, tmp_path: Path, bits: int) -> None:
    plan = make(calibrated, tmp_path, attention_bits=bits)
    (attention,) = plan.attentions
    assert attention.name == "attention"
    assert attention.probability.bits == 8
    assert bool(np.all(attention.probability.zero_point == 0))
    for operand in (attention.query, attention.key, attention.value):
        assert operand.bits == bits
        assert not operand.constants().has_shift


def test_averages_weigh_parameters_and_work(calibrated: Calibrated, tmp_path: Path) -> None:
    plan = make(calibrated, tmp_path)
    found = {info.name: info for info in calibrated[1].layers}
    parameters = {layer.name: found[layer.name].parameters for layer in plan.layers}
    weight = sum(layer.weight_bits * parameters[layer.name] for layer in plan.layers) / sum(parameters.values())
    assert plan.allocation.average_weight_bits == pytest.approx(weight, abs=1e-6)
    macs = sum(found[layer.name].macs for layer in plan.layers)
    work = sum(found[layer.name].macs * (layer.activation_bits or 0) for layer in plan.layers) / macs
    assert plan.allocation.average_activation_bits == pytest.approx(work, abs=1e-6)
    weight_only = make(calibrated, tmp_path, BitWidths(4, None))
    assert weight_only.allocation.average_activation_bits is None


def test_freezing_twice_gives_the_same_plan(calibrated: Calibrated, tmp_path: Path) -> None:
    first = make(calibrated, tmp_path, attention_bits=8)
    codes = (tmp_path / "codes").read_bytes()
    assert make(calibrated, tmp_path, attention_bits=8).fingerprint == first.fingerprint
    assert (tmp_path / "codes").read_bytes() == codes


def test_minmax_is_the_wider_and_worse_baseline(calibrated: Calibrated, tmp_path: Path) -> None:
    denoiser, found, statistics = calibrated
    chosen = uniform(found, W4A4, [], {}, [])
    plain = freeze(
        denoiser, found, chosen, statistics, ROW_MAP, 8, "model", "w4a4", tmp_path / "plain", search="minmax"
    )
    best = dict(make(calibrated, tmp_path).activations())
    scales = dict(plain.activations())
    assert set(best) <= set(scales)
    assert all(bool(np.all(scales[name].scale >= best[name].scale * 0.95)) for name in best if best[name].bits == 4)
    assert any(bool(np.all(scales[name].scale > best[name].scale * 1.05)) for name in best if best[name].bits == 4)


def test_unbiased_tables_have_a_gain_where_rows_are_rescaled_anyway(calibrated: Calibrated, tmp_path: Path) -> None:
    denoiser, found, statistics = calibrated
    chosen = uniform(found, W4A4, ["conv"], {}, [])
    plan = freeze(
        denoiser, found, chosen, statistics, ROW_MAP, 4, "model", "w4a4", tmp_path / "codes", search="unbiased"
    )
    tables = dict(plan.activations())
    least = dict(make(calibrated, tmp_path, attention_bits=4).activations())
    assert tables["conv#0"].same_as(least["conv#0"])  # 8 bits
    assert tables["text#0"].gain is None  # one row
    scaled = tables["scaled#0"]
    assert scaled.gain is not None
    assert bool(np.all(scaled.scale > least["scaled#0"].scale))
    observed = statistics["scaled#0"]
    for row in range(scaled.rows):
        steps = observed.values[row].numpy() / scaled.scale[row]
        low = -int(scaled.zero_point[row])
        told = np.clip(np.rint(steps), low, low + 15) * scaled.scale[row] * scaled.gain[row]
        values, weights = observed.values[row].numpy(), observed.weights[row].numpy()
        assert (weights * values * told).sum() == pytest.approx((weights * values**2).sum(), rel=1e-4)
    attention = plan.attentions[0]
    for operand in ("query", "key", "probability", "value"):  # neither wider nor with a gain
        assert tables[f"{attention.name}#{operand}"].same_as(least[f"{attention.name}#{operand}"])

    offsets, share = np.array([-2, -1, 0, 1, 3]), np.full(5, 0.2, dtype=np.float32)
    uneven = dict(with_row_bits(plan, found, statistics, RowBits(offsets, share), "unbiased").activations())
    gain = uneven["scaled#0"].gain
    assert gain is not None
    assert gain[0] > gain[4]
    plan.save(tmp_path)
    for (name, left), (_, right) in zip(plan.activations(), QuantPlan.load(tmp_path).activations(), strict=True):
        assert left.same_as(right), name


def test_rows_get_the_bits_they_are_given(calibrated: Calibrated, tmp_path: Path) -> None:
    even = make(calibrated, tmp_path)
    offsets, share = np.array([3, 0, -1, -2, -9]), np.full(5, 0.2, dtype=np.float32)
    plan = with_row_bits(even, calibrated[1], calibrated[2], RowBits(offsets, share))
    widths = {name: activation.widths.tolist() for name, activation in plan.activations()}
    assert widths["scaled#0"] == [7, 4, 3, 2, 2]
    assert set(widths["conv#0"]) == {8}  # boundary layers keep their own form
    assert widths["text#0"] == [4]  # and what ignores the timestep has one row
    assert widths["joined#0"] == widths["scaled#0"]

    again = with_row_bits(even, calibrated[1], calibrated[2], RowBits(np.zeros(5, dtype=np.int64), share))
    for (name, left), (_, right) in zip(even.activations(), again.activations(), strict=True):
        assert left.same_as(right), name
    plan.save(tmp_path)
    for (name, left), (_, right) in zip(plan.activations(), QuantPlan.load(tmp_path).activations(), strict=True):
        assert left.same_as(right), name


W8A8 = BitWidths(8, 8)


def test_a_remainder_belongs_to_a_centered_quantizer_with_room(calibrated: Calibrated, tmp_path: Path) -> None:
    """A quarter more than anything that was seen, of either sign, row by row."""
    plan = make(calibrated, tmp_path, W8A8, remainders=("conv", "scaled", "joined", "text"))
    sources = {info.name: info.source for info in calibrated[1].layers}
    for name in ("conv", "scaled", "joined", "text"):
        layer = plan.layer(name)
        assert "two int8 products" in layer.reason
        for index, segment in enumerate(layer.segments):
            assert segment.remainder
            assert segment.activation is not None
            assert set(segment.activation.zero_point.tolist()) == {CENTERED_ZERO_POINT}
            observed = calibrated[2][f"{sources[name]}#{index}"]
            extreme = torch.maximum(observed.high, -observed.low).numpy()
            reached = np.broadcast_to(segment.activation.scale * 127, extreme.shape)
            np.testing.assert_allclose(reached[extreme > 0], 1.25 * extreme[extreme > 0], rtol=1e-5)
            assert bool(np.all(reached >= extreme))
    assert plan.layer("scaled").segments[0].activation is not None
    assert not plan.layer("time").has_remainder
    assert "two int8 products" not in plan.layer("time").reason


def test_only_8_bit_activations_have_a_remainder(calibrated: Calibrated, tmp_path: Path) -> None:
    names = ("conv", "conv_shared", "text", "joined")
    plan = make(calibrated, tmp_path, remainders=names, overrides={"text": BitWidths(4, None)})
    assert [layer.name for layer in plan.layers if layer.has_remainder] == ["conv"], "the boundary alone has 8 bits"
    plain = make(calibrated, tmp_path, overrides={"text": BitWidths(4, None)})
    for name in names[1:]:
        for left, right in zip(plan.layer(name).segments, plain.layer(name).segments, strict=True):
            assert (left.activation is None) == (right.activation is None)
            assert left.activation is None or (
                right.activation is not None and left.activation.same_as(right.activation)
            )
        assert plan.layer(name).reason == plain.layer(name).reason


def test_readers_with_a_remainder_share_their_quantizer_among_themselves(
    calibrated: Calibrated, tmp_path: Path
) -> None:
    both = dict(make(calibrated, tmp_path, W8A8, remainders=("conv", "conv_shared")).activations())
    assert both["conv#0"] is both["conv_shared#0"]
    one = dict(make(calibrated, tmp_path, W8A8, remainders=("conv",)).activations())
    assert not one["conv#0"].same_as(one["conv_shared#0"])


def test_a_row_that_saw_nothing_but_zero_takes_the_widest_range(calibrated: Calibrated, tmp_path: Path) -> None:
    denoiser, found, statistics = calibrated
    source = next(info.source for info in found.layers if info.name == "scaled")
    seen = statistics[f"{source}#0"]
    low, high = seen.low.clone(), seen.high.clone()
    low[0], high[0] = 0.0, 0.0
    changed = {**statistics, f"{source}#0": replace(seen, low=low, high=high)}
    plan = make((denoiser, found, changed), tmp_path, W8A8, remainders=("scaled",))
    activation = plan.layer("scaled").segments[0].activation
    assert activation is not None
    assert activation.scale[0] == activation.scale.max()


def test_bits_of_rows_leave_remainders_alone(calibrated: Calibrated, tmp_path: Path) -> None:
    plain = make(calibrated, tmp_path, overrides={"scaled": W8A8}, remainders=("conv", "scaled"))
    row_bits = RowBits(np.array([3, 0, -1, -2, -2]), np.full(5, 0.2, dtype=np.float32))
    plan = with_row_bits(plain, calibrated[1], calibrated[2], row_bits)
    for name in ("conv", "scaled"):
        (before,), (after,) = plain.layer(name).segments, plan.layer(name).segments
        assert after.remainder
        assert after.activation is before.activation
    assert len(set(plan.layer("joined").segments[0].activation.widths.tolist())) > 1  # type: ignore[union-attr]


def test_a_tensor_may_have_bits_of_its_own_in_every_row(calibrated: Calibrated, tmp_path: Path) -> None:
    own = {"scaled": np.array([2, 3, 4, 5, 6]), "text": np.array([7])}
    row_bits = RowBits(np.array([1, 0, 0, 0, -1]), np.full(5, 0.2, dtype=np.float32), own)
    denoiser, found, statistics = calibrated
    chosen = uniform(found, W4A4, [], {}, [])
    plan = freeze(
        denoiser, found, chosen, statistics, ROW_MAP, None, "model", "w4a4", tmp_path / "codes", row_bits=row_bits
    )
    widths = {name: activation.widths.tolist() for name, activation in plan.activations()}
    assert widths["scaled#0"] == [2, 3, 4, 5, 6]
    assert widths["text#0"] == [7]
    assert widths["joined#0"] == [5, 4, 4, 4, 3]  # as all others
    macs = {info.name: info.macs for info in found.layers}
    mean = {"scaled": 4.0, "text": 7.0}
    average = sum(macs[name] * mean.get(name, 4.0) for name in macs if name in {at.name for at in plan.layers})
    assert plan.allocation.average_activation_bits == pytest.approx(average / sum(macs.values()), abs=1e-6)


def test_a_remainder_counts_twice_in_the_average(calibrated: Calibrated, tmp_path: Path) -> None:
    found = {info.name: info for info in calibrated[1].layers}
    plan = make(calibrated, tmp_path, W8A8, remainders=("conv", "text"))
    macs = sum(found[layer.name].macs for layer in plan.layers)
    twice = found["conv"].macs + found["text"].macs
    assert plan.allocation.average_activation_bits == pytest.approx(8 * (macs + twice) / macs, abs=1e-6)
    average = sum(found[layer.name].macs * (layer.mean_activation_bits or 0) for layer in plan.layers) / macs
    assert plan.allocation.average_activation_bits == pytest.approx(average, abs=1e-6)
