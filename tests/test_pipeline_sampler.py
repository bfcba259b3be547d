"""Training through the sampler within a build: the loop is the pipeline's, trials are honest, a kill loses little."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calib.sampling import CalibrationSet
from dmqexport.quant_plan import PLAN_JSON
from tests.command_line import build, refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

THROUGH = (
    *("--set", "training.trajectories=6", "--set", "training.sampler.iterations=9"),
    *("--set", "training.sampler.held_out=3", "--set", "training.sampler.batch_size=2"),
    *("--bits", "w4a4", "--target", "onnx"),
)


def trained(work: Path) -> dict[str, Any]:
    """What the stage says of itself."""
    (found,) = work.glob("sampler-*/sampler.json")
    document: dict[str, Any] = json.loads(found.read_text())
    return document


def codes_of(work: Path) -> bytes:
    """The stage's integer weights."""
    (found,) = work.glob("sampler-*/quant_weights.safetensors")
    return found.read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build; its folders are `out` and `work`. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)  # as in the tests: what is trained on more threads differs in the last bits
    answer = build(tiny_text, folder / "out", folder / "work", *THROUGH)
    assert answer.code == 0, answer.err
    return folder


def without_training(whole: Path, work: Path) -> Path:
    """A copy of its work folder in which nothing was trained yet."""
    shutil.copytree(whole / "work", work)
    for folder in work.glob("sampler-*"):
        shutil.rmtree(folder)
    return work


def test_the_best_of_the_trials_is_deployed(whole: Path) -> None:
    document = trained(whole / "work")
    trials = dict(document["held_out_db"])
    assert len(document["losses"]) == 9
    assert set(trials) == {0, 2, 4, 6, 8, 9}
    assert trials[document["kept"]] == min(trials.values())
    plan = json.loads((whole / "out" / "dmqexport" / PLAN_JSON).read_text())
    assert plan == json.loads(next((whole / "work").glob("sampler-*/" + PLAN_JSON)).read_text())


def test_gradients_do_not_depend_on_what_is_kept_for_them(whole: Path, tiny_text: Path, tmp_path: Path) -> None:
    work = without_training(whole, tmp_path / "work")
    options = (*THROUGH, "--set", "training.sampler.recompute=true")
    answer = build(tiny_text, tmp_path / "out", work, *options, verb="train")
    assert answer.code == 0, answer.err
    assert trained(work) == trained(whole / "work")
    assert codes_of(work) == codes_of(whole / "work")


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    whole: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = without_training(whole, tmp_path / "work")
    monkeypatch.setattr("calib.trajectory_distill._CHECKPOINT_SECONDS", -1.0)
    original, saves = torch.save, 0

    def dies(*arguments: Any, **keywords: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 6:
            raise KeyboardInterrupt
        original(*arguments, **keywords)

    with monkeypatch.context() as during:
        during.setattr(torch, "save", dies)
        build(tiny_text, tmp_path / "out", work, *THROUGH, verb="train")
    assert list(work.glob(".sampler-*.partial/checkpoint.pt"))
    resumed = build(tiny_text, tmp_path / "out", work, *THROUGH, verb="train")
    assert resumed.code == 0, resumed.err
    assert trained(work) == trained(whole / "work")
    assert codes_of(work) == codes_of(whole / "work")


def test_a_sampler_with_noise_of_its_own_is_refused(tiny_text: Path, tmp_path: Path) -> None:
    options = (*THROUGH, "--scheduler", "euler-ancestral")
    answer = build(tiny_text, tmp_path / "out", tmp_path / "work", *options, verb="train")
    refused(answer, 2, ["training.sampler", "EulerAncestralDiscreteScheduler", "ddim"])
    assert not list((tmp_path / "work").glob("statistics-*")), "before anything is calibrated"


def test_as_many_held_out_as_there_are_leaves_nothing_to_train_on(tiny_text: Path, tmp_path: Path) -> None:
    options = (*THROUGH, "--set", "training.sampler.held_out=6")
    answer = build(tiny_text, tmp_path / "out", tmp_path / "work", *options, verb="train")
    refused(answer, 2, ["training.sampler.held_out 6", "training.trajectories 6", "lower"])
    assert not (tmp_path / "work").exists()


def test_the_ends_are_the_pipelines_own(whole: Path) -> None:
    """What the scheduler's last step gave; the tiny model has no step after it that is trained through."""
    (folder,) = (whole / "work").glob("trajectory-ends-*")
    starts = CalibrationSet.load(folder / "starts.safetensors")
    finished = load_file(str(folder / "finished.safetensors"))["finished"]
    assert len(finished) == 6
    assert len(starts) == 12, "both guidance halves"
    assert starts.step.unique().tolist() == [0]
    noise = starts.inputs["sample"].reshape(6, 2, *finished.shape[1:])
    assert torch.equal(noise[:, 0], noise[:, 1])
    assert float((finished - noise[:, 0]).square().mean()) > 0.1, "the noise is gone"
