"""The contract on disk: what is saved is what is loaded, and anything else is refused."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmqexport.errors import BundleError
from dmqexport.quant_plan import (
    PLAN_ARRAYS,
    PLAN_JSON,
    Allocation,
    AttentionQuant,
    LayerOp,
    LayerQuant,
    QuantPlan,
    Segment,
)
from dmqexport.quant_types import ActivationQuant, WeightQuant
from dmqexport.quant_weights import QuantWeights


def random_activation(
    random: np.random.Generator, rows: int, bits: int | None = None, channels: int | None = None
) -> ActivationQuant:
    width = int(random.integers(2, 9)) if bits is None else bits
    count = int(random.choice([1, rows]))
    factor = None if channels is None or random.random() < 0.5 else np.exp(random.uniform(-2, 2, channels))
    zero_point = random.integers(0, 2**width, count)
    gain = None if channels is None or count == 1 or random.random() < 0.5 else random.uniform(0.5, 2, count)
    return ActivationQuant.from_rows(width, np.exp(random.uniform(-8, 2, count)), zero_point, factor, gain)


def random_plan(seed: int) -> QuantPlan:
    """A plan with every feature a plan can have."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 51))
    layers = []
    for number in range(int(random.integers(1, 5))):
        bits = int(random.integers(2, 9))
        channels = int(random.integers(1, 6))
        edges = [0, 3, 8][: int(random.integers(2, 4))]
        segments = tuple(
            Segment(
                start,
                stop,
                WeightQuant(
                    bits,
                    np.exp(random.uniform(-8, 2, channels)),
                    np.full(channels, 128) if bits == 8 else random.integers(0, 2**bits, channels),
                ),
                None if number == 1 else random_activation(random, rows, channels=stop - start),
            )
            for start, stop in pairwise(edges)
        )
        op = LayerOp.CONV if number % 2 else LayerOp.LINEAR
        rotation = 4 if op is LayerOp.LINEAR and edges[-1] == 8 else None
        reason = "a reason – with a dash"
        layers.append(LayerQuant(f"down.{number}.layer", op, segments, channels * 8, reason, rotation=rotation))
    operands = {name: random_activation(random, rows, 8) for name in ("query", "key", "probability", "value")}
    return QuantPlan(
        model_fingerprint="ab" * 32,
        bits="w4a4",
        row_map=random.integers(0, rows, 1000),
        rows=rows,
        layers=tuple(layers),
        attentions=(AttentionQuant("mid.attn", **operands),) if random.random() < 0.5 else (),
        float_layers={"emb": "embedding lookup", "other": ""},
        allocation=Allocation("uniform", "w4a4", float(random.uniform(2, 8)), None, {"note": "x", "list": [1, 2.5]}),
    )


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_save_and_load_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("plan")
    plan = random_plan(seed)
    plan.save(folder)
    loaded = QuantPlan.load(folder)
    assert loaded.fingerprint == plan.fingerprint
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in plan.layers]
    for (name, left), (loaded_name, right) in zip(plan.activations(), loaded.activations(), strict=True):
        assert name == loaded_name
        assert left.same_as(right)
    for left, right in zip(plan.layers, loaded.layers, strict=True):
        assert (left.op, left.parameters, left.reason) == (right.op, right.parameters, right.reason)
        assert (left.weight_bits, left.activation_bits) == (right.weight_bits, right.activation_bits)
        for one, other in zip(left.segments, right.segments, strict=True):
            assert (one.start, one.stop) == (other.start, other.stop)
            np.testing.assert_array_equal(one.weight.scale, other.weight.scale)
            np.testing.assert_array_equal(one.weight.zero_point, other.weight.zero_point)
    np.testing.assert_array_equal(loaded.row_map, plan.row_map)
    assert loaded.float_layers == plan.float_layers
    assert loaded.allocation == plan.allocation
    assert not loaded.row_map.flags.writeable
    # The same plan gives the same bytes: stages can be cached by content.
    again = tmp_path_factory.mktemp("again")
    loaded.save(again)
    for file in (PLAN_JSON, PLAN_ARRAYS):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_fingerprint_sees_every_part() -> None:
    plan = random_plan(3)
    layer = plan.layers[0]
    segment = layer.segments[0]
    assert segment.activation is not None
    nudged = np.nextafter(segment.activation.scale, np.float32(np.inf))
    activation = ActivationQuant(
        segment.activation.bits, nudged, segment.activation.zero_point, segment.activation.scale_ref
    )
    weight = WeightQuant(
        segment.weight.bits, np.nextafter(segment.weight.scale, np.float32(0)), segment.weight.zero_point
    )

    def with_segment(changed: Segment) -> QuantPlan:
        return replace(plan, layers=(replace(layer, segments=(changed, *layer.segments[1:])), *plan.layers[1:]))

    row_map = plan.row_map.copy()
    row_map[7] = (row_map[7] + 1) % plan.rows
    table = np.full(plan.rows, 0.5), np.full(plan.rows, 3), 0.5
    plain, gained = ActivationQuant(4, *table), ActivationQuant(4, *table, gain=np.full(plan.rows, 1.5))
    variants = [
        with_segment(replace(segment, activation=activation)),
        with_segment(replace(segment, activation=plain)),
        with_segment(replace(segment, activation=gained)),
        with_segment(replace(segment, weight=weight)),
        replace(plan, row_map=row_map),
        replace(plan, model_fingerprint="cd" * 32),
        replace(plan, bits="w8a8"),
        replace(plan, float_layers={"emb": "another reason"}),
        replace(plan, layers=plan.layers[:-1]),
    ]
    fingerprints = {variant.fingerprint for variant in variants} | {plan.fingerprint}
    assert len(fingerprints) == len(variants) + 1


