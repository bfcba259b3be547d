"""Mixed precision from the command line to the plan: budgets kept, stages reused, refusals that teach."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, Answer, dmqexport, refused

from dmqexport.byte_size import Budget, BudgetKind
from dmqexport.errors import RecipeError
from dmqexport.recipe import load_recipe

#: Two widths, few entries, nothing that allocation does not need.
QUICK = (
    *("--set", "allocation.weight_bits=[2, 4, 8]", "--set", "allocation.activation_bits=[4, 8]"),
    *(
        "--set",
        "allocation.entries=12",
        "--set",
        "allocation.proposals=2",
        "--set",
        "scaling.method=none",
        "--set",
        "quantization.rounding=nearest",
    ),
)


def plan(model: Path, work: Path, *arguments: object) -> Answer:
    return dmqexport(
        "plan", "-m", model, "-o", work / "bundle", "--work", work / "work", *SMALL, *QUICK, *arguments, "--json"
    )  # fmt: skip


def document(answer: Answer) -> Any:
    assert answer.code == 0, answer.err
    return json.loads(Path(answer.json["artifacts"]["quant_plan"]).read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("allocate")


def test_average_bits_are_kept_and_the_plan_says_how_they_were_chosen(tiny_plain: Path, work: Path) -> None:
    answer = plan(tiny_plain, work, "--bits", "w5a6", "--mixed", "--pareto")
    found = document(answer)
    allocation = found["allocation"]
    assert allocation["method"] == "integer"
    assert allocation["average_weight_bits"] <= 5
    assert allocation["average_activation_bits"] <= 6
    for name, side in (("average weight bits", "weight"), ("average activation bits", "activation")):
        assert allocation["rate"][name]["used"] == pytest.approx(allocation[f"average_{side}_bits"], abs=1e-5)
        assert allocation["lambda"][name] >= 0
    # The integer search certifies its own; a proposal, which wins where it measures better, walks slopes.
    assert all(0 <= entry["certified_gap"] < 0.01 for entry in allocation["additivity"][:2])
    assert 0 <= allocation["certified_gap"] < 1
    assert allocation["predicted_distortion"] > 0
    assert allocation["measured_distortion"] == min(entry["measured"] for entry in allocation["additivity"])
    assert [entry["curves"].split()[0] for entry in allocation["additivity"]] == ["curves", "curves", "best"]
    assert {layer["weight_bits"] for layer in found["layers"]} <= {2, 4, 8}
    assert all(layer["weight_bits"] == 8 for layer in found["layers"] if layer["reason"].startswith("boundary"))
    curve = json.loads(Path(answer.json["artifacts"]["pareto"]).read_text())
    assert {point["method"] for point in curve["points"]} == {"integer", "uniform"}
    for point in curve["points"]:
        assert point["measured_distortion"] > 0
        if point["method"] == "integer":
            assert all(used <= point["limit"][name] * (1 + 1e-9) for name, used in point["rate"].items())
    plot = Path(answer.json["artifacts"]["pareto_plot"]).read_text()
    assert plot.startswith("<svg")
    assert plot.count("<circle") >= 2 * len([p for p in curve["points"] if p["predicted_distortion"]])


def test_layers_may_be_given_16_activation_bits_and_the_average_counts_them(tiny_plain: Path, work: Path) -> None:
    """They come out as remainders, boundary layers' too; what cannot have them does not."""
    asked = ("--set", "allocation.remainders=true", "--set", "quantization.overrides={mid_block.*: w8a8}")
    found = document(plan(tiny_plain, work, "--bits", "w8a8", "--mixed", *asked))
    assert found["allocation"]["average_activation_bits"] <= 8
    used = found["allocation"]["rate"]["average activation bits"]["used"]
    assert used == pytest.approx(found["allocation"]["average_activation_bits"], abs=1e-5)
    twice = [layer for layer in found["layers"] if any(segment.get("remainder") for segment in layer["segments"])]
    assert {layer["activation_bits"] for layer in twice} == {8}
    assert any(layer["reason"].startswith("boundary") and layer["name"] != "conv_in" for layer in twice)
    assert not any(layer["name"].startswith("mid_block") for layer in twice)
    assert len(twice) < len(found["layers"])


def test_an_override_decides_about_the_named_remainder_of_its_layer(tiny_plain: Path, work: Path) -> None:
    asked = ("--set", "quantization.overrides={conv_in: w8a4}")
    found = document(plan(tiny_plain, work, "--bits", "w5a6", "--mixed", *asked))
    first = next(layer for layer in found["layers"] if layer["name"] == "conv_in")
    assert (first["weight_bits"], first["mean_activation_bits"]) == (8, 4)
    first = next(
        layer for layer in document(plan(tiny_plain, work, "--bits", "w5a6", "--mixed"))["layers"]
        if layer["name"] == "conv_in"
    )  # fmt: skip
    assert (first["weight_bits"], first["mean_activation_bits"]) == (8, 16)


