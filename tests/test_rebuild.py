"""A bundle on a machine that it does not fit: refused with the command that mends it, or built anew in one step."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from dmqexport import pipeline_rebuild, runtime
from dmqexport.bundle import open_bundle, write_manifest
from dmqexport.errors import BundleError
from dmqexport.runtime import load_denoiser
from dmqexport.target import cpu_has_vnni
from engines import openvino_ir
from engines.trt import TrtFlavor, flavor_version
from passes.bind import graph_layers
from passes.lower.group_by_row import layer_graph
from tests.command_line import build, dmqexport
from tests.conftest import Built

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]

needs_vnni = pytest.mark.skipif(not cpu_has_vnni(), reason="bundles that are built here fit CPUs without VNNI")


def reseal(path: Path, manifest: Mapping[str, Any], **changed: object) -> None:
    """Write another manifest, as another machine's build would have."""
    fields = {**manifest, **changed}
    write_manifest(path, {key: value for key, value in fields.items() if key not in ("schema_version", "files")})


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def wide(text_bundle: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with 8-bit products that need VNNI, on a machine without it."""
    path = Path(shutil.copytree(text_bundle.path, tmp_path / "bundle"))
    monkeypatch.setattr(runtime, "cpu_has_vnni", lambda: False)
    return path


def predict(path: Path) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)
    return load_denoiser(path, threads=1)(sample, torch.tensor([1, 501]), text).sample


@needs_vnni
def test_integer_products_become_those_of_any_cpu(text_bundle: Built, wide: Path) -> None:
    with pytest.raises(BundleError, match="built for CPUs with VNNI") as caught:
        load_denoiser(wide)
    assert f"dmqexport inspect {wide} --rebuild" in str(caught.value)
    before = files(text_bundle.path)
    load_denoiser(wide, threads=1, rebuild=True)
    opened = open_bundle(wide, verify=True)
    assert opened.manifest["session"]["cpu_features"] == []
    onnx.checker.check_model(str(opened.graph))
    for node in layer_graph(ir.load(opened.graph)):
        weight = node.inputs[1].const_value if node.op_type == "MatMulIntegerToFloat" and node.inputs[1] else None
        if weight is not None and weight.dtype == ir.DataType.INT8:
            assert np.abs(weight.numpy().astype(np.int64)).max() <= 64
    torch.testing.assert_close(predict(wide), predict_here(text_bundle.path), rtol=0, atol=1e-4)
    assert files(text_bundle.path) == before
    again = files(wide)
    load_denoiser(wide, threads=1, rebuild=True)
    assert files(wide) == again, "a bundle that fits is left alone"


@needs_vnni
def test_large_tensors_beside_the_graph_are_read(wide: Path) -> None:
    """onnx_ir refuses to read tensors from a file of several names, as a copy by links would leave it."""
    opened = open_bundle(wide)
    ir.save(ir.load(opened.graph), opened.graph, external_data="model.onnx.data", size_threshold_bytes=256)
    manifest = dict(opened.manifest)
    reseal(wide, manifest)
    before = predict_here(wide)
    load_denoiser(wide, threads=1, rebuild=True)
    torch.testing.assert_close(predict(wide), before, rtol=0, atol=1e-4)


def predict_here(path: Path) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "cpu_has_vnni", lambda: True)
        return predict(path)


@needs_vnni
def test_what_was_changed_is_not_rebuilt(wide: Path) -> None:
    graph = wide / "unet" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    before = files(wide)
    answer = dmqexport("inspect", wide, "--rebuild")
    assert answer.code == BundleError.exit_code
    assert "content differs" in answer.err
    assert files(wide) == before


@needs_vnni
def test_a_rebuild_that_fails_leaves_the_bundle_as_it_was(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BundleError("no room")

    before = files(wide)
    monkeypatch.setattr(pipeline_rebuild, "write_manifest", fail)
    with pytest.raises(BundleError, match="no room"):
        pipeline_rebuild.rebuild(wide)
    assert files(wide) == before
    assert [path.name for path in wide.parent.iterdir()] == ["bundle"]


@needs_vnni
@pytest.mark.skipif(openvino_ir.version() is None, reason="no OpenVINO")
def test_openvinos_products_become_those_of_any_cpu(
    plain_bundle: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    answer = build(
        plain_bundle.model, path, plain_bundle.work, "--bits", "w8a8", "--target", "openvino", "--attention-bits", "8"
    )
    assert answer.code == 0, answer.err
    assert open_bundle(path).manifest["session"]["cpu_features"] == ["vnni"]
    sample, timestep = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 15])
    before = load_denoiser(path, threads=1)(sample, timestep).sample
    monkeypatch.setattr(runtime, "cpu_has_vnni", lambda: False)
    with pytest.raises(BundleError, match="built for CPUs with VNNI"):
        load_denoiser(path)
    denoiser = load_denoiser(path, threads=1, rebuild=True)
    opened = open_bundle(path, verify=True)
    assert opened.manifest["session"]["cpu_features"] == []
    for nodes in graph_layers(ir.load(opened.graph).graph).values():
        for node in nodes.compute:
            stored = None if node.inputs[1] is None else node.inputs[1].producer()
            assert stored is not None
            assert np.abs(stored.inputs[0].const_value.numpy().astype(np.int64)).max() <= 64
    torch.testing.assert_close(denoiser(sample, timestep).sample, before, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(
            "trt-rtx", marks=pytest.mark.skipif(flavor_version(TrtFlavor.RTX) is None, reason="no TensorRT-RTX")
        ),
        pytest.param("openvino", marks=pytest.mark.skipif(openvino_ir.version() is None, reason="no OpenVINO")),
    ],
)
def test_an_engine_of_another_version_is_built_anew(plain_bundle: Built, tmp_path: Path, target: str) -> None:
    path = tmp_path / "bundle"
    answer = build(plain_bundle.model, path, plain_bundle.work, "--bits", "w8a8", "--target", target)
    assert answer.code == 0, answer.err
    manifest = open_bundle(path).manifest
    built = manifest["engine"]
    folder = path / built["folder"]
    folder.rename(folder.with_name("other"))
    foreign = "9999.0" if target == "openvino" else "1.0"
    reseal(path, manifest, engine={**built, "version": foreign, "folder": "unet/engines/other"})
    if target == "openvino":
        with pytest.raises(BundleError, match=r"built by OpenVINO 9999\.0; here is"):
            load_denoiser(path)
    answer = dmqexport("inspect", path, "--rebuild", "--verify", "--json")
    assert answer.code == 0, answer.err
    assert f"rebuilt for this machine, since {'its engine was ' if target == 'trt-rtx' else ''}built by" in answer.err
    opened = open_bundle(path, verify=True)
    assert opened.manifest["engine"] == built, "the same builder makes what the first build made"
    assert json.loads(answer.out)["manifest"]["engine"] == built
    assert opened.engine_folder is not None
    assert sorted(item.name for item in opened.engine_folder.parent.iterdir()) == [opened.engine_folder.name]
    load_denoiser(path, threads=1)