@pytest.mark.parametrize("file", [PLAN_JSON, PLAN_ARRAYS])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_damaged_files_are_refused(tmp_path: Path, file: str, damage: str) -> None:
    random_plan(1).save(tmp_path)
    path = tmp_path / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "garbage": b"\xff" * 200}[damage])
    with pytest.raises(BundleError, match=r"quantization plan cannot be read") as caught:
        QuantPlan.load(tmp_path)
    assert caught.value.__cause__ is not None


@given(st.integers(0, 10_000))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_plan_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, position: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    random_plan(2).save(folder)
    for file in (PLAN_JSON, PLAN_ARRAYS):
        path = folder / file
        content = path.read_bytes()
        path.write_bytes(content[: position % (len(content) - 2)])
        with pytest.raises(BundleError):
            QuantPlan.load(folder)
        path.write_bytes(content)


def test_another_schema_is_refused_with_a_remedy(tmp_path: Path) -> None:
    random_plan(1).save(tmp_path)
    document = json.loads((tmp_path / PLAN_JSON).read_text(encoding="utf-8"))
    document["schema_version"] = 99
    (tmp_path / PLAN_JSON).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match="schema 99, this version reads 1") as caught:
        QuantPlan.load(tmp_path)
    assert caught.value.hint is not None


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{}"])
def test_json_that_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    random_plan(1).save(tmp_path)
    (tmp_path / PLAN_JSON).write_text(content, encoding="utf-8")
    with pytest.raises(BundleError):
        QuantPlan.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rows", 0), ("layers", [{}]), ("attentions", None), ("allocation", {}), ("layers", [{"name": "x"}])],
)
def test_json_that_lies_is_refused(tmp_path: Path, key: str, value: object) -> None:
    random_plan(1).save(tmp_path)
    document = json.loads((tmp_path / PLAN_JSON).read_text(encoding="utf-8"))
    document[key] = value
    (tmp_path / PLAN_JSON).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError):
        QuantPlan.load(tmp_path)


