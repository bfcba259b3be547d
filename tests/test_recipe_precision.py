"""What `--precision` cannot give is refused with its reason, before anything is calibrated."""

import pytest

from dmqexport.errors import RecipeError
from dmqexport.recipe import Recipe, load_recipe


def recipe(*assignments: str, bits: str = "w4a4", target: str = "trt-rtx") -> Recipe:
    options = {"model": "emoji", "bits": bits, "target": target}
    return load_recipe(None, options, [f"lowering.{text}" for text in assignments])


@pytest.mark.parametrize(
    ("precision", "bits", "float_type"),
    [
        ("int8", "w8a8", "fp32"),
        ("int8", "w4a16", "fp32"),
        ("int4-weight-only", "w4a16", "fp32"),
        ("fp8", "w4a4", "fp32"),
        ("best", "w8a8", "fp16"),
    ],
)
def test_what_a_plan_can_carry(precision: str, bits: str, float_type: str) -> None:
    assert recipe(f"precision={precision}", bits=bits).lowering.float_type == float_type
    assert recipe(f"precision={precision}", "compute_type=bf16", bits=bits).lowering.float_type == "bf16"


@pytest.mark.parametrize(
    ("precision", "bits", "words"),
    [
        ("nvfp4", "w4a4", "5 and 7 among them"),
        ("fp8", "w8a8", "E4M3 has the integers up to 16"),
        ("fp8", "w4a16", "the plan is w4a16"),
        ("int4-weight-only", "w4a4", "products of integers"),
        ("int4-weight-only", "w8a16", "--bits w4a16 plans weights alone"),
    ],
)
def test_what_it_cannot_carry(precision: str, bits: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(f"precision={precision}", bits=bits)
    assert f"--precision {precision}" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["precision=best", "compute_type=fp16", "refit=true", "hardware=ampere-plus"])
def test_other_targets_have_no_such_choice(key: str) -> None:
    with pytest.raises(RecipeError, match=r"is TensorRT's, the target is ort-cpu"):
        recipe(key, target="ort-cpu")


@pytest.mark.parametrize("target", ["onnx", "openvino", "trt-rtx"])
def test_kernels_are_chosen_for_one_runtime(target: str) -> None:
    with pytest.raises(RecipeError, match=f"chooses kernels of ONNX Runtime, the target is {target}"):
        recipe("tune=host", target=target)
    assert recipe("tune=host", target="ort-cpu").lowering.tune == "host"


def test_an_engine_is_tuned_for_a_batch_that_it_accepts() -> None:
    with pytest.raises(RecipeError, match="opt_batch 9 is above"):
        recipe("opt_batch=9")
    assert recipe("max_batch=1").lowering.opt_batch == 2, "the default yields to the largest"
