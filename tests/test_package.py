"""Model repositories for Triton: read back through its own schema, and nothing written where it must not be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dmqexport.bundle import open_bundle, write_manifest
from dmqexport.errors import BundleError, RecipeError
from dmqexport.package import Device, TritonOptions, write_triton
from tests.command_line import dmqexport, refused

KINDS = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64}


def graph(path: Path, batch: str | int = "batch") -> None:
    """A denoiser's signature around a graph that does next to nothing; its weight lies beside it."""
    inputs = [
        helper.make_tensor_value_info(name, KINDS[kind], [batch, *rest])
        for name, kind, rest in (
            ("sample", "float", [4, "height", 8]),
            ("timestep", "int64", []),
            ("encoder_hidden_states", "float", [16, 128]),
        )
    ]
    output = helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [batch, 4, "height", 8])
    weight = numpy_helper.from_array(np.ones(8, np.float32), "weight")
    node = helper.make_node("Mul", ["sample", "weight"], ["out_sample"])
    model = helper.make_model(helper.make_graph([node], "g", inputs, [output], [weight]))
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)


def bundle(folder: Path, target: str = "ort-cpu", *, engines: tuple[str, ...] = (), **fields: Any) -> Path:
    unet = folder / "unet"
    unet.mkdir(parents=True)
    graph(unet / "model.onnx", fields.pop("batch", "batch"))
    (unet / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "in_channels": 4}')
    manifest: dict[str, Any] = {
        "component": "unet",
        "model": {"name": "m", "family": "UNet2DConditionModel", "fingerprint": "0"},
        "bits": "w8a8",
        "target": target,
        "num_timesteps": 1000,
        "session": {"config": {}, "cpu_features": ["vnni"]},
        "sampling": {"steps": 4, "guidance": 1.0, "latent_size": [8, 8]},
        "recipe": {"lowering": {"max_batch": 6}},
    }
    (folder / "dmqexport").mkdir()
    write_manifest(folder, manifest | fields)
    for name in engines:  # as a GPU host adds them, after the build
        (unet / "engines" / name).mkdir(parents=True)
        (unet / "engines" / name / "engine.plan").write_bytes(b"plan of " + name.encode())
    return folder