def test_impossible_plans_are_refused() -> None:
    plan = random_plan(4)
    with pytest.raises(ValueError, match="non-empty vector"):
        replace(plan, row_map=np.zeros(0))
    with pytest.raises(ValueError, match="names rows outside"):
        replace(plan, row_map=np.array([0, plan.rows]))
    with pytest.raises(ValueError, match="names rows outside"):
        replace(plan, row_map=np.array([-1, 0]))
    with pytest.raises(ValueError, match="listed twice"):
        replace(plan, layers=(plan.layers[0], plan.layers[0]))
    weight = WeightQuant(4, [1.0], [0])
    two_rows = ActivationQuant.from_rows(4, [1.0, 2.0], [0, 0])
    layer = LayerQuant("a", LayerOp.LINEAR, (Segment(0, 4, weight, two_rows),), 4)
    with pytest.raises(ValueError, match="a#0: 2 rows, the table has 3"):
        QuantPlan("", "", np.array([0, 1, 2]), 3, (layer,))
    with pytest.raises(ValueError, match="start at channel 0"):
        LayerQuant("a", LayerOp.LINEAR, (), 4)
    with pytest.raises(ValueError, match="blocks of 8 channels cannot be rotated"):
        LayerQuant("a", LayerOp.LINEAR, (Segment(0, 4, weight, None),), 4, rotation=8)
    with pytest.raises(ValueError, match="blocks of 0 channels cannot be rotated"):
        LayerQuant("a", LayerOp.LINEAR, (Segment(0, 4, weight, None),), 4, rotation=0)
    with pytest.raises(ValueError, match="blocks of 3 channels cannot be rotated"):
        LayerQuant("a", LayerOp.LINEAR, (Segment(0, 6, weight, None),), 6, rotation=3)
    with pytest.raises(ValueError, match="blocks of 2 channels cannot be rotated"):
        LayerQuant("a", LayerOp.CONV, (Segment(0, 4, weight, None),), 4, rotation=2)
    with pytest.raises(ValueError, match="start at channel 0"):
        LayerQuant("a", LayerOp.LINEAR, (Segment(1, 4, weight, None),), 4)
    with pytest.raises(ValueError, match="gap at channel 2"):
        LayerQuant("a", LayerOp.LINEAR, (Segment(0, 2, weight, None), Segment(3, 4, weight, None)), 4)
    factors = ActivationQuant.from_rows(4, [1.0], [0], [1.0, 2.0])
    with pytest.raises(ValueError, match="a: 2 channel factors for 3 input channels"):
        LayerQuant("a", LayerOp.LINEAR, (Segment(0, 3, weight, factors),), 3)
    plain = ActivationQuant.from_rows(4, [1.0], [0])
    with pytest.raises(ValueError, match=r"attention#key: .* cannot have channel factors"):
        AttentionQuant("attention", plain, factors, plain, plain)
    gained = ActivationQuant.from_rows(4, [1.0, 2.0], [0, 0], gain=[1.5, 1.5])
    with pytest.raises(ValueError, match=r"attention#value: .* cannot have channel factors or a gain"):
        AttentionQuant("attention", plain, plain, plain, gained)


def remaining_plan() -> QuantPlan:
    """A convolution over two halves of which the second has a remainder, and a linear layer with rows that has one."""
    weight = WeightQuant(4, [1.0, 0.5], [3, 8])
    plain, centered = ActivationQuant.from_rows(8, [0.5], [100]), ActivationQuant.from_rows(8, [0.5], [128])
    rows = ActivationQuant.from_rows(8, [0.5, 0.25], [128, 128], [1.0, 2.0])
    half = LayerQuant("half", LayerOp.CONV, (Segment(0, 1, weight, plain), Segment(1, 3, weight, centered, True)), 6)
    whole = LayerQuant("whole", LayerOp.LINEAR, (Segment(0, 2, weight, rows, True),), 4)
    other = LayerQuant("other", LayerOp.LINEAR, (Segment(0, 2, weight, rows),), 4)
    return QuantPlan("ab" * 32, "w4a8", np.array([0, 1]), 2, (half, whole, other))


def test_remainders_round_trip(tmp_path: Path) -> None:
    plan = remaining_plan()
    plan.save(tmp_path)
    loaded = QuantPlan.load(tmp_path)
    assert loaded.fingerprint == plan.fingerprint
    flags = [[segment.remainder for segment in layer.segments] for layer in loaded.layers]
    assert flags == [[False, True], [True], [False]]
    assert [layer.has_remainder for layer in loaded.layers] == [True, True, False]
    for (_, left), (_, right) in zip(plan.activations(), loaded.activations(), strict=True):
        assert left.same_as(right)


def test_documents_from_before_remainders_load_without_any(tmp_path: Path) -> None:
    """Their segments lack the key; plans without remainders are written as they were then, to the same fingerprint."""
    plan = random_plan(6)
    plan.save(tmp_path)
    assert "remainder" not in (tmp_path / PLAN_JSON).read_text(encoding="utf-8")
    assert not any(layer.has_remainder for layer in QuantPlan.load(tmp_path).layers)
    remaining_plan().save(tmp_path)
    document = json.loads((tmp_path / PLAN_JSON).read_text(encoding="utf-8"))
    written = [segment for layer in document["layers"] for segment in layer["segments"]]
    assert [segment.pop("remainder", None) for segment in written] == [None, True, True, None]
    (tmp_path / PLAN_JSON).write_text(json.dumps(document), encoding="utf-8")
    assert not any(layer.has_remainder for layer in QuantPlan.load(tmp_path).layers)


