"""Kernels chosen by timings, through the command line: recorded, reproducible, and refused before any work."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dmqexport.bundle import open_bundle
from dmqexport.tuning import Kernel, Timings, read_timings
from tests.command_line import build, refused
from tests.conftest import Built

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]


def operators(graph: onnx.GraphProto) -> set[str]:
    """Operator types of a graph and of the graphs in its nodes."""
    found = {node.op_type for node in graph.node}
    return found.union(*(operators(part.g) for node in graph.node for part in node.attribute if part.HasField("g")))


def test_a_build_measures_once_and_does_what_timings_say(
    plain_bundle: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where = (plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w8a8")
    host = build(*where, "--set", "lowering.tune=host", verb="compile")
    assert host.code == 0, host.err
    (kept,) = (tmp_path / "cache" / "dmqexport" / "tuning").iterdir()
    timings = read_timings(kept)
    assert timings.times
    again = build(*where, "--set", "lowering.tune=host", verb="compile")
    assert again.stages["tuning"]
    assert again.stages["passes"]

    float_wins = Timings("elsewhere", "1", {s: {Kernel.PRODUCT: 2.0, Kernel.FLOAT: 1.0} for s in timings.times})
    told = tmp_path / "told.json"
    told.write_text(float_wins.to_json(), encoding="utf-8")
    answer = build(*where, "--set", f"lowering.tune={told}", "--set", "validation.retrieval=0")
    assert answer.code == 0, answer.err
    bundle = open_bundle(tmp_path / "out")
    kernels = bundle.manifest["kernels"]
    assert (kernels["mode"], kernels["cpu"]) == ("file", "elsewhere")
    assert set(kernels["other"]) == {layer.name for layer in bundle.plan.layers}
    document = json.loads((bundle.path / "dmqexport" / "report.json").read_text(encoding="utf-8"))
    layers = {layer["name"]: layer for layer in document["layers"]}
    for name in kernels["other"]:
        assert layers[name]["compute"] == "float32"
        assert "float 1.000 ms, int8 2.000 ms" in layers[name]["reason"]
    assert "MatMulIntegerToFloat" not in operators(onnx.load(bundle.graph).graph)

    # Where the products are made must not show: the codes are the same.
    plain = open_bundle(plain_bundle.path)
    assert plain.manifest["kernels"] == {"mode": "off", "other": {}}
    assert "MatMulIntegerToFloat" in operators(onnx.load(plain.graph).graph)
    assert plain.plan.fingerprint == bundle.plan.fingerprint
    generator = np.random.default_rng(0)
    feeds = {"sample": generator.normal(size=(2, 3, 8, 8)).astype(np.float32), "timestep": np.array([3, 3])}
    left, right = (
        onnxruntime.InferenceSession(str(one.graph), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for one in (plain, bundle)
    )
    signal, noise = float((left**2).sum()), float(((left - right) ** 2).sum())
    assert 10 * np.log10(signal / max(noise, 1e-30)) > 40


def test_a_file_without_timings_is_refused_before_any_work(plain_bundle: Built, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}", encoding="utf-8")
    where = (plain_bundle.model, tmp_path / "out", tmp_path / "work", "--bits", "w8a8")
    for path in (tmp_path / "no.json", tmp_path / "missing.json"):
        refused(build(*where, "--set", f"lowering.tune={path}"), 2, (path.name, "lowering.tune=host"))
    assert not (tmp_path / "out").exists()
