"""Bundles for OpenVINO, from the build to the picture, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmqexport.bundle import open_bundle, open_manifest, write_manifest
from dmqexport.errors import BundleError
from dmqexport.runtime import load_denoiser
from engines.openvino_ir import IR_JSON, OpenVinoRunner, devices
from tests.command_line import Answer, build, dmqexport, refused
from tests.conftest import Built
from tests.models.tiny_pipelines import copy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

TARGET = ("--target", "openvino")


@pytest.fixture(scope="module")
def bundles(text_bundle: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Answer]]:
    """w4a4 and w8a8, of the model and the work folder of the shared text bundle."""
    folder = tmp_path_factory.mktemp("openvino")
    made = {}
    for bits in ("w4a4", "w8a8"):
        answer = build(text_bundle.model, folder / bits, text_bundle.work, "--bits", bits, *TARGET)
        assert answer.code == 0, answer.err
        made[bits] = (folder / bits, answer)
    return made


def report(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / "dmqexport" / "report.json").read_text())
    return document


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
def test_every_planned_layer_is_proven_int8(bundles: dict[str, tuple[Path, Answer]], bits: str) -> None:
    path, answer = bundles[bits]
    document = report(path)
    planned = [layer for layer in document["layers"] if layer["sqnr_db"] is not None]
    assert {layer["compute"] for layer in planned} == {"int8"}
    assert document["engine"]["layers_proven"] == document["engine"]["layers_planned"] == len(planned)
    said, _, types = document["engine"]["note"].partition(": ")
    assert said == "precision read back from the executed network"
    counts = [found.split(" ", 1) for found in types.split(", ")]
    assert {kind for _, kind in counts} <= {"i8 x i8", "u8 x i8"}
    assert sum(int(count) for count, _ in counts) >= len(planned), "a layer of two halves has two products"
    assert f"{len(planned)} of {len(planned)} layers proven int8" in answer.out
    assert document["latency"]["ratio"] > 0
    assert document["metrics"]["eps_sqnr_db"] > 1


def test_what_is_validated_is_what_runs(bundles: dict[str, tuple[Path, Answer]], text_bundle: Built) -> None:
    """The bundle's denoiser is the IR, and computes what its ONNX graph computes up to ties."""
    path, _ = bundles["w8a8"]
    denoiser = load_denoiser(path, threads=1)
    assert isinstance(denoiser.runner, OpenVinoRunner)
    assert denoiser.runner.path.name == "model.xml"
    random = np.random.default_rng(0)
    inputs = {
        "sample": random.normal(size=(3, 4, 8, 8)).astype(np.float32),
        "timestep": np.array([1, 501, 999]),
        "encoder_hidden_states": random.normal(size=(3, 16, 16)).astype(np.float32),
    }
    together = denoiser.runner.run(inputs)["out_sample"]
    for index in range(3):
        alone = denoiser.runner.run({name: value[index : index + 1] for name, value in inputs.items()})["out_sample"]
        np.testing.assert_allclose(together[index : index + 1], alone, rtol=0, atol=1e-5)


def test_the_verbs_take_the_bundle(bundles: dict[str, tuple[Path, Answer]], text_bundle: Built, tmp_path: Path) -> None:
    path, _ = bundles["w4a4"]
    seen = dmqexport("inspect", path, "--verify")
    assert seen.code == 0, seen.err
    assert "openvino" in seen.out
    drawn = dmqexport("run", path, "-o", tmp_path / "a.png", "-p", "a", "--steps", "2", "--threads", "1")
    assert drawn.code == 0, drawn.err
    arguments = ("--runs", "3", "--batch", "2", "--threads", "1", "--work", text_bundle.work, "--json")
    timed = dmqexport("bench", path, *arguments, "--details")
    assert timed.code == 0, timed.err
    assert timed.json["ratio"] > 0
    timed_layers = {layer["layer"] for layer in timed.json["layers"] if layer["ratio"]}
    assert len(timed_layers) > len(timed.json["layers"]) / 2
    assert "Convolution" in {row["op"] for row in timed.json["operators"]["quantized"]}
    assert "openvino" in dmqexport("doctor").out


