"""A bundle as a model of NVIDIA Triton Inference Server: the graph or the engine, its configuration, its description.

    REPO/NAME/config.pbtxt        what Triton reads, a `ModelConfig` in protobuf's text format
    REPO/NAME/denoiser.json       what a client needs to stand in for the denoiser (`dmqexport.serving`)
    REPO/NAME/VERSION/model.onnx  or model.plan, external data beside it

Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto and the server's
user guide, "Model Repository" and "Model Configuration".
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from dmqexport.bundle import ENGINES, GRAPH, Bundle, read_json
from dmqexport.errors import BundleError, RecipeError
from dmqexport.target import Target
from dmqexport.workspace import replacing

CONFIG = "config.pbtxt"
DESCRIPTION = "denoiser.json"
ENGINE_FILE = "engine.plan"
#: Written into the description; a client refuses any other.
DESCRIPTION_SCHEMA = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class PackageFormat(StrEnum):
    """What `dmqexport package --format` writes."""

    TRITON = "triton"


class Device(StrEnum):
    """Where the server's instances run."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True)
class Tensor:
    """One input or output of the served graph: `dims` without the batch, -1 where an extent varies."""

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class TritonOptions:
    """What the server is told beside the graph; None takes the default that the target suggests.

    max_batch: largest batch the server may form; delay_us: how long a request may wait for others, microseconds;
    instances: copies of the model on each device; threads: of one CPU instance, None for all cores.
    """

    name: str | None = None
    version: int = 1
    device: Device | None = None
    max_batch: int | None = None
    delay_us: int = 500
    instances: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class Packaged:
    """A written model: its folder in the repository, its name and version, and the file that is served."""

    folder: Path
    name: str
    version: int
    model: Path


def write_triton(bundle: Bundle, repository: Path, options: TritonOptions) -> Packaged:
    """Write `bundle` into the model repository, which may hold other models, and other versions of this one.

    Its name appears once it is complete. Raises RecipeError for an option that does not fit and
    for a version that exists, BundleError when the bundle lacks what the server needs, ResourceError for disks.
    """
    name = options.name if options.name is not None else bundle.path.resolve().name
    if not _NAME.fullmatch(name):
        raise RecipeError(f"--name {name!r} cannot be a model's name", hint="letters, digits, '.', '_' and '-'")
    source = _served_file(bundle)
    inputs, outputs = _signature(bundle)
    config = triton_config(bundle, name, inputs, outputs, options)
    texts = {CONFIG: config, DESCRIPTION: json.dumps(describe(bundle), indent=1, sort_keys=True) + "\n"}
    target, version = repository / name, str(options.version)
    if not target.exists():
        with replacing(target) as folder:
            _copy_model(source, folder / version)
            for file, text in texts.items():
                (folder / file).write_text(text, encoding="utf-8")
    else:
        _check_extends(target, version, texts)
        with replacing(target / version) as folder:
            _copy_model(source, folder)
    return Packaged(target, name, options.version, target / version / _served_name(source))


def triton_config(
    bundle: Bundle, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], options: TritonOptions
) -> str:
    """The text of config.pbtxt. Raises RecipeError for options that the bundle's target cannot follow."""
    engine = bundle.manifest["target"] == Target.TRT
    device = options.device or (Device.GPU if engine else Device.CPU)
    if engine and device is Device.CPU:
        raise RecipeError("--device cpu: a TensorRT engine runs on a GPU", hint="leave --device out")
    if bundle.manifest["target"] == Target.ORT_CPU and device is Device.GPU:
        raise RecipeError(
            f"--device gpu: {bundle.path} was lowered for CPUs", hint="build with --target trt, or with --target onnx"
        )
    if options.threads is not None and device is Device.GPU:
        raise RecipeError("--threads is about instances on the CPU", hint="leave --threads out")
    blocks = [
        "# Written by `dmqexport package`. Every version of the model is served with it, whatever its bits.\n"
        f"name: {_quoted(name)}\n"
        f'backend: "{"tensorrt" if engine else "onnxruntime"}"\n'
        f'default_model_filename: "{"model.plan" if engine else GRAPH}"\n'
        f"max_batch_size: {_max_batch(bundle, options)}"
    ]
    blocks += [_tensor("input", tensor) for tensor in inputs] + [_tensor("output", tensor) for tensor in outputs]
    blocks += [
        "# Every sample brings its own timestep, so requests of different steps share a batch.\n"
        f"dynamic_batching {{ max_queue_delay_microseconds: {options.delay_us} }}",
        f"instance_group {{ count: {options.instances} kind: KIND_{device.name} }}",
    ]
    if options.threads is not None:
        value = f'{{ string_value: "{options.threads}" }}'
        blocks.append(f'parameters {{ key: "intra_op_thread_count" value {value} }}')
    return "\n\n".join(blocks) + "\n"


