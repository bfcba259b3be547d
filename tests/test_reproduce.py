"""Two builds of one recipe: the same to the byte, and told apart where they are not."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmqexport.bundle import MANIFEST, open_manifest, write_manifest
from dmqexport.errors import BundleError
from dmqexport.reproduce import compare_bundles
from tests.command_line import SMALL, dmqexport, refused
from tests.conftest import Built
from tests.models.tiny_pipelines import copy

PLAN, ARRAYS = "dmqexport/quant_plan.json", "dmqexport/quant_plan.safetensors"


def resealed(bundle: Path) -> Path:
    fields = {key: value for key, value in open_manifest(bundle).items() if key not in ("files", "schema_version")}
    write_manifest(bundle, fields)
    return bundle


@pytest.mark.slow
def test_two_builds_from_nothing_are_the_same_to_the_byte(tiny_plain: Path, tmp_path: Path) -> None:
    """Separate processes, work folders and hash seeds; w4a4 trains, packs, merges factors and lowers for the CPU."""
    recipe = tmp_path / "recipe.yaml"
    small = [*SMALL, "--set", "training.blocks.iterations=2"]
    recipe.write_text(dmqexport("build", "-m", tiny_plain, "-o", "x", *small, "--bits", "w4a4", "--dry-run").out)
    kept = tmp_path / "kept"
    answer = dmqexport("verify-reproducible", "--recipe", recipe, "--keep", kept, "--json")
    assert answer.code == 0, answer.err + answer.out
    assert answer.json["different"] == []
    assert {MANIFEST, PLAN, ARRAYS, "unet/model.onnx", "dmqexport/recipe.yaml"} <= set(answer.json["same"])
    left, right = (kept / name / "bundle" / "unet" / "model.onnx" for name in ("first", "second"))
    assert left.read_bytes() == right.read_bytes()
    refused(dmqexport("verify-reproducible", "--recipe", recipe, "--keep", kept), 2, ["first exists", "--keep"])


@pytest.mark.slow
def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    answer = dmqexport("verify-reproducible", "-m", tmp_path / "empty", "--bits", "w4a4")
    refused(answer, 1, ["the first of the two builds failed", str(tmp_path / "empty")])


@pytest.mark.slow
def test_what_differs_is_named_with_its_place(plain_bundle: Built, tmp_path: Path) -> None:
    first, second = (copy(plain_bundle.path, tmp_path / name) for name in ("first", "second"))
    assert compare_bundles(first, second).different == ()
    (second / "dmqexport" / "report.json").write_text('{"metrics": {}, "layers": []}')
    assert compare_bundles(first, resealed(second)).different == (), "measurements are not compared"

    document = json.loads((second / PLAN).read_text())
    document["rows"] += 1
    (second / PLAN).write_text(json.dumps(document))
    arrays = load_file(second / ARRAYS)
    name = next(name for name in arrays if arrays[name].dtype == np.float32)
    save_file({**arrays, name: np.nextafter(arrays[name], np.float32(2))}, second / ARRAYS)
    (second / "unet" / "model.onnx.data").write_bytes(b"more")
    compared = compare_bundles(first, resealed(second))
    assert compared.different == (PLAN, ARRAYS, "unet/model.onnx.data", MANIFEST)
    assert compared.details[PLAN] == ("rows",)
    assert f"files.{PLAN}.sha256" in compared.details[MANIFEST]
    with pytest.raises(
        BundleError, match=r"(?s)differ in 4 of .*quant_plan\.json: rows\n.*manifest\.json: files\.dmqexport"
    ):
        compared.require_equal()


@pytest.mark.slow
def test_damaged_bundles_are_not_compared(plain_bundle: Built, tmp_path: Path) -> None:
    damaged = copy(plain_bundle.path, tmp_path / "damaged")
    (damaged / PLAN).write_text("{}")
    with pytest.raises(BundleError, match=r"quant_plan\.json"):
        compare_bundles(plain_bundle.path, damaged)