def test_a_damaged_network_is_refused(bundles: dict[str, tuple[Path, Answer]], tmp_path: Path) -> None:
    path = copy(bundles["w4a4"][0], tmp_path / "bundle")
    weights = next(path.glob("unet/engines/openvino-cpu-*/model.bin"))
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(dmqexport("run", path, "-o", tmp_path / "a.png", "-p", "a"), 6, [weights.name, "bytes, expected"])
    with pytest.raises(BundleError, match=r"model\.bin"):
        load_denoiser(path)


def test_a_network_whose_int8_cannot_be_proven_here_does_not_run(
    bundles: dict[str, tuple[Path, Answer]], tmp_path: Path
) -> None:
    """What another version of OpenVINO may do to a bundle: here the proof asks for a layer that is not there."""
    path = copy(bundles["w4a4"][0], tmp_path / "bundle")
    (file,) = path.glob(f"unet/engines/*/{IR_JSON}")
    document = json.loads(file.read_text())
    document["expected"]["lost"] = ["lost/Conv"]
    file.write_text(json.dumps(document))
    write_manifest(path, {k: v for k, v in open_manifest(path).items() if k not in ("files", "schema_version")})
    answer = dmqexport("run", path, "-o", tmp_path / "a.png", "-p", "a")
    assert answer.code == 1
    assert "lost/Conv" in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "a.png").exists()


def test_weight_only_layers_stay_packed_and_in_float(plain_bundle: Built, tmp_path: Path) -> None:
    answer = build(plain_bundle.model, tmp_path / "out", plain_bundle.work, "--bits", "w4a16", *TARGET)
    assert answer.code == 0, answer.err
    document = report(tmp_path / "out")
    assert {layer["compute"] for layer in document["layers"]} == {"float32"}
    assert document["engine"]["layers_planned"] == 0


@pytest.mark.skipif("GPU" in {name.partition(".")[0] for name in devices()}, reason="there is a GPU")
def test_a_device_that_is_not_here_is_said_before_anything_is_calibrated(tiny_text: Path, tmp_path: Path) -> None:
    device = ("--set", "lowering.openvino_device=GPU")
    answer = build(tiny_text, tmp_path / "out", tmp_path / "work", "--bits", "w4a4", *TARGET, *device)
    refused(answer, 7, ["OpenVINO sees no GPU here", "CPU", "lowering.openvino_device=CPU"])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "work").exists()
    wrong = build(tiny_text, tmp_path / "out", tmp_path / "work", *TARGET, "--set", "lowering.openvino_device=TPU")
    refused(wrong, 2, ["lowering.openvino_device", "CPU", "TPU"])


def test_without_openvino_the_bundle_says_what_to_install(
    bundles: dict[str, tuple[Path, Answer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    answer = dmqexport("run", bundles["w4a4"][0], "-o", tmp_path / "a.png", "-p", "a")
    refused(answer, 7, ["OpenVINO is not installed", "dmqexport[openvino]"])


def test_the_graph_beside_the_network_runs_in_onnx_runtime(
    bundles: dict[str, tuple[Path, Answer]], tmp_path: Path
) -> None:
    """The kept ONNX needs no operator that other runtimes lack, and packs weights of four bits."""
    import onnx

    model = onnx.load(bundles["w4a4"][0] / "unet" / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert onnx.TensorProto.UINT4 in {tensor.data_type for tensor in model.graph.initializer}
    opened = open_bundle(bundles["w4a4"][0], verify=True)
    assert opened.engine_folder is not None
    shutil.copytree(opened.engine_folder, tmp_path / "ir")
    assert opened.manifest["engine"]["folder"].startswith("unet/engines/openvino-cpu-")
