"""Who gets how many bits, and that no pattern is silently ignored."""

from collections.abc import Mapping, Sequence

import pytest

from calib.bit_allocation import uniform
from calib.freeze import LayerBits
from calib.probe import LayerInfo, ProbeResult
from dmqexport.errors import RecipeError
from dmqexport.quant_plan import LayerOp
from dmqexport.quant_types import BitWidths

NAMES = ("conv_in", "down.0.conv", "down.1.conv", "mid.to_q", "conv_out")
W4A4 = BitWidths(4, 4)


def allocate(
    bits: BitWidths = W4A4,
    boundary: Sequence[str] = (),
    overrides: Mapping[str, BitWidths] | None = None,
    keep_float: Sequence[str] = (),
) -> dict[str, LayerBits]:
    layers = tuple(LayerInfo(name, LayerOp.CONV, ((0, 4),), name, True, 1, 1) for name in NAMES)
    return uniform(ProbeResult(layers, (), {}), bits, boundary, overrides or {}, keep_float)


def test_every_layer_gets_the_same_by_default() -> None:
    assert allocate() == dict.fromkeys(NAMES, LayerBits(W4A4))


def test_boundary_layers_get_8_bits_and_say_why() -> None:
    chosen = allocate(boundary=["conv_*"])
    assert chosen["conv_in"] == chosen["conv_out"] == LayerBits(BitWidths(8, 8), "boundary layer: 8 bits by name")
    assert chosen["down.0.conv"] == LayerBits(W4A4)


def test_boundary_layers_of_a_weight_only_plan_keep_float_activations() -> None:
    assert allocate(BitWidths(4, None), boundary=["conv_in"])["conv_in"].widths == BitWidths(8, None)


def test_the_last_override_that_matches_wins_over_earlier_ones_and_the_boundary() -> None:
    chosen = allocate(
        boundary=["conv_in"], overrides={"*conv*": BitWidths(6, 6), "down.1.*": BitWidths(3, 8), "*_in": W4A4}
    )
    assert chosen["conv_in"] == LayerBits(W4A4, "override '*_in'")
    assert chosen["down.0.conv"] == LayerBits(BitWidths(6, 6), "override '*conv*'")
    assert chosen["down.1.conv"] == LayerBits(BitWidths(3, 8), "override 'down.1.*'")
    assert chosen["mid.to_q"] == LayerBits(W4A4)


def test_keep_float_wins_over_everything() -> None:
    chosen = allocate(boundary=["conv_in"], overrides={"conv_in": W4A4}, keep_float=["conv_in"])
    assert chosen["conv_in"] == LayerBits(None, "kept in float by the recipe")


@pytest.mark.parametrize("label", ["boundary", "overrides", "keep_float"])
def test_a_pattern_that_matches_nothing_is_refused_and_names_are_shown(label: str) -> None:
    arguments: dict[str, object] = {label: {"Conv_*": W4A4} if label == "overrides" else ["Conv_*"]}
    with pytest.raises(RecipeError, match=rf"quantization.{label}: 'Conv_\*' matches no layer") as caught:
        allocate(**arguments)  # type: ignore[arg-type]
    assert "conv_in, down.0.conv, down.1.conv" in str(caught.value.hint)
