"""`--precision fp8` and `best` through the command line: proven layer by layer, and called what they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from dmqexport.bundle import open_bundle
from dmqexport.runtime import load_denoiser
from engines.trt import TrtFlavor, flavor_version
from tests.command_line import build, dmqexport
from tests.conftest import Built

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(flavor_version(TrtFlavor.RTX) is None, reason="needs tensorrt_rtx"),
]


def report(bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((bundle / "dmqexport" / "report.json").read_text(encoding="utf-8"))
    return document


def types(document: dict[str, Any]) -> dict[str, set[str]]:
    """Compute types of layers of 4 bits, of others that are planned, and of what was left in float."""
    found: dict[str, set[str]] = {"narrow": set(), "wide": set(), "float": set()}
    for layer in document["layers"]:
        bits = layer["nominal_bits"]["weight"]
        found["float" if bits is None else "narrow" if bits == 4 else "wide"].add(layer["compute"])
    return found


def test_fp8_is_called_fp8(text_bundle: Built, tmp_path: Path) -> None:
    where = (text_bundle.model, tmp_path / "out", text_bundle.work)
    answer = build(*where, "--bits", "w4a4", "--target", "trt-rtx", "--precision", "fp8")
    assert answer.code == 0, answer.err
    assert "proven int8" not in answer.out
    assert "FP8 x FP8" in answer.out
    document = report(tmp_path / "out")
    assert types(document) == {"narrow": {"fp8"}, "wide": {"int8"}, "float": {"float32"}}
    assert document["engine"]["layers_proven"] == document["engine"]["layers_planned"]
    assert set(document["operators"]) == {"fp8", "int8", "float32"}
    assert document["polygraphy"]["passed"], "what Polygraphy cannot run is no fault of the graph"
    page = (tmp_path / "out" / "dmqexport" / "report.html").read_text(encoding="utf-8")
    assert "no reason was recorded" not in page, "FP8 layers are not left in float"

    # The graph that the engine was built from runs wherever ONNX Runtime does.
    assert open_bundle(tmp_path / "out", verify=True).session_config
    assert load_denoiser(tmp_path / "out") is not None
    drawn = dmqexport("run", tmp_path / "out", "-p", "a", "--steps", 2, "-o", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err


@pytest.mark.parametrize(("compute", "kind"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_best_is_int8_and_half_precision(plain_bundle: Built, tmp_path: Path, compute: str, kind: str) -> None:
    where = (plain_bundle.model, tmp_path / "out", plain_bundle.work)
    options = ("--target", "trt-rtx", "--precision", "best", "--set", f"lowering.compute_type={compute}")
    answer = build(*where, "--bits", "w8a8", *options)
    assert answer.code == 0, answer.err
    assert "layers proven int8" in answer.out
    document = report(tmp_path / "out")
    found = types(document)
    assert found["wide"] == {"int8"}
    assert found["float"] <= {kind}
    assert set(document["operators"]) <= {"int8", kind}
    said = document["notes"]["latency"]
    assert ("before bfloat16" in said) == (compute == "bf16"), "bfloat16 does not run on CPUs"
    assert load_denoiser(tmp_path / "out") is not None