def _tensor(kind: str, tensor: Tensor) -> str:
    """One input or output. The protocol has no tensors without dimensions beside the batch: those travel as [1]."""
    dims = ", ".join(map(str, tensor.dims or (1,)))
    reshape = "" if tensor.dims else "\n  reshape { shape: [ ] }"
    return (
        f"{kind} {{\n  name: {_quoted(tensor.name)}\n  data_type: {tensor.data_type}\n  dims: [ {dims} ]{reshape}\n}}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text)


def _max_batch(bundle: Bundle, options: TritonOptions) -> int:
    built = bundle.manifest.get("recipe", {}).get("lowering", {}).get("max_batch", 8)
    if options.max_batch is None:
        return int(built)
    if bundle.manifest["target"] == Target.TRT and options.max_batch > built:
        raise RecipeError(
            f"--max-batch {options.max_batch}: the engine was built for batches up to {built}",
            hint=f"rebuild with --set lowering.max_batch={options.max_batch}",
        )
    return options.max_batch


def _signature(bundle: Bundle) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of the deployed graph, which the engine shares."""
    import onnx

    try:
        graph = onnx.load(str(bundle.graph), load_external_data=False).graph
    except Exception as error:  # protobuf raises its own, and onnx whatever comes
        raise BundleError(f"{bundle.graph} cannot be read as ONNX: {error}", hint="rebuild the bundle") from error
    types = onnx.TensorProto.DataType
    return (
        tuple(_described(bundle, value, types) for value in graph.input),
        tuple(_described(bundle, value, types) for value in graph.output),
    )


#: ONNX element type → the server's; what diffusers denoisers take and give.
_TYPES = {"FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "INT64": "TYPE_INT64"}


def _described(bundle: Bundle, value: Any, types: Any) -> Tensor:
    tensor = value.type.tensor_type
    element = types.Name(tensor.elem_type)
    if element not in _TYPES:
        raise BundleError(f"{bundle.graph}: {value.name} is {element}, which denoisers do not take or give")
    extents = [int(dim.dim_value) if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    if not extents or extents[0] != -1:
        raise BundleError(
            f"{bundle.graph}: {value.name} has shape {extents}, whose first extent is not a free batch",
            hint="the server can only batch requests of a graph with a batch in front; rebuild the bundle",
        )
    return Tensor(value.name, _TYPES[element], tuple(extents[1:]))


def _served_file(bundle: Bundle) -> Path:
    """The graph or the engine; raises BundleError for what none of the server's backends loads."""
    target = bundle.manifest["target"]
    if target in (Target.TRT_RTX, Target.OPENVINO):
        what = "TensorRT-RTX engines" if target == Target.TRT_RTX else "this network in OpenVINO's format"
        other = "trt on a GPU host, or --target onnx" if target == Target.TRT_RTX else "ort-cpu"
        raise BundleError(
            f"{bundle.path} was built for {target}; no Triton backend that is written here loads {what}",
            hint=f"build with --target {other}",
        )
    if target != Target.TRT:
        if bundle.session_config:
            raise BundleError(
                f"{bundle.path}: the graph needs session options {bundle.session_config}, which the server cannot set"
            )
        return bundle.graph
    # A GPU host's finishing script adds engines after the manifest was written.
    found = sorted((bundle.path / bundle.component / ENGINES).glob(f"{Target.TRT}-*/{ENGINE_FILE}"))
    if bundle.engine_folder is not None:
        found = [bundle.engine_folder / ENGINE_FILE]
    if not found:
        raise BundleError(
            f"{bundle.path} has no TensorRT engine yet", hint="run `python finish_on_gpu.py` in it on the GPU host"
        )
    if len(found) > 1:
        names = ", ".join(path.parent.name for path in found)
        raise BundleError(
            f"{bundle.path} has several TensorRT engines: {names}; a version serves one",
            hint="in a copy of the bundle, keep the engine of the server's GPU and TensorRT",
        )
    return found[0]


def _served_name(source: Path) -> str:
    return "model.plan" if source.name == ENGINE_FILE else GRAPH


def _copy_model(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source, folder / _served_name(source))
    if source.name == GRAPH:
        for data in source.parent.glob(f"{GRAPH}.*"):
            shutil.copyfile(data, folder / data.name)


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a client needs to stand in for the denoiser without its weights."""
    return {
        "schema_version": DESCRIPTION_SCHEMA,
        "family": bundle.manifest["model"]["family"],
        "num_timesteps": bundle.manifest["num_timesteps"],
        "latent_size": bundle.manifest["sampling"].get("latent_size"),
        "config": read_json(bundle.path / bundle.component / "config.json"),
    }


def _check_extends(target: Path, version: str, texts: dict[str, str]) -> None:
    """Raise RecipeError unless `version` can stand beside what `target` holds: the versions share one configuration."""
    if (target / version).exists():
        raise RecipeError(
            f"{target / version} exists; nothing was touched", hint="give a new --version, or remove it yourself"
        )
    for file, text in texts.items():
        if not (target / file).is_file() or (target / file).read_text(encoding="utf-8") != text:
            raise RecipeError(
                f"{target / file} differs from this bundle's; the versions of a model share it; nothing was touched",
                hint="choose another --name, or the options that the first version was written with",
            )