def parsed(folder: Path) -> Any:
    """config.pbtxt through the schema that Triton publishes; unknown fields and wrong types are errors."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="pip install 'dmqexport[serving]'")
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


def tensors(listed: Any) -> list[tuple[str, int, list[int], list[int] | None]]:
    return [
        (item.name, item.data_type, list(item.dims), list(item.reshape.shape) if item.HasField("reshape") else None)
        for item in listed
    ]


FP32, INT64 = 11, 9  # numbers of inference.DataType, which are on the wire


def test_the_onnx_runtime_backend(tmp_path: Path) -> None:
    made = write_triton(open_bundle(bundle(tmp_path / "faces")), tmp_path / "repo", TritonOptions(threads=3))
    assert made.folder == tmp_path / "repo" / "faces"
    assert sorted(p.relative_to(tmp_path / "repo").as_posix() for p in made.folder.rglob("*") if p.is_file()) == [
        "faces/1/model.onnx",
        "faces/1/model.onnx.data",
        "faces/config.pbtxt",
        "faces/denoiser.json",
    ]
    onnx.checker.check_model(str(made.model))  # finds its external data
    config = parsed(made.folder)
    assert (config.name, config.backend, config.default_model_filename) == ("faces", "onnxruntime", "model.onnx")
    assert config.max_batch_size == 6, "the recipe's"
    assert tensors(config.input) == [
        ("sample", FP32, [4, -1, 8], None),
        ("timestep", INT64, [1], []),
        ("encoder_hidden_states", FP32, [16, 128], None),
    ]
    assert tensors(config.output) == [("out_sample", FP32, [4, -1, 8], None)]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert config.parameters["intra_op_thread_count"].string_value == "3"


def test_the_tensorrt_backend(tmp_path: Path) -> None:
    opened = open_bundle(bundle(tmp_path / "faces", "trt", engines=("trt-sm90-10.9",)))
    made = write_triton(opened, tmp_path / "repo", TritonOptions("fast", 3, max_batch=4, delay_us=0, instances=2))
    assert made.model == tmp_path / "repo/fast/3/model.plan"
    assert made.model.read_bytes() == b"plan of trt-sm90-10.9"
    assert [p.name for p in made.model.parent.iterdir()] == ["model.plan"]
    config = parsed(made.folder)
    assert (config.name, config.backend, config.default_model_filename) == ("fast", "tensorrt", "model.plan")
    assert config.max_batch_size == 4
    assert config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, group.KIND_GPU)


def test_a_canonical_graph_may_run_on_a_gpu(tmp_path: Path) -> None:
    options = TritonOptions(device=Device.GPU)
    made = write_triton(open_bundle(bundle(tmp_path / "faces", "onnx")), tmp_path / "repo", options)
    (group,) = parsed(made.folder).instance_group
    assert group.kind == group.KIND_GPU


def test_the_description_is_what_a_client_needs(tmp_path: Path) -> None:
    made = write_triton(open_bundle(bundle(tmp_path / "faces")), tmp_path / "repo", TritonOptions())
    assert json.loads((made.folder / "denoiser.json").read_text()) == {
        "schema_version": 1,
        "family": "UNet2DConditionModel",
        "num_timesteps": 1000,
        "latent_size": [8, 8],
        "config": {"_class_name": "UNet2DConditionModel", "in_channels": 4},
    }


def test_versions_stand_side_by_side_and_share_the_configuration(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    eight, four = bundle(tmp_path / "faces"), bundle(tmp_path / "four" / "faces", bits="w4a4")
    write_triton(open_bundle(eight), repository, TritonOptions())
    write_triton(open_bundle(four), repository, TritonOptions(version=2))
    write_triton(open_bundle(four), repository, TritonOptions(name="other"))
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    assert {path.parent.name for path in before if path.name == "model.onnx"} == {"1", "2"}
    with pytest.raises(RecipeError, match="faces/2 exists; nothing was touched"):
        write_triton(open_bundle(eight), repository, TritonOptions(version=2))
    with pytest.raises(RecipeError, match="versions of a model share it"):
        write_triton(open_bundle(eight), repository, TritonOptions(version=3, max_batch=2))
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("target", "made", "options", "error", "words"),
    [
        ("trt", {}, {}, BundleError, "no TensorRT engine yet"),
        ("trt", {"engines": ("trt-sm80-10.9", "trt-sm90-10.9")}, {}, BundleError, "several TensorRT engines"),
        ("trt", {"engines": ("trt-sm90-10.9",)}, {"max_batch": 7}, RecipeError, "built for batches up to 6"),
        ("trt", {"engines": ("trt-sm90-10.9",)}, {"device": Device.CPU}, RecipeError, "runs on a GPU"),
        ("trt", {"engines": ("trt-sm90-10.9",)}, {"threads": 2}, RecipeError, "leave --threads out"),
        ("trt-rtx", {"engines": ("trt-rtx-any-1.2",)}, {}, BundleError, "--target trt on a GPU host"),
        ("openvino", {}, {}, BundleError, "--target ort-cpu"),
        ("ort-cpu", {}, {"device": Device.GPU}, RecipeError, "lowered for CPUs"),
        ("ort-cpu", {}, {"name": "../up"}, RecipeError, "cannot be a model's name"),
        ("ort-cpu", {"batch": 2}, {}, BundleError, "not a free batch"),
        ("ort-cpu", {"session": {"config": {"a": "1"}}}, {}, BundleError, "session options"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_and_nothing_written(
    tmp_path: Path, target: str, made: dict[str, Any], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    opened = open_bundle(bundle(tmp_path / "faces", target, **made))
    with pytest.raises(error) as caught:
        write_triton(opened, tmp_path / "repo", TritonOptions(**options))
    assert words in str(caught.value)
    assert not (tmp_path / "repo").exists()


def test_a_graph_that_is_no_onnx_is_named(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "faces")
    size = (folder / "unet/model.onnx").stat().st_size
    (folder / "unet/model.onnx").write_bytes(b"\xff" * size)
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read as ONNX"):
        write_triton(open_bundle(folder), tmp_path / "repo", TritonOptions())


def test_the_command(tmp_path: Path) -> None:
    folder, repository = bundle(tmp_path / "faces"), tmp_path / "repo"
    answer = dmqexport("package", folder, "--format", "triton", "-o", repository, "--name", "m", "--verify", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["model"] == str(repository / "m/1/model.onnx")
    assert (repository / "m/1/model.onnx").is_file()
    answer = dmqexport("package", folder, "--format", "triton", "-o", repository, "--version", 2)
    assert "only on CPUs with VNNI" in answer.out
    again = dmqexport("package", folder, "--format", "triton", "-o", repository, "--name", "m")
    refused(again, 2, ["m/1 exists", "give a new --version"])
    refused(dmqexport("package", folder, "--format", "kserve", "-o", repository), 2, ["kserve", "known: triton"])
    refused(
        dmqexport("package", folder, "--format", "triton", "-o", repository, "--device", "tpu"), 2, ["known: cpu, gpu"]
    )
    (tmp_path / "empty").mkdir()
    refused(dmqexport("package", tmp_path / "empty", "--format", "triton", "-o", repository), 6, ["not a dmqexport"])
    file = tmp_path / "file"
    file.write_text("mine")
    refused(dmqexport("package", folder, "--format", "triton", "-o", file), 5, [str(file)])
    assert file.read_text() == "mine"
