"""Bits by finished trajectories within a build: budgets kept, activations untouched or by row, a kill loses little."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmqexport.pipeline_reallocate as stage
from calib.sampling import CalibrationSet
from dmqexport.errors import RecipeError
from dmqexport.recipe import load_recipe
from tests.command_line import Answer, build, refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

ONCE = (
    *("--bits", "w4a5", "--mixed", "--target", "onnx", "--json"),
    *("--set", "allocation.weight_bits=[2, 4, 8]", "--set", "allocation.activation_bits=[4, 8]"),
    *("--set", "allocation.entries=12", "--set", "allocation.proposals=0", "--set", "scaling.method=none"),
    *("--set", "training.trajectories=6"),
)
AGAIN = (*ONCE, "--set", "allocation.trajectories=4")


def document(answer: Answer) -> Any:
    assert answer.code == 0, answer.err
    return json.loads(Path(answer.json["artifacts"]["quant_plan"]).read_text())


def measured(work: Path) -> Any:
    (found,) = work.glob("weight-bits-*/weight_bits.json")
    return json.loads(found.read_text())


@pytest.fixture(scope="module")
def once(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a plan that was allocated once. Read only."""
    folder = tmp_path_factory.mktemp("once")
    document(build(tiny_text, folder / "out", folder / "work", *ONCE, verb="plan"))
    return folder / "work"


def test_weights_bits_change_within_the_budget_and_activations_do_not(
    once: Path, tiny_text: Path, tmp_path: Path
) -> None:
    before = document(build(tiny_text, tmp_path / "out", once, *ONCE, verb="plan"))
    after = document(build(tiny_text, tmp_path / "out", once, *AGAIN, verb="plan"))
    bits = measured(once)
    assert after["allocation"]["average_weight_bits"] <= 4
    assert {layer["name"]: layer["mean_activation_bits"] for layer in after["layers"]} == {
        layer["name"]: layer["mean_activation_bits"] for layer in before["layers"]
    }
    assert {layer["name"]: layer["weight_bits"] for layer in after["layers"]} == bits["weight_bits"]
    assert 0 < bits["predicted_share"] <= 1
    told = after["allocation"]["weights_by_finished_trajectories"]
    assert told == {key: bits[key] for key in ("trajectories", "predicted_share", "certified_gap", "changed")}
    changed = sum(bits["weight_bits"][layer["name"]] != layer["weight_bits"] for layer in before["layers"])
    assert told["changed"] == changed
    for curve in bits["errors"].values():
        assert curve["8"] < curve["2"], "more bits do less"
    # Boundary layers keep theirs.
    assert all(layer["weight_bits"] == 8 for layer in after["layers"] if layer["reason"].startswith("boundary"))


