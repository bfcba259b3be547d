"""Ablations: what the table of methods means, what is run, kept and averaged, and what a page shows of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dmqexport.ablate import METRICS, Ablation, Outcome, Run, failures, plan_runs, run_key, summarize
from dmqexport.ablation_table import Method, choose, load_methods
from dmqexport.errors import RecipeError
from dmqexport.recipe import load_recipe
from dmqexport.report.ablation import best_values, cell_text, save_strip, write_ablation_page
from tests.command_line import SMALL, dmqexport

TABLE = """
common: {quantization: {attention_bits: null}}
templates:
  plain: {recipe: {quantization: {rounding: nearest}, calibration: {rows: 1}}}
groups:
  simple:
    coarse: {title: Coarse, like: plain, recipe: {quantization: {range: minmax}}}
    finer: {title: Finer, source: a paper, like: coarse, recipe: {calibration: {rows: 3}, quantization: {range: mse}}}
  other:
    shipped: {base: fast, recipe: {quantization: {overrides: {"mid*.0": w8a8}}}}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "methods.yaml"
    path.write_text(TABLE, encoding="utf-8")
    return path


# The table


@pytest.mark.parametrize("method", load_methods().values(), ids=lambda method: method.name)
def test_every_shipped_method_is_a_recipe(method: Method) -> None:
    (_, run) = plan_runs({"model": "emoji"}, [method], ["w4a4"], [0], [])
    assert run.recipe.bits == "w4a4"
    assert run.recipe.quantization.attention_bits is None, "all methods leave the same layers in float"
    assert run.recipe.quantization.boundary is None


def test_the_shipped_methods_cover_what_the_papers_compare() -> None:
    groups = {method.group for method in load_methods().values()}
    assert {"baselines", "ours", "components", "scalings"} <= groups
    assert len({method.title for method in load_methods().values()}) == len(load_methods())


def test_likeness_adds_up_and_the_nearest_wins(table: Path) -> None:
    methods = load_methods(table)
    assert list(methods) == ["coarse", "finer", "shipped"], "templates are no rows"
    runs = plan_runs({"model": "m"}, list(methods.values()), ["w6a6"], [3], [])
    coarse, finer, shipped = (run.recipe for run in runs[1:])
    assert (coarse.quantization.range, coarse.calibration.rows, coarse.quantization.rounding) == (
        "minmax",
        1,
        "nearest",
    )
    assert (finer.quantization.range, finer.calibration.rows, finer.quantization.rounding) == ("mse", 3, "nearest")
    assert shipped.quantization.overrides == {"mid*.0": "w8a8"}, "a pattern with dots stays one key"
    assert shipped.calibration == load_recipe("fast", {"model": "m"}, []).calibration
    assert {recipe.seed for recipe in (coarse, finer, shipped)} == {3}
    assert methods["finer"].source == "a paper"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["groups"]["simple"]["coarse"].update(like="plane"),
            "'coarse'.*'plane', which is not in the table",
        ),
        (lambda d: d["templates"]["plain"].update(like="coarse"), "like itself"),
        (lambda d: d["groups"]["simple"]["coarse"].update(titel="x"), "'coarse': got .'titel'."),
        (lambda d: d["groups"]["other"].update(coarse={}), "'coarse' is there twice"),
        (lambda d: d.pop("groups"), "expected sections"),
    ],
    ids=["unknown parent", "circle", "misspelt key", "twice", "no groups"],
)
def test_a_broken_table_is_refused(table: Path, change: Any, message: str) -> None:
    document = yaml.safe_load(TABLE)
    change(document)
    table.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_methods(table)


def test_methods_and_groups_are_chosen_by_name(table: Path) -> None:
    methods = load_methods(table)
    assert [m.name for m in choose(methods, [])] == ["coarse", "finer", "shipped"]
    assert [m.name for m in choose(methods, ["other", "coarse"])] == ["coarse", "shipped"]
    with pytest.raises(RecipeError, match="'corse'; did you mean 'coarse'"):
        choose(methods, ["corse"])


