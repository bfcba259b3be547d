"""Training within a build: what is trained is deployed, stages are reused, and a kill loses no more than a minute."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmqexport.quant_plan import PLAN_JSON, QuantPlan
from tests.command_line import build, refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

TRAINED = (
    *("--set", "training.trajectories=4", "--set", "training.blocks.iterations=3"),
    *("--set", "training.blocks.entries=16", "--set", "training.blocks.held_out=4"),
    *("--set", "training.network.iterations=4", "--set", "training.network.batch_size=4"),
    *("--set", "quantization.row_bits=measured", "--bits", "w4a4", "--target", "onnx"),
)


def plan_of(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / "dmqexport" / PLAN_JSON).read_text())
    return document


def test_a_trained_build_is_a_bundle_like_any_other(tiny_text: Path, tmp_path: Path) -> None:
    answer = build(tiny_text, tmp_path / "trained", tmp_path / "work", *TRAINED)
    assert answer.code == 0, answer.err
    stages = {folder.name.rpartition("-")[0] for folder in (tmp_path / "work").iterdir()}
    assert {"draft", "step-errors", "row-bits", "training-set", "blocks", "network"} <= stages
    untrained = build(tiny_text, tmp_path / "plain", tmp_path / "work", "--bits", "w4a4", "--target", "onnx")
    assert untrained.code == 0, untrained.err

    trained, plain = (QuantPlan.load(tmp_path / name / "dmqexport") for name in ("trained", "plain"))
    assert any(layer.bias is not None for layer in trained.layers)
    assert all(layer.bias is None for layer in plain.layers)
    pairs = zip(trained.layers, plain.layers, strict=True)
    moved = [not np.array_equal(a.segments[0].weight.scale, b.segments[0].weight.scale) for a, b in pairs]
    assert sum(moved) > len(moved) / 2
    assert trained.allocation.average_activation_bits is not None
    # MAC-weighted, boundary layers included: the mean over rows must not have grown
    assert trained.allocation.average_activation_bits <= plain.allocation.average_activation_bits + 0.02  # type: ignore[operator]

    again = build(tiny_text, tmp_path / "again", tmp_path / "work", *TRAINED)
    assert again.code == 0, again.err
    assert all(again.stages[name] for name in ("blocks", "network", "passes"))
    assert plan_of(tmp_path / "again") == plan_of(tmp_path / "trained")


def test_the_verb_train_stops_at_the_plan(tiny_text: Path, tmp_path: Path) -> None:
    answer = build(tiny_text, tmp_path / "out", tmp_path / "work", *TRAINED, "--json", verb="train")
    assert answer.code == 0, answer.err
    assert "network-" in answer.json["artifacts"]["quant_plan"]
    assert not list((tmp_path / "work").glob("*.partial"))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_training_leaves_its_work_to_go_on_from(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.network_distill._CHECKPOINT_SECONDS", -1.0)
    finished = build(tiny_text, tmp_path / "whole", tmp_path / "other", *TRAINED, verb="train")
    assert finished.code == 0, finished.err

    saves = 0
    original = torch.save

    def dies(*arguments: Any, **keywords: Any) -> None:
        nonlocal saves
        saves += 1
        original(*arguments, **keywords)
        if saves == 2:
            monkeypatch.setattr("calib.network_distill._save", stop)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    assert build(tiny_text, tmp_path / "out", tmp_path / "work", *TRAINED, verb="train").code == 130
    assert list((tmp_path / "work").glob(".network-*.partial/checkpoint.pt"))
    monkeypatch.undo()
    answer = build(tiny_text, tmp_path / "out", tmp_path / "work", *TRAINED, verb="train")
    assert answer.code == 0, answer.err
    plans = [next(folder.glob(f"network-*/{PLAN_JSON}")).parent for folder in (tmp_path / "work", tmp_path / "other")]
    assert QuantPlan.load(plans[0]).fingerprint == QuantPlan.load(plans[1]).fingerprint


def test_a_pattern_that_matches_no_layer_is_refused(tiny_text: Path, tmp_path: Path) -> None:
    answer = build(
        tiny_text, tmp_path / "out", tmp_path / "work", *TRAINED, "--set", "training.network.layers=[up_block.*]",
        verb="train",
    )  # fmt: skip
    refused(answer, 2, ["training.network.layers", "matches no quantized layer"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.network.weights=some", "expected 'none', 'full'"),
        ("training.network.guided_share=2", "less than or equal to 1"),
        ("training.max_ram=lots", "is no size"),
        ("training.blocks.iteration=3", "did you mean 'training.blocks.iterations'"),
    ],
)
def test_impossible_values_are_refused(tiny_text: Path, tmp_path: Path, key: str, message: str) -> None:
    refused(build(tiny_text, tmp_path / "out", tmp_path / "work", "--set", key), 2, [message])


@pytest.mark.parametrize("weights", ["measured", "equal"])
def test_a_sampler_with_more_calls_than_steps_is_trained_for(tiny_text: Path, tmp_path: Path, weights: str) -> None:
    arguments = (
        *("--bits", "w4a4", "--scheduler", "pndm", "--set", "training.trajectories=2"),
        *("--set", "training.network.iterations=2", "--set", f"training.network.step_weights={weights}"),
        *("--set", f"quantization.row_bits={'measured' if weights == 'measured' else 'even'}"),
    )
    answer = build(tiny_text, tmp_path / "out", tmp_path / "work", *arguments, verb="train")
    assert answer.code == 0, answer.err
    if weights == "measured":
        found = json.loads(next((tmp_path / "work").glob("step-errors-*/step_errors.json")).read_text())
        assert len(found["pictures"]) == len(found["noise"]) > 4  # PNDM looks at some of the four steps more than once


def test_weights_can_be_fitted_to_the_training_trajectories(tiny_text: Path, tmp_path: Path) -> None:
    arguments = ("--bits", "w4a4", "--set", "training.trajectories=3", "--set", "quantization.rounding=second-order")
    work = tmp_path / "work"
    found = []
    for where in ("calibration", "training"):
        answer = build(
            tiny_text, tmp_path / where, work, *arguments, "--set", f"quantization.refine_on={where}",
            "--json", verb="plan",
        )  # fmt: skip
        assert answer.code == 0, answer.err
        assert len(list(work.glob("training-set-*"))) == (where == "training"), "sampled only where it is asked for"
        found.append(QuantPlan.load(Path(answer.json["artifacts"]["quant_plan"]).parent).fingerprint)
    assert found[0] != found[1]