def test_fingerprint_sees_a_remainder() -> None:
    plan = remaining_plan()
    changed = []
    for position, layer in enumerate(plan.layers[1:], start=1):
        (segment,) = layer.segments
        flipped = replace(layer, segments=(replace(segment, remainder=not segment.remainder),))
        layers = (*plan.layers[:position], flipped, *plan.layers[position + 1 :])
        changed.append(replace(plan, layers=layers).fingerprint)
    assert len({plan.fingerprint, *changed}) == 3


def test_impossible_remainders_are_refused() -> None:
    weight = WeightQuant(4, [1.0], [3])
    with pytest.raises(ValueError, match="a: float activations leave no remainder"):
        LayerQuant("a", LayerOp.LINEAR, (Segment(0, 2, weight, None, True),), 2)
    for bits, zero_point in ((4, 8), (8, 127)):
        activation = ActivationQuant.from_rows(bits, [0.5], [zero_point])
        with pytest.raises(ValueError, match="only centered 8-bit codes"):
            LayerQuant("a", LayerOp.LINEAR, (Segment(0, 2, weight, activation, True),), 2)


def test_a_remainder_counts_as_8_bits_more() -> None:
    half, whole, other = remaining_plan().layers
    assert (half.mean_activation_bits, whole.mean_activation_bits, other.mean_activation_bits) == (16, 16, 8)
    assert whole.activation_bits == 8, "what products multiply"


def test_segments_of_one_layer_share_their_weight_bits() -> None:
    """The file keeps one width a layer: a plan that holds two must not be saved as if it held one."""
    segments = (Segment(0, 2, WeightQuant(4, [1.0], [3]), None), Segment(2, 4, WeightQuant(6, [1.0], [3]), None))
    with pytest.raises(ValueError, match="weight bits"):
        LayerQuant("a", LayerOp.CONV, segments, 4)


def test_layer_is_found_by_name() -> None:
    plan = random_plan(5)
    assert plan.layer(plan.layers[-1].name) is plan.layers[-1]
    with pytest.raises(KeyError):
        plan.layer("nowhere")


def test_row_ranges_tell_the_timesteps_of_every_row_in_use() -> None:
    plan = QuantPlan("", "", np.array([2, 2, 0, 0, 2]), 3, ())
    assert plan.row_ranges() == [(0, 2, 3), (2, 0, 4)]


def test_weight_codes_round_trip(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    codes = {
        "a.b#0": random.integers(-128, 128, (3, 5, 3, 3)).astype(np.int8),
        "a.b#1": random.integers(-8, 8, (3, 2, 3, 3)).astype(np.int8).transpose(0, 1, 3, 2),
    }
    QuantWeights.save(tmp_path / "codes", codes)
    loaded = QuantWeights(tmp_path / "codes")
    for index in (0, 1):
        np.testing.assert_array_equal(loaded.codes("a.b", index), codes[f"a.b#{index}"])
    assert "a.b#1" in loaded
    assert "a.b#2" not in loaded


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 7, b"\xff" * 100])
def test_unreadable_weight_codes_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "codes"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="weight codes cannot be read"):
        QuantWeights(path)


def test_truncated_weight_codes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    QuantWeights.save(path, {"a#0": np.zeros((8, 8), dtype=np.int8)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BundleError, match="weight codes cannot be read"):
        QuantWeights(path)


def test_codes_of_a_layer_that_is_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    QuantWeights.save(path, {"a#0": np.zeros((2, 2), dtype=np.int8)})
    with pytest.raises(BundleError, match="b#0"):
        QuantWeights(path).codes("b", 0)


def test_codes_written_one_by_one_make_the_file_that_is_saved_at_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    codes = {
        f"{name}#{index}": random.integers(-8, 8, shape).astype(np.int8)
        for name, index, shape in (("b", 0, (3, 5)), ("a.weight", 0, (2, 3, 3, 3)), ("b", 1, (7, 1)))
    }
    QuantWeights.save(tmp_path / "whole", codes)
    with QuantWeights.writing(tmp_path / "parts", {name: array.shape for name, array in codes.items()}) as write:
        for name, array in codes.items():
            write(name, array)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
