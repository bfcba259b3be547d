"""The probe: what can be quantized, what is shared, what depends on the timestep, and why the rest stays in float."""

import pytest
import torch
import torch.nn.functional as F
from calib_fixture import ParallelDenoiser, random_calibration, run_on
from torch import Tensor, nn

from calib.probe import LayerInfo, ModuleStack, ProbeResult, probe
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerOp


@pytest.fixture(scope="module")
def found() -> ProbeResult:
    torch.manual_seed(0)
    denoiser, calibration = ParallelDenoiser().eval(), random_calibration(4)
    return probe(denoiser, lambda index: run_on(denoiser, calibration, index))


def by_name(found: ProbeResult) -> dict[str, LayerInfo]:
    return {layer.name: layer for layer in found.layers}


def test_layers_come_in_execution_order(found: ProbeResult) -> None:
    assert [layer.name for layer in found.layers] == ["conv", "conv_shared", "scaled", "joined", "time", "text"]
    assert [layer.op for layer in found.layers] == [LayerOp.CONV] * 4 + [LayerOp.LINEAR] * 2


def test_readers_of_one_tensor_share_a_source(found: ProbeResult) -> None:
    sources = {name: layer.source for name, layer in by_name(found).items()}
    assert sources == {
        "conv": "conv", "conv_shared": "conv", "scaled": "scaled", "joined": "joined", "time": "time", "text": "text",
    }  # fmt: skip


def test_a_reader_of_a_concat_has_one_segment_a_part(found: ProbeResult) -> None:
    layers = by_name(found)
    assert layers["joined"].segments == ((0, 3), (3, 5))
    assert {name for name, layer in layers.items() if len(layer.segments) > 1} == {"joined"}
    assert layers["text"].segments == ((0, 6),)


def test_only_what_the_timestep_reaches_depends_on_it(found: ProbeResult) -> None:
    # `sample` differs between the two forwards as it does between two steps of a trajectory.
    assert {name for name, layer in by_name(found).items() if not layer.timestep_dependent} == {"text"}


def test_sizes_and_work(found: ProbeResult) -> None:
    layers = by_name(found)
    assert (layers["conv"].parameters, layers["conv"].macs) == (4 * 3 * 9, 4 * 3 * 9 * 63)
    assert (layers["text"].parameters, layers["text"].macs) == (24, 24 * 5)
    assert (layers["time"].parameters, layers["time"].macs) == (12, 12)


def test_attentions_are_found_by_the_module_that_calls_them(found: ProbeResult) -> None:
    assert found.attentions == ("attention",)


def test_what_stays_in_float_has_a_reason(found: ProbeResult) -> None:
    assert dict(found.unsupported) == {
        "never": "never ran during the forward",
        "twice": "called 2 times in one forward: its uses may need different ranges",
        "lookup": "embedding lookup: no multiplication to quantize",
        "volume": "Conv1d is not a supported operator",
    }


def test_the_probe_leaves_no_hook_behind() -> None:
    denoiser, calibration = ParallelDenoiser().eval(), random_calibration(2)
    probe(denoiser, lambda index: run_on(denoiser, calibration, index))
    with pytest.raises(RuntimeError, match="on purpose"):
        probe(denoiser, raise_on_purpose)
    for module in denoiser.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def raise_on_purpose(index: int) -> None:
    raise RuntimeError("on purpose")


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(CalibrationError, match="nothing to quantize"):
        probe(nn.Identity(), lambda index: None)


class Toy(nn.Module):
    """Two layers and whatever `connect` does with them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


def probe_toy(toy: nn.Module, *shape: int) -> ProbeResult:
    inputs = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    return probe(toy.eval(), lambda index: toy(inputs[index : index + 1]))


class InPlaceBetween(Toy):
    def forward(self, tensor: Tensor) -> Tensor:
        hidden = tensor * 2
        return self.first(hidden) + self.second(F.relu_(hidden))


def test_a_tensor_changed_in_place_is_another_tensor() -> None:
    """The second layer never sees a negative value: the first layer's statistics are not its own."""
    layers = by_name(probe_toy(InPlaceBetween(nn.Linear(4, 4), nn.Linear(4, 4)), 4))
    assert layers["second"].source == "second"


