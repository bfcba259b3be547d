"""Which activations get a second product: those that the recipe names, then the best error for their work."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calib.freeze import LayerBits
from calib.probe import LayerInfo
from dmqexport.errors import RecipeError
from dmqexport.models.loading import LoadedModel
from dmqexport.pipeline_calibrate import Calibration
from dmqexport.pipeline_checks import check_recipe
from dmqexport.pipeline_remainder import Remaindering
from dmqexport.quant_plan import LayerOp
from dmqexport.quant_types import BitWidths
from dmqexport.recipe import load_recipe


def info(name: str, source: str, macs: int) -> LayerInfo:
    return LayerInfo(name, LayerOp.LINEAR, ((0, 4),), source, True, 16, macs)


#: q and k read one tensor; the whole work is 1000.
LAYERS = (
    info("first", "first", 50), info("q", "q", 100), info("k", "q", 100), info("small", "small", 10),
    info("large", "large", 600), info("last", "last", 140),
)  # fmt: skip
ERRORS = {"first": 9.0, "q": 1.0, "k": 3.0, "small": 1.0, "large": 6.0, "last": 0.7}


def spend(share: float, errors: dict[str, float] | None = None, layers: tuple[LayerInfo, ...] = LAYERS) -> Any:
    """What is chosen, were `first` named by the recipe."""
    fake = SimpleNamespace(
        probe_result=SimpleNamespace(layers=layers),
        recipe=SimpleNamespace(quantization=SimpleNamespace(remainder_share=share)),
    )
    return Remaindering._spend(cast("Remaindering", fake), ERRORS if errors is None else errors, {"first"})


def test_the_best_error_for_its_work_comes_first() -> None:
    assert spend(1.0)["chosen"] == ["small", "q", "k", "large", "last"]
    assert spend(0.01)["chosen"] == ["small"]
    assert spend(0.0)["chosen"] == []


def test_readers_of_one_tensor_come_together_or_not_at_all() -> None:
    """A second product for one of them would cost as much of its work, and the tensor would be quantized twice."""
    assert spend(0.209)["chosen"] == ["small", "last"], "what does not fit leaves its place to what does"
    assert spend(0.21)["chosen"] == ["small", "q", "k"]


def test_gains_are_shares_of_the_error_and_of_the_work() -> None:
    found = spend(0.21)
    assert found["share"] == pytest.approx(0.21)
    assert set(found["gains"]) == {"q", "small", "large", "last"}, "what is named is chosen without"
    assert found["gains"]["q"] == {"error": pytest.approx(4 / sum(ERRORS.values())), "work": pytest.approx(0.2)}


def test_errors_of_nothing_are_shares_of_nothing() -> None:
    found = spend(0.01, dict.fromkeys(ERRORS, 0.0))
    assert {gain["error"] for gain in found["gains"].values()} == {0.0}


def test_layers_whose_error_was_not_measured_count_as_work_alone() -> None:
    """Those of other bits, and those in float: no remainder, but their share of a call."""
    found = spend(0.02, {"small": 1.0})
    assert found["chosen"] == ["small"]
    assert found["share"] == pytest.approx(0.01)


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1e3), st.integers(0, 3)), min_size=1, max_size=12),
    st.floats(0, 1),
)
@settings(deadline=None, derandomize=True)
def test_the_share_is_never_exceeded(drawn: list[tuple[int, float, int]], share: float) -> None:
    layers = tuple(info(f"l{index}", f"s{source}", macs) for index, (macs, _, source) in enumerate(drawn))
    errors = {f"l{index}": 1e-6 + error for index, (_, error, _) in enumerate(drawn)}
    found = spend(share, errors, layers)
    assert found["share"] <= share * (1 + 1e-12)
    sources = {item.source for item in layers if item.name in found["chosen"]}
    assert {item.name for item in layers if item.source in sources} == set(found["chosen"])


def named(chosen: tuple[str, ...] | None, bits: dict[str, str]) -> tuple[str, ...]:
    patterns = ("conv_in",) if chosen is None else chosen
    fake = SimpleNamespace(
        recipe=SimpleNamespace(quantization=SimpleNamespace(remainder=chosen)), remainder_patterns=patterns
    )
    layers = {name: LayerBits(BitWidths.parse(text), "") for name, text in bits.items()}
    layers["float"] = LayerBits(None, "kept in float")
    return Calibration.named_remainders(cast("Calibration", fake), layers)


def test_named_remainders_are_those_of_8_bits() -> None:
    bits = {"conv_in": "w8a8", "conv_mid": "w4a8", "conv_4": "w4a4", "light": "w4a16"}
    assert named(None, bits) == ("conv_in",)
    assert named(("conv_*",), bits) == ("conv_in", "conv_mid")
    assert named((), bits) == ()
    assert named(None, {"conv_in": "w4a4"}) == (), "the family's layers may have any bits"


@pytest.mark.parametrize("pattern", ["conv_4", "light", "float", "nothing"])
def test_a_pattern_of_the_recipe_without_8_bit_activations_is_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match=f"quantization.remainder: '{pattern}' matches no layer with 8-bit") as caught:
        named((pattern,), {"conv_in": "w8a8", "conv_4": "w4a4", "light": "w4a16"})
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("bits", "extra", "refused"),
    [
        ("w4a4", (), True),
        ("w4a4", ("quantization.overrides={mid*: w4a8}",), False),
        ("w4a4", ("allocation.mixed=true",), False),
        ("w4a4", ("allocation.mixed=true", "allocation.activation_bits=[3, 4]"), True),
        ("w8a8", (), False),
        ("w8a8", ("quantization.overrides={mid*: w8a4}",), True),
        ("w4a16", (), True),
    ],
)
def test_a_pattern_that_no_8_bits_can_match_is_refused_before_calibration(
    bits: str, extra: tuple[str, ...], refused: bool
) -> None:
    recipe = load_recipe(None, {"model": "emoji", "bits": bits}, ["quantization.remainder=[mid*]", *extra])
    parts = nn.ModuleDict({"conv_in": nn.Conv2d(4, 4, 1), "mid": nn.Linear(4, 4)})
    model = SimpleNamespace(
        num_train_timesteps=1000, denoiser=parts, name="a model", family=SimpleNamespace(boundary=("conv_in",)),
        default_prompts=(),
    )  # fmt: skip
    with pytest.raises(RecipeError, match="no layer with 8-bit") if refused else nullcontext():
        check_recipe(recipe, cast("LoadedModel", model))