def test_another_budget_reuses_what_was_measured(tiny_plain: Path, work: Path) -> None:
    plan(tiny_plain, work, "--bits", "w5a6", "--mixed")
    answer = plan(tiny_plain, work, "--bits", "w6a7", "--mixed")
    cached = {stage["name"]: stage["cached"] for stage in answer.json["stages"]}
    assert cached["candidates"]
    assert cached["sensitivity"]
    assert not cached["allocation"]


@pytest.mark.parametrize("method", ["lagrangian", "mixdq"])
@pytest.mark.parametrize("budget", ["5.5bits", "1MiB"])
def test_every_method_keeps_a_single_budget(tiny_plain: Path, work: Path, method: str, budget: str) -> None:
    answer = plan(tiny_plain, work, "--bits", "w5a6", "--budget", budget, "--set", f"allocation.method={method}")
    allocation = document(answer)["allocation"]
    assert allocation["method"] == method
    assert allocation["budget"] == budget
    assert all(rate["used"] <= rate["limit"] * (1 + 1e-9) for rate in allocation["rate"].values())


def test_without_mixed_nothing_is_measured(tiny_plain: Path, work: Path) -> None:
    answer = plan(tiny_plain, work, "--bits", "w4a4")
    allocation = document(answer)["allocation"]
    assert allocation["method"] == "uniform"
    assert allocation["lambda"] == {}
    assert allocation["predicted_distortion"] is None
    assert "sensitivity" not in {stage["name"] for stage in answer.json["stages"]}


def test_a_budget_nothing_fits_into_is_refused_with_what_is_possible(tiny_plain: Path, work: Path) -> None:
    answer = plan(tiny_plain, work, "--bits", "w5a6", "--budget", "100B")
    refused(answer, 2, ["bytes of stored weights of at most 100", "least possible"])


def test_another_latency_table_under_the_same_name_allocates_anew(tiny_plain: Path, work: Path) -> None:
    table = work / "latency.json"
    used = []
    for each in (0.25, 0.5):
        widths = {f"w{weight}a{activation}": each for weight in (2, 4, 8) for activation in (4, 8)}
        table.write_text(json.dumps({"*": widths}))
        budget = ("--budget", "1000ms", "--set", f"allocation.latency_table={table}")
        rate = document(plan(tiny_plain, work, "--bits", "w5a8", *budget))["allocation"]["rate"]
        used.append(rate["milliseconds of quantized layers"]["used"])
    assert used[1] == pytest.approx(2 * used[0])


def test_a_floor_that_matches_nothing_is_refused(tiny_plain: Path, work: Path) -> None:
    answer = plan(tiny_plain, work, "--bits", "w5a6", "--mixed", "--set", "allocation.floors={nowhere: w4a4}")
    refused(answer, 2, ["allocation.floors", "'nowhere' matches no layer"])


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2.5MiB", Budget(BudgetKind.BYTES, 2.5 * 2**20)),
        ("900 kB", Budget(BudgetKind.BYTES, 900e3)),
        ("4.5bits", Budget(BudgetKind.JOINT_BITS, 4.5)),
        ("1.2ms", Budget(BudgetKind.MILLISECONDS, 1.2)),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "4", "0MiB", "-1MiB", "4 parsecs", "MiB"])
def test_other_budgets_are_refused_with_examples(text: str) -> None:
    with pytest.raises(RecipeError, match="not a positive amount with a unit"):
        Budget.parse(text)


def test_a_budget_or_a_sweep_without_allocation_is_refused() -> None:
    for key, value in (("allocation.budget", "2MiB"), ("allocation.pareto", True)):
        with pytest.raises(RecipeError, match="needs bits to be allocated"):
            load_recipe(None, {"model": "emoji", key: value}, [])


@pytest.mark.parametrize("sensitivity", ["sketch", "exact"])
def test_widths_can_be_judged_by_what_pictures_show(tiny_text: Path, tmp_path: Path, sensitivity: str) -> None:
    arguments = ("--bits", "w4a6", "--mixed", "--set", "allocation.metric=picture")
    found = document(plan(tiny_text, tmp_path, *arguments, "--set", f"allocation.sensitivity={sensitivity}"))
    assert found["allocation"]["distortion"] == "picture"
    assert found["allocation"]["measured_distortion"] > 0
    assert list((tmp_path / "work").glob("step-errors-*")), "steps are weighed by their effect on pictures"
