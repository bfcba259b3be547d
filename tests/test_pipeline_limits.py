"""What a build takes is said before it starts, and limits are kept to or refused."""

from pathlib import Path
from typing import Any

import pytest

from dmqexport.errors import ModelError, ResourceError
from dmqexport.pipeline import Build
from dmqexport.pipeline_bundle import run_build
from dmqexport.pipeline_limits import estimate_build, report_lines, working_bytes
from dmqexport.pipeline_size import WORKING_BYTES, batch_within, sketch_bytes, sketch_within, validation_size
from dmqexport.recipe import Recipe, load_recipe
from dmqexport.workspace import SilentReporter, Workspace

GIB = 2**30


def recipe(model: str, **options: Any) -> Recipe:
    return load_recipe("fast", {"model": model, "bits": "w4a4", **options}, [])


def large(**options: Any) -> Recipe:
    return recipe("sd14", weights="random", target="trt-rtx", **{"sampling.steps": 4, "calibration.size": 2, **options})


def test_the_result_is_packed_and_in_bytes() -> None:
    found = estimate_build(large(), None)
    assert 0.5 < found.canonical / 859.5e6 < 0.56
    assert 1.0 < found.result / 859.5e6 < 1.05
    assert 5 * GIB < found.memory < 20 * GIB
    assert found.disk > 4 * 859.5e6, "the float graph is among it"


def test_more_trajectories_take_more(tmp_path: Path) -> None:
    few, many = (estimate_build(recipe("emoji", **{"calibration.size": n}), None) for n in (8, 64))
    first, last = (next(stage for stage in found.stages if stage.name == "trajectories") for found in (few, many))
    assert last.disk == 8 * first.disk
    timed = estimate_build(recipe("emoji"), tmp_path)
    assert all(stage.seconds > 0 for stage in timed.stages)
    assert 0 < sum(stage.forward_seconds for stage in timed.stages) < timed.seconds
    assert not list(tmp_path.iterdir()), "nothing is left of timing the disk"


def test_memory_that_is_too_small_is_refused_with_what_would_do() -> None:
    with pytest.raises(ResourceError, match=r"--max-ram is 2\.\S+ GB, and this build is estimated to need") as caught:
        working_bytes(large(max_ram="2GiB"))
    assert "--target onnx" in str(caught.value)
    assert caught.value.exit_code == 5


def test_disk_that_is_too_small_is_refused() -> None:
    with pytest.raises(ResourceError, match="--max-disk") as caught:
        working_bytes(large(max_disk="1GB"))
    assert "export" in str(caught.value), "the float graph is what takes most"


def test_working_memory_shrinks_until_the_limit_is_kept() -> None:
    def church(**options: Any) -> Recipe:
        return recipe("ddpm-church-256", weights="random", **options)  # few weights, large activations

    needed = estimate_build(church(), None).memory
    assert working_bytes(church()) == working_bytes(church(max_ram=str(needed))) == WORKING_BYTES
    tight = church(max_ram=str(round(0.8 * needed)))
    assert working_bytes(tight) < WORKING_BYTES
    assert estimate_build(tight, None).memory <= 0.8 * needed


def test_limits_without_an_estimate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="once it is downloaded"):
        estimate_build(recipe("somebody/something"), None)
    with pytest.raises(ResourceError, match="need an estimate, and there is none"):
        working_bytes(recipe("somebody/something", max_ram="8GiB"))


def test_large_models_are_judged_on_little_and_small_ones_as_ever() -> None:
    def sized(name: str) -> Any:
        from dmqexport.models.architecture import find_architecture

        cost = find_architecture(name, random=name != "emoji", size=None).footprint
        return validation_size(recipe(name).validation, cost, 40), batch_within(32, cost)

    (small, small_batch), (big, big_batch) = sized("emoji"), sized("sd14")
    assert (small.images, small.entries, small.layer_entries, small.batch_size) == (16, 400, 40, 16)
    assert not small.reduced
    assert small_batch == 32
    assert big.reduced
    assert big.images == 1
    assert 2 <= big.entries < 20
    assert 1 <= big_batch < 16


def test_a_sketch_takes_as_many_samples_as_its_gradients_leave_memory_for() -> None:
    from dmqexport.models.architecture import find_architecture

    small, big = (find_architecture(name, random=name != "emoji", size=None).footprint for name in ("emoji", "sd14"))
    assert sketch_within(32, small, 4) == 32
    assert sketch_within(32, big, 4) == 1
    assert sketch_within(32, big, 4, 3 * sketch_bytes(big, 4) + 1) == 3
    assert sketch_bytes(big, 4) > 2 * 4 * big.output_bytes, "a gradient a probe at every output, and its graph"
    assert sketch_within(32, None, 4) == 32


@pytest.mark.slow
def test_a_build_leaves_about_what_was_said(tmp_path: Path) -> None:
    """Bytes stage by stage; times scatter on machines with other work to do, and are not compared."""
    small = {"calibration.size": 16, "quantization.refine_entries": 256, "scaling.method": "dilation"}
    asked = recipe("emoji", **small, **{"validation.images": 4, "validation.retrieval": 0})
    said = estimate_build(asked, None)
    workspace = Workspace(tmp_path / "work", SilentReporter())
    run_build(Build(asked, tmp_path / "bundle", workspace))
    stages = {record.name: record for record in workspace.records}
    told = {stage.name: stage for stage in said.stages}
    assert set(told) - {"load", "bundle"} == set(stages)
    for name, record in stages.items():
        kept = record.disk_bytes or 0
        if kept > 10**6:  # below, it is names and braces
            assert 1 / 2 < told[name].disk / kept < 2, name
    peak = max(record.built_peak_rss_bytes or 0 for record in stages.values())
    assert 1 / 2 < said.memory / peak < 2
    everything = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 1 / 2 < said.disk / everything < 2
    result = sum(path.stat().st_size for path in (tmp_path / "bundle" / "unet").glob("model.onnx*"))
    assert 1 / 2 < said.result / result < 2
    assert any("result:" in line for line in report_lines(said))


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_what_this_machine_cannot_hold_is_refused_before_it_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmqexport.pipeline_limits.machine_memory", lambda: 24 * 2**30)
    usage = type("Usage", (), {"free": 50 * 10**9})
    monkeypatch.setattr("dmqexport.pipeline_limits.shutil.disk_usage", lambda path: usage)
    build = Build(
        recipe(name, weights="random", bits="w4a4"), tmp_path / "o", Workspace(tmp_path / "w", SilentReporter())
    )
    with pytest.raises(
        ResourceError, match=r"estimated to need \S+ GB of memory, and this machine has 25\.8 GB"
    ) as caught:
        _ = build.model
    assert caught.value.exit_code == 5
    assert "--random-statistics" in str(caught.value)
    assert not list((tmp_path / "w").iterdir())
    drawn = recipe(name, weights="random", bits="w4a4", **{"calibration.statistics": "drawn"})
    with pytest.raises(ResourceError, match=r"estimated to need \S+ GB of free disk"):
        working_bytes(drawn, tmp_path)
    assert working_bytes(drawn.model_copy(update={"max_disk": "200GB"}), tmp_path) == WORKING_BYTES
    assert working_bytes(recipe("dit-xl-2-256", weights="random"), tmp_path) == WORKING_BYTES
