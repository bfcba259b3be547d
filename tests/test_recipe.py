"""Recipes: what is merged, what is refused, and whether the refusal names the mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmqexport import recipes
from dmqexport.errors import RecipeError
from dmqexport.recipe import OPTIONS, Recipe, known_keys, load_recipe
from dmqexport.target import Target


def load(*assignments: str, path: Path | None = None, **options: Any) -> Recipe:
    return load_recipe(path, {"model": "m", **options}, assignments)


def test_later_wins(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: file\nbits: w8a8\nseed: 1\ncalibration: {rows: 5, size: 7}\n")
    recipe = load_recipe(path, {"model": None, "bits": "W4A8", "calibration.rows": 6}, ["calibration.rows=8"])
    assert (recipe.model, recipe.bits, recipe.seed) == ("file", "w4a8", 1)
    assert (recipe.calibration.rows, recipe.calibration.size) == (8, 7)


def test_round_trip(tmp_path: Path) -> None:
    recipe = load("quantization.overrides={conv_in: w8a8}", "quantization.keep_float=[a, b]", target="trt-rtx")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path, {}, []) == recipe
    assert recipe.target is Target.TRT_RTX


def test_yaml_holds_every_key() -> None:
    document = yaml.safe_load(load().to_yaml())
    for key in known_keys():
        value = document
        for part in key.split("."):
            value = value[part]


def test_every_option_is_a_key() -> None:
    assert set(OPTIONS) <= set(known_keys())


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "calibration:\nvalidation:\n  gates:\n"])
def test_empty_files_and_sections_are_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load(path=path) == load()


def test_null_turns_a_gate_off() -> None:
    assert load("validation.gates.eps_sqnr_db=null").validation.gates.eps_sqnr_db is None


@dataclass(frozen=True)
class Wrong:
    name: str
    says: tuple[str, ...]
    assignments: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


WRONG = [
    Wrong("too many bits", ("w9a4", "9 bits", "2 to 8", "for example w4a4"), options={"bits": "w9a4"}),
    Wrong("no activation bits", ("'w4'", "wNaM"), options={"bits": "w4"}),
    Wrong("no bits", ("'foo'", "wNaM"), options={"bits": "foo"}),
    Wrong("bits of a pattern", ("quantization.overrides", "conv*", "w9a9"), ("quantization.overrides={conv*: w9a9}",)),
    Wrong("misspelt section", ("'quantisation'", "did you mean 'quantization'"), ("quantisation.split_concat=true",)),
    Wrong("misspelt key", ("'calibration.row'", "did you mean 'calibration.rows'"), ("calibration.row=3",)),
    Wrong("key without its section", ("'rows'", "did you mean 'calibration.rows'"), ("rows=3",)),
    Wrong("nothing like it", ("'zzz'", "known keys and sections: ", "calibration"), ("zzz=3",)),
    Wrong("no value", ("'calibration.rows'", "key=value", "--set calibration.rows=20"), ("calibration.rows",)),
    Wrong("no key", ("'=3'", "key=value"), ("=3",)),
    Wrong("not YAML", ("quantization.overrides={a", "not YAML", "column"), ("quantization.overrides={a",)),
    Wrong("text for a number", ("calibration.rows", "whole number", "'abc'"), ("calibration.rows=abc",)),
    Wrong("fraction", ("calibration.rows", "whole number", "3.5"), ("calibration.rows=3.5",)),
    Wrong("YAML's yes", ("calibration.rows", "neither yes nor no"), ("calibration.rows=yes",)),
    Wrong("not a number", ("validation.gates.eps_sqnr_db", "finite"), ("validation.gates.eps_sqnr_db=.nan",)),
    Wrong("value for a section", ("'calibration'", "section"), ("calibration=3",)),
    Wrong("section for a value", ("'bits'", "expected text"), ("bits.x=3",)),
    Wrong("key below a value", ("'model.x'", "not a section"), ("model.x=3",)),
    Wrong("text for a list", ("quantization.keep_float", "list", "'conv_in'"), ("quantization.keep_float=conv_in",)),
    Wrong(
        "unknown target",
        ("--target", "'onnx', 'ort-cpu', 'trt-rtx', 'trt' or 'openvino'", "'tpu'"),
        options={"target": "tpu"},
    ),
    Wrong("option out of range", ("--rows", "calibration.rows", "greater", "got 0"), options={"calibration.rows": 0}),
    Wrong(
        "more work than there is",
        ("quantization.remainder_share", "1", "got 1.5"),
        ("quantization.remainder_share=1.5",),
    ),
    Wrong(
        "work below nothing", ("quantization.remainder_share", "0", "got -0.1"), ("quantization.remainder_share=-0.1",)
    ),
    Wrong("text for remainders", ("quantization.remainder", "list", "'conv_in'"), ("quantization.remainder=conv_in",)),
    Wrong("other schema", ("schema_version", "expected 1", "got 2"), ("schema_version=2",)),
    Wrong("no model", ("no model given", "-m"), options={"model": None}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_refusals(wrong: Wrong) -> None:
    with pytest.raises(RecipeError) as caught:
        load(*wrong.assignments, **wrong.options)
    for words in wrong.says:
        assert words in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1", "not YAML: expected ',' or ']'"),
        (b"- 1\n", "mapping of keys, got a list"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"model: 3\n1: 2\n", "expected text, got 3"),
        (b"!!python/object:os.system {}\n", "not YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {}, [])
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path, {}, [])


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_is_a_recipe_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name, {"model": "m"}, [])
    assert recipe.model == "m"
    assert recipes.find(name).read_text(encoding="utf-8").startswith("# ")
    assert load_recipe(name, {"model": "m", "bits": "w6a6"}, ["calibration.rows=3"]).calibration.rows == 3


def test_the_promised_names_are_shipped() -> None:
    assert {"fast", "default", "full", "dmq", "efficientdm", "dilatequant"} <= set(recipes.names())


def test_a_misspelt_recipe_name_teaches_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'dilatequan'.*did you mean 'dilatequant'") as caught:
        load_recipe("dilatequan", {"model": "m"}, [])
    assert "efficientdm" in (caught.value.hint or "")


def test_a_file_is_told_from_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fast").write_text("seed: 7\n")
    Path("mine").write_text("seed: 8\n")
    assert load_recipe("fast", {"model": "m"}, []).seed == 0
    assert load_recipe("./fast", {"model": "m"}, []).seed == 7
    assert load_recipe("mine", {"model": "m"}, []).seed == 8
    with pytest.raises(RecipeError, match=r"absent\.yaml cannot be read"):
        load_recipe("absent.yaml", {"model": "m"}, [])


def test_remainders_are_those_of_the_sample_unless_told() -> None:
    plain = load().quantization
    assert plain.remainder is None
    assert load("quantization.remainder=[]").quantization.remainder == ()
    assert load("quantization.remainder=[conv_in]", "quantization.remainder_share=1").quantization.remainder == (
        "conv_in",
    )
    assert load("quantization.remainder_share=0").quantization.remainder_share == 0


@pytest.mark.parametrize("value", ["true", "no", "1"])
def test_a_misspelt_key_is_told_as_such_whatever_its_value(value: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe key 'allocation\.remainder'"):
        load_recipe(None, {"model": "emoji"}, [f"allocation.remainder={value}"])