def test_trajectories_that_end_are_those_that_weights_are_fitted_to(
    once: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Drawn once: what is kept of them is what is drawn where no end is asked for."""
    work = tmp_path / "work"
    shutil.copytree(once, work)
    fitted = ("--set", "quantization.refine_on=training")
    document(build(tiny_text, tmp_path / "out", work, *ONCE, *fitted, verb="plan"))
    document(build(tiny_text, tmp_path / "out", work, *AGAIN, *fitted, verb="plan"))
    (own,) = work.glob("training-set-*/calibration.safetensors")
    (kept,) = work.glob("trajectory-ends-*/calibration.safetensors")
    alone, shared = CalibrationSet.load(own), CalibrationSet.load(kept)
    assert torch.equal(alone.step, shared.step)
    assert torch.equal(alone.trajectory, shared.trajectory)
    assert alone.inputs.keys() == shared.inputs.keys()
    for name, values in alone.inputs.items():
        assert torch.equal(values, shared.inputs[name]), name


def test_a_killed_measurement_goes_on_where_it_was(
    once: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(once, work)
    for folder in work.glob("weight-bits-*"):
        shutil.rmtree(folder)
    original, calls = stage.finished_errors, 0

    def dies(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    with monkeypatch.context() as during:
        during.setattr(stage, "finished_errors", dies)
        build(tiny_text, tmp_path / "out", work, *AGAIN, verb="plan")
    assert len(list(work.glob(".weight-bits-*.partial/ends-*.safetensors"))) == 2
    again = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal again
        again += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(stage, "finished_errors", counted)
    monkeypatch.setattr(stage, "rounding_errors", lambda *arguments: pytest.fail("codes are there already"))
    document(build(tiny_text, tmp_path / "out", work, *AGAIN, verb="plan"))
    assert again == 2
    fresh = tmp_path / "fresh"
    shutil.copytree(once, fresh)
    for folder in fresh.glob("weight-bits-*"):
        shutil.rmtree(folder)
    monkeypatch.undo()
    document(build(tiny_text, tmp_path / "out", fresh, *AGAIN, verb="plan"))
    assert measured(work) == measured(fresh)


def test_tensors_get_bits_of_their_own_in_each_row_and_keep_the_average(
    once: Path, tiny_text: Path, tmp_path: Path
) -> None:
    work, rows = tmp_path / "work", ("--set", "quantization.row_bits=measured", "--rows", "3")
    shutil.copytree(once, work)
    widths = ("--set", "allocation.activation_bits=[3, 4, 5, 6, 8]", "--bits", "w4a4")
    before = document(build(tiny_text, tmp_path / "out", work, *ONCE, *rows, *widths, verb="plan"))
    after = document(build(tiny_text, tmp_path / "out", work, *AGAIN, *rows, *widths, verb="plan"))
    (path,) = work.glob("activation-bits-*/activation_bits.json")
    found = json.loads(path.read_text())
    told = after["allocation"]["activations_by_finished_trajectories"]
    assert told == {key: found[key] for key in told}
    assert told["changed"] > 0
    assert told["rows"] > told["changed"]
    averages = [plan["allocation"]["average_activation_bits"] for plan in (before, after)]
    assert averages[0] - 0.05 <= averages[1] <= 4, "what allocation before it left is spent, and no more"
    planned = {layer["name"]: layer["segments"][0]["activation"] for layer in after["layers"]}
    for name, bits in found["row_bits"].items():
        assert planned[name].get("row_bits", [planned[name]["bits"]] * len(bits)) == bits, name
    patterns = {tuple(np.subtract(bits, min(bits))) for bits in found["row_bits"].values() if len(bits) > 1}
    assert len(patterns) > 1, "each has a pattern of its own"


def test_without_a_choice_of_widths_activations_stay_as_they_are(once: Path, tiny_text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(once, work)
    only = ("--set", "quantization.row_bits=measured", "--set", "allocation.activation_bits=[4]", "--bits", "w4a6")
    plan = document(build(tiny_text, tmp_path / "out", work, *AGAIN, *only, verb="plan"))
    assert not list(work.glob("activation-bits-*"))
    assert "activations_by_finished_trajectories" not in plan["allocation"]
    assert "weights_by_finished_trajectories" in plan["allocation"]


def test_time_projections_may_have_fewer_bits(once: Path, tiny_text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(once, work)
    free = ("--set", "allocation.time_projections=true")
    plan = document(build(tiny_text, tmp_path / "out", work, *AGAIN, *free, verb="plan"))
    bits = {layer["name"]: layer["weight_bits"] for layer in plan["layers"]}
    assert any(width < 8 for name, width in bits.items() if name.endswith("time_emb_proj"))
    ends = ("time_embedding.linear_1", "conv_in", "conv_out")
    assert all(bits[name] == 8 for name in ends)
    assert plan["allocation"]["average_weight_bits"] <= 4
    # A boundary of one's own is taken as it is.
    own = ("--set", 'quantization.boundary=["conv_in", "conv_out", "*.time_emb_proj"]')
    kept = document(build(tiny_text, tmp_path / "out", work, *ONCE, *free, *own, verb="plan"))
    assert all(item["weight_bits"] == 8 for item in kept["layers"] if item["name"].endswith("time_emb_proj"))


def test_what_cannot_be_judged_so_is_refused(tiny_text: Path, tmp_path: Path) -> None:
    where = (tiny_text, tmp_path / "out", tmp_path / "work")
    noisy = build(*where, *AGAIN, "--scheduler", "euler-ancestral", verb="plan")
    refused(noisy, 2, ["EulerAncestralDiscreteScheduler", "ddim"])
    nearest = build(*where, *AGAIN, "--set", "quantization.rounding=nearest", verb="plan")
    refused(nearest, 2, ["allocation.trajectories", "nearest", "second-order"])
    assert not list((tmp_path / "work").glob("statistics-*")), "before anything is calibrated"
    options = {"model": "emoji", "bits": "w4a4"}
    with pytest.raises(RecipeError, match="mixdq decides by errors of single calls"):
        load_recipe("default", options, ["allocation.trajectories=4", "allocation.method=mixdq"])
