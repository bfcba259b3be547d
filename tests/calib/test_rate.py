"""What bits cost, counted by hand on two layers that read one tensor."""

import json
from pathlib import Path

import pytest

from calib.candidates import WidthPair
from calib.probe import LayerInfo
from calib.rate import (
    LatencyModel,
    Rate,
    average_activation_bits,
    average_weight_bits,
    joint_bits,
    latency,
    occupied_bits,
    stored_bytes,
)
from dmqexport.errors import RecipeError
from dmqexport.quant_plan import LayerOp

LAYERS = (
    LayerInfo("a", LayerOp.LINEAR, ((0, 4),), "a", True, 100, 1000),
    LayerInfo("b", LayerOp.LINEAR, ((0, 4),), "a", True, 300, 3000),
)
PAIRS = dict.fromkeys((WidthPair(3, 6), WidthPair(8, 8)), 1.0)
CURVES = {info.name: PAIRS for info in LAYERS}
NARROW = {"a": WidthPair(3, 6), "b": WidthPair(3, 6)}
MIXED = {"a": WidthPair(8, 8), "b": WidthPair(3, 6)}
CONTAINERS = (4, 8)


@pytest.mark.parametrize(("bits", "stored"), [(2, 4), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8)])
def test_a_width_occupies_the_next_container(bits: int, stored: int) -> None:
    assert occupied_bits(bits, CONTAINERS, Rate.REALISABLE) == stored
    assert occupied_bits(bits, CONTAINERS, Rate.NOMINAL) == bits
    assert occupied_bits(bits, (8,), Rate.REALISABLE) == 8


def test_averages_weigh_weights_by_count_and_activations_by_multiplications() -> None:
    weights = average_weight_bits(LAYERS, CURVES, 4.0, CONTAINERS, Rate.NOMINAL)
    assert weights.used(NARROW) == pytest.approx(3.0)
    assert weights.used(MIXED) == pytest.approx((8 * 100 + 3 * 300) / 400)
    assert average_weight_bits(LAYERS, CURVES, 4.0, CONTAINERS, Rate.REALISABLE).used(NARROW) == pytest.approx(4.0)
    assert average_activation_bits(LAYERS, CURVES, 4.0).used(MIXED) == pytest.approx((8 * 1000 + 6 * 3000) / 4000)


def test_remainders_of_8_bits_count_as_8_more() -> None:
    """For layers that may have them; for others no activation bits are a float activation, which is not counted."""
    curves = {name: {**pairs, WidthPair(8, None): 0.5} for name, pairs in CURVES.items()}
    resource = average_activation_bits(LAYERS, curves, 8.0, {"a"})
    assert resource.used({**MIXED, "a": WidthPair(8, None)}) == pytest.approx((16 * 1000 + 6 * 3000) / 4000)
    assert resource.used(NARROW) == pytest.approx(6.0)
    assert resource.used({**MIXED, "b": WidthPair(8, None)}) == pytest.approx(8 * 1000 / 4000)
    alone = {"a": {WidthPair(8, None): 0.0}, "b": PAIRS}
    counted = average_activation_bits(LAYERS, alone, 8.0, {"a"})
    assert counted.used({"a": WidthPair(8, None), "b": WidthPair(3, 6)}) == pytest.approx((16000 + 18000) / 4000)


def test_two_products_take_twice_the_time() -> None:
    curves = {name: {WidthPair(8, 8): 1.0, WidthPair(8, None): 0.5} for name in CURVES}
    found = latency(LAYERS, curves, LatencyModel(), 1.0, CONTAINERS, {"a"})
    assert found.cost["a"][WidthPair(8, None)] == pytest.approx(2 * found.cost["a"][WidthPair(8, 8)])
    assert found.cost["b"][WidthPair(8, None)] != pytest.approx(2 * found.cost["b"][WidthPair(8, 8)])


def test_a_joint_average_counts_a_shared_tensor_once() -> None:
    resource = joint_bits(LAYERS, CURVES, {"a": 200}, 4.0, CONTAINERS, Rate.NOMINAL)
    assert resource.used(NARROW) == pytest.approx((3 * 400 + 6 * 200) / 600)


def test_bytes_are_codes_in_containers_scales_and_what_stays_in_float() -> None:
    resource = stored_bytes(LAYERS, CURVES, 50, {"a": 10, "b": 20}, 1e6, CONTAINERS, Rate.REALISABLE)
    assert resource.used(NARROW) == pytest.approx(400 * 4 / 8 + 5 * 30 + 4 * 50)
    assert resource.used(MIXED) == pytest.approx(100 + 300 * 4 / 8 + 5 * 30 + 4 * 50)


def test_latency_follows_the_formula_and_a_table_replaces_it(tmp_path: Path) -> None:
    model = LatencyModel(gmacs=1.0, gbytes=1.0)
    found = latency(LAYERS, CURVES, model, 1.0, CONTAINERS)
    assert found.used(NARROW) == pytest.approx(4000 / 1e6 + 200 / 1e6)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"b": {"w3a6": 0.5}}))
    found = latency(LAYERS, CURVES, LatencyModel.load(str(table)), 1.0, CONTAINERS)
    assert found.cost["b"][WidthPair(3, 6)] == 0.5
    assert found.cost["b"][WidthPair(8, 8)] < 0.5


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 3}', '{"a": {"w4a4": "slow"}}'])
def test_a_latency_table_of_another_shape_is_refused_with_an_example(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match="cannot be used") as caught:
        LatencyModel.load(str(path))
    assert "w4a8" in str(caught.value.hint)