def test_a_method_that_is_no_recipe_is_named(table: Path) -> None:
    table.write_text("groups: {g: {odd: {recipe: {calibration: {row: 3}}}}}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"method 'odd'.*'calibration.row'.*'calibration.rows'"):
        plan_runs({"model": "m"}, list(load_methods(table).values()), ["w4a4"], [0], [])


# What is run


def test_runs_come_seed_by_seed_after_the_float_model(table: Path) -> None:
    methods = choose(load_methods(table), ["simple"])
    runs = plan_runs({"model": "m"}, methods, ["w4a4", "w8a8"], [0, 7], ["calibration.size=5"])
    assert [(run.method, run.bits, run.seed) for run in runs] == [
        (None, "float", 0),
        *[(name, bits, seed) for seed in (0, 7) for bits in ("w4a4", "w8a8") for name in ("coarse", "finer")],
    ]
    assert {run.recipe.calibration.size for run in runs} == {5}, "--set wins over every method"


def test_effort_scales_what_is_trained_and_starts_nothing(table: Path) -> None:
    methods = choose(load_methods(), ["lsq", "dilatequant", "mse"])
    (_, *full), (_, *quick) = (
        [run.recipe.training for run in plan_runs({"model": "m"}, methods, ["w4a4"], [0], [], effort)]
        for effort in (1.0, 0.001)
    )
    assert [(t.blocks.iterations > 0, t.network.iterations > 0) for t in full] == [
        (False, False),
        (False, True),
        (True, False),
    ]
    assert [(t.blocks.iterations, t.network.iterations) for t in quick] == [(0, 0), (0, 1), (1, 0)]
    with pytest.raises(RecipeError, match="effort is 0"):
        plan_runs({"model": "m"}, methods, ["w4a4"], [0], [], 0.0)


def test_a_run_is_known_by_what_it_depends_on(table: Path) -> None:
    def keys(*assignments: str, bits: str = "w4a4") -> list[str]:
        methods = choose(load_methods(table), ["simple"])
        runs = plan_runs({"model": "m"}, methods, [bits], [0], list(assignments))
        return [run_key(run, runs[0].recipe) for run in runs]

    plain = keys()
    assert len(set(plain)) == 3
    assert keys() == plain
    assert keys(bits="w8a8")[0] == plain[0], "the float model has no width"
    more = keys("quantization.split_concat=false")
    assert more[0] == plain[0]
    assert not set(more[1:]) & set(plain)
    assert not set(keys("validation.images=3")) & set(plain), "judged by other pictures"


# What comes out


def outcome(method: str | None, seed: int, psnr: float | None, bits: str = "w4a4") -> Outcome:
    run = Run(method, bits, seed, load_recipe(None, {"model": "m"}, []))
    if psnr is None:
        return Outcome(run, None, "it broke\nbadly", False, 1.0)
    metrics = {"image_psnr_db": psnr, "eps_sqnr_db": 20.0, "frechet_train": 1 / psnr}
    result = {"seconds": 10.0 + seed, "peak_rss_bytes": 2**30, "average_bits": None, "pictures": f"{method}.png"}
    return Outcome(run, {**result, "metrics": metrics, "captions": ["a face"]}, None, False, 1.0)


METHODS = [Method("a", "Method A", "g", "", None, ()), Method("b", "Method <B>", "g", "its paper", None, ())]


def test_figures_are_averaged_over_the_seeds_that_succeeded() -> None:
    outcomes = [outcome(None, 0, 99.0), outcome("a", 0, 30.0), outcome("b", 0, 40.0), outcome("a", 1, 34.0)]
    outcomes.append(outcome("b", 1, None))
    document = summarize(outcomes, METHODS)
    first, second = document["rows"]
    assert first["metrics"]["image_psnr_db"] == {"mean": 32.0, "std": pytest.approx(8**0.5)}
    assert first["seeds"] == [0, 1]
    assert first["seconds"]["mean"] == 10.5
    assert first["metrics"]["retrieval_accuracy"] == {"mean": None, "std": None}
    assert second["metrics"]["image_psnr_db"] == {"mean": 40.0, "std": None}
    assert second["failures"] == {"1": "it broke\nbadly"}
    problem = failures(outcomes)
    assert problem is not None
    assert "1 of 5 runs failed" in str(problem)
    assert "b w4a4 seed 1: it broke" in str(problem)
    assert failures(outcomes[:-1]) is None
    json.dumps(document, allow_nan=False)


def test_the_best_of_each_width_and_direction() -> None:
    outcomes = [outcome("a", 0, 30.0), outcome("b", 0, 40.0), outcome("a", 0, 50.0, "w8a8")]
    best = best_values(summarize(outcomes, METHODS)["rows"], METRICS)
    assert best["w4a4", "image_psnr_db"] == 40.0
    assert best["w8a8", "image_psnr_db"] == 50.0
    assert best["w4a4", "frechet_train"] == 1 / 40
    assert ("w4a4", "retrieval_accuracy") not in best


def test_cells_say_what_is_known() -> None:
    assert cell_text({"mean": 33.456, "std": None}, 2) == "33.46"
    assert cell_text({"mean": 33.456, "std": 0.1}, 2) == "33.46 ± 0.10"
    assert cell_text({"mean": None, "std": None}, 2) == "not measured"


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    outcomes = [outcome(None, 0, 99.0), outcome("a", 0, 30.0), outcome("b", 0, 40.0), outcome("b", 1, None)]
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    save_strip(pictures, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as strip:
        np.testing.assert_array_equal(np.asarray(strip)[:, 8:16], pictures[1])
    write_ablation_page(summarize(outcomes, METHODS), METRICS, tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Method &lt;B&gt;" in page
    assert 'class="n best">40.00<' in page
    assert "failed, seed 1: it broke" in page
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert not list(tmp_path.glob("*.partial"))


# The command


@pytest.mark.slow
def test_a_small_ablation_from_end_to_end(tiny_text: Path, table: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(TABLE)
    document["groups"]["simple"]["broken"] = {"recipe": {"quantization": {"keep_float": ["nothing.*"]}}}
    table.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    folder = tmp_path / "out"
    options = ("-m", tiny_text, "-o", folder, "--table", table, "--bits", "w4a4", "--seeds", "0")
    small = [part for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] != "--rows" for part in pair]
    answer = dmqexport("ablate", *options, *small, "--methods", "coarse,broken")
    assert answer.code == 1
    assert "method" in answer.out
    assert "coarse" in answer.out
    assert "1 of 3 runs failed" in answer.err
    assert "keep_float: 'nothing.*' matches no layer" in answer.err
    found = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
    coarse, broken = found["rows"]
    assert coarse["metrics"]["eps_sqnr_db"]["mean"] > 0
    assert coarse["seconds"]["mean"] > 0
    assert coarse["peak_rss_bytes"]["mean"] > 2**26
    assert coarse["runs"][0]["recipe"]["quantization"]["range"] == "minmax"
    assert broken["metrics"]["eps_sqnr_db"]["mean"] is None
    assert "data:image/png" in (folder / "ablation.html").read_text(encoding="utf-8")

    again = dmqexport("ablate", *options, *small, "--methods", "coarse", "--json")
    assert again.code == 0
    assert again.json["rows"][0]["metrics"] == coarse["metrics"]
    assert sorted(path.suffix for path in (folder / "runs").glob("coarse*")) == [".json", ".log", ".png"]


def test_finished_runs_are_kept_and_damaged_ones_are_not(tiny_text: Path, table: Path, tmp_path: Path) -> None:
    ablation = Ablation(tmp_path / "out")
    runs = plan_runs({"model": str(tiny_text)}, choose(load_methods(table), ["coarse"]), ["w4a4"], [0], [])
    for run in runs:
        key = run_key(run, runs[0].recipe)
        path = ablation.runs_folder / f"{run.stem(key)}.json"
        path.write_text(json.dumps({"key": key, "metrics": {"image_psnr_db": 1.0}}), encoding="utf-8")
    outcomes = ablation.execute(runs, lambda outcome, done, total: None)
    assert [outcome.cached for outcome in outcomes] == [True, True]
    assert outcomes[1].result is not None
    assert outcomes[1].result["metrics"] == {"image_psnr_db": 1.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seeds", "a"), "--seeds 'a': expected whole numbers"),
        (("--methods", "minmaxx"), "did you mean 'minmax'"),
        (("--bits", "w99a4"), "99 bits"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path: Path, arguments: tuple[str, str], words: str) -> None:
    answer = dmqexport("ablate", "-o", tmp_path / "out", *arguments)
    assert answer.code == 2
    assert words in answer.err
    assert not (tmp_path / "out").exists()


def test_the_list_of_methods_is_yaml(tmp_path: Path) -> None:
    answer = dmqexport("ablate", "-o", tmp_path / "out", "--list", "--methods", "baselines")
    assert answer.code == 0
    assert yaml.safe_load(answer.out)["minmax"]["sets"]
    assert not (tmp_path / "out").exists()