class ConcatThenInPlace(Toy):
    def forward(self, tensor: Tensor) -> Tensor:
        return self.second(F.relu_(torch.cat([self.first(tensor), tensor], dim=1)))


def test_a_concat_changed_in_place_is_no_concat_any_more() -> None:
    """In the graph a Relu stands between the Concat and the convolution, so that it cannot be split."""
    layers = by_name(probe_toy(ConcatThenInPlace(nn.Conv2d(3, 3, 1), nn.Conv2d(6, 3, 1)), 3, 4, 4))
    assert layers["second"].segments == ((0, 6),)


class TwoReadersOfAConcat(Toy):
    def forward(self, tensor: Tensor) -> Tensor:
        joined = torch.cat([tensor, tensor * 2], dim=1)
        return self.first(joined) + self.second(joined)


def test_a_grouped_reader_of_a_concat_lends_its_source_to_nobody_with_other_segments() -> None:
    """Statistics are kept a segment of the source: a source with fewer segments than its reader has none to lend."""
    layers = by_name(probe_toy(TwoReadersOfAConcat(nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 1)), 3, 4, 4))
    assert layers["first"].segments == ((0, 6),)
    for layer in layers.values():
        assert layer.segments == layers[layer.source].segments


def test_a_linear_layer_is_not_split_along_an_axis_it_does_not_contract() -> None:
    """torch.cat along axis 1 of [batch, heads, tokens, channels] joins heads, a Linear contracts channels."""
    layers = by_name(probe_toy(TwoReadersOfAConcat(nn.Linear(5, 4), nn.Linear(5, 4)), 3, 4, 5))
    assert layers["first"].segments == ((0, 5),)


class TwoAttentions(Toy):
    def forward(self, tensor: Tensor) -> Tensor:
        heads = self.first(tensor).unsqueeze(1)
        once = F.scaled_dot_product_attention(heads, heads, heads)
        return self.second(F.scaled_dot_product_attention(once, heads, heads).squeeze(1))


def test_a_module_that_attends_twice_stays_in_float() -> None:
    """Its name stands for four matmuls: two ranges cannot serve them, and the graph would bind the wrong pair."""
    found = probe_toy(TwoAttentions(nn.Linear(4, 4), nn.Linear(4, 4)), 3, 4)
    assert found.attentions == ()
    assert "2 times" in found.unsupported[""]


class MaskedAttention(Toy):
    def forward(self, tensor: Tensor) -> Tensor:
        heads = self.first(tensor).unsqueeze(1)
        return self.second(F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).squeeze(1))


def test_masked_attention_stays_in_float() -> None:
    found = probe_toy(MaskedAttention(nn.Linear(4, 4), nn.Linear(4, 4)), 3, 4)
    assert found.attentions == ()
    assert found.unsupported[""] == "masked attention stays in float"


class Sequence(Toy):
    def forward(self, tensor: Tensor) -> Tensor:
        return self.second(self.first(tensor))


def test_a_convolution_that_does_not_pad_with_zeros_stays_in_float() -> None:
    """Simulation pads with zeros; a circular convolution would silently become another operator."""
    circular = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    found = probe_toy(Sequence(circular, nn.Conv2d(3, 3, 1)), 3, 4, 4)
    assert "circular" in found.unsupported["first"]
    assert [layer.name for layer in found.layers] == ["second"]


def test_the_module_stack_survives_an_exception() -> None:
    toy = Sequence(nn.Linear(2, 2), nn.Linear(3, 3))
    with ModuleStack(toy) as stack:
        with pytest.raises(RuntimeError):
            toy(torch.zeros(1, 2))
        assert stack.current == ""
    assert not toy._forward_hooks


def test_a_tensor_of_repeated_values_depends_on_the_timestep_too() -> None:
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(nn.functional.interpolate(x, scale_factor=2.0))
            return result

    model = Upsampling()
    found = probe(model, lambda index: model(torch.full((1, 2, 4, 4), 0.5 + index)))
    assert found.layers[0].timestep_dependent
