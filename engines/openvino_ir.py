"""OpenVINO: intermediate representation (IR) on disk, execution with static shapes, int8 proven from what is executed.

The proof reads the runtime model of the compiled network: which kernel executes each planned product, and the types of
its two operands. OpenVINO never says when a Q/DQ pair around a product was not matched; it runs that product in float.

Shapes are static: with a dynamic batch the CPU plugin neither fuses element-wise chains nor normalizations, and takes
twice as long, float or not (measured with 2026.4.1). So a runner compiles the network once for every batch that it
meets, and keeps the latest few.

Source: https://docs.openvino.ai/2026/openvino-workflow/running-inference.html and, for the runtime model's fields,
https://docs.openvino.ai/2026/api/c_cpp_api/group__ov__runtime__cpp__api.html (ov::ExecutionGraphInfoSerialization).
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dmqexport.errors import BackendMissingError, EngineError, ResourceError
from engines.ort import available_cores
from engines.runner import Arrays
from engines.trt_layers import LayerProof, describe

IR_XML = "model.xml"
IR_BIN = "model.bin"
#: Beside the IR: the device that it was built for, and which nodes must run in int8.
IR_JSON = "precision.json"
#: Compiled networks that a runner keeps, one for every set of input shapes.
_KEPT = 4
_PRODUCTS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
_INTEGER = ("i8", "u8")
_FLOAT_HINT = "INFERENCE_PRECISION_HINT"  # without it a CPU with bfloat16 rounds what is meant to be float


@dataclass(frozen=True)
class ExecutedLayer:
    """One node of the runtime model. inputs: element types of its operands, in order; sources: names before fusion.

    shapes: of its operands; result: of its output.
    """

    name: str
    kind: str
    kernel: str
    inputs: tuple[str, ...]
    output: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    result: tuple[int, ...] = ()


@dataclass(frozen=True)
class IrBuild:
    """An IR on disk. proofs: one for every planned product, all int8; batches: which ones were compiled for them."""

    xml: Path
    version: str
    device: str
    seconds: float
    size_bytes: int
    batches: tuple[int, ...]
    proofs: tuple[LayerProof, ...]


def version() -> str | None:
    """Version of OpenVINO, None when it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    return str(openvino.__version__).split("-")[0]


def devices() -> tuple[str, ...]:
    """Devices that OpenVINO sees here: CPU, GPU, NPU, or GPU.0 and GPU.1; empty when it is not installed."""
    return () if version() is None else tuple(_core().available_devices)


def float_types(device: str) -> tuple[str, ...]:
    """Types narrower than float32 that `device` computes float networks in, as `OpenVinoRunner` takes them."""
    found = _core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    return tuple(hint for hint, name in (("bf16", "BF16"), ("f16", "FP16")) if name in found)


def check_device(device: str) -> None:
    """Raise BackendMissingError, naming what there is, unless OpenVINO and `device` are here."""
    if version() is None:
        raise BackendMissingError("OpenVINO is not installed", hint="pip install 'dmqexport[openvino]'")
    found = devices()
    if device not in {name.partition(".")[0] for name in found}:
        raise BackendMissingError(
            f"OpenVINO sees no {device} here; its devices are: {', '.join(found) or 'none'}",
            hint="choose one with --set lowering.openvino_device=CPU"
            + ("" if device == "CPU" else f", or install the driver of the {device}"),
        )


class OpenVinoRunner:
    """A network on one device. Inputs and outputs are numpy arrays by name; calls from several threads take turns."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "CPU",
        threads: int | None = None,
        expected: Mapping[str, Sequence[str]] | None = None,
        precision: str = "f32",
        counting: bool = False,
    ) -> None:
        """Load an IR (`model.xml`) or an ONNX graph. threads (CPU only): None takes every core the process may use.

        expected: layer → its nodes that must run in int8, proven anew for every shape that is compiled. precision: what
        the CPU computes in where nothing is quantized, one of `float_types`. counting: `counters` will be asked for.
        Raises BackendMissingError without OpenVINO or the device, EngineError when the network does not load.
        """
        check_device(device)
        self.path = path
        self.device = device
        self._expected = dict(expected or {})
        self._core = _core()
        self._options: dict[str, Any] = {}
        if device == "CPU":
            self._options = {
                _FLOAT_HINT: precision,
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": threads or available_cores(),
            }
        if counting:
            self._options["PERF_COUNT"] = True
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        self._lock = threading.Lock()
        network = self._read()
        self.input_names: tuple[str, ...] = tuple(item.get_any_name() for item in network.inputs)
        self.output_names: tuple[str, ...] = tuple(item.get_any_name() for item in network.outputs)

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Execute once; returns `outputs` (default: all) by name. Raises EngineError on missing or misshapen inputs.

        The first call with new shapes compiles for them, which takes seconds.
        """
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise EngineError(f"{self.path.name}: inputs {missing} missing, got {sorted(inputs)}")
        feeds = {name: inputs[name] for name in self.input_names}
        with self._lock:
            try:
                request = self._request({name: array.shape for name, array in feeds.items()})
                request.infer(feeds)
                names = list(outputs) if outputs is not None else list(self.output_names)
                return {name: np.array(request.get_tensor(name).data) for name in names}
            except RuntimeError as error:  # OpenVINO raises nothing else
                shapes = {name: (array.dtype.name, array.shape) for name, array in feeds.items()}
                raise EngineError(f"{self.path.name}: OpenVINO failed on inputs {shapes}: {error}") from error

    def executed(self, shapes: Mapping[str, Sequence[int]]) -> list[ExecutedLayer]:
        """What the device executes for inputs of these shapes: the runtime model, in order of execution."""
        with self._lock:
            return self._listed(self._request(shapes).get_compiled_model())

    def counters(self, inputs: Arrays) -> dict[str, float]:
        """Execute once; milliseconds of every node that was executed, by its name in `executed`."""
        self.run(inputs)
        with self._lock:
            request = self._request({name: inputs[name].shape for name in self.input_names})
            return {
                node.node_name: node.real_time.total_seconds() * 1e3
                for node in request.get_profiling_info()
                if node.status == node.Status.EXECUTED
            }

    def _request(self, shapes: Mapping[str, Sequence[int]]) -> Any:
        key = tuple(tuple(shapes[name]) for name in self.input_names)
        if key not in self._requests:
            network = self._read()
            network.reshape(dict(zip(self.input_names, (list(shape) for shape in key), strict=True)))
            compiled = self._core.compile_model(network, self.device, self._options)
            if self._expected:
                prove_int8(self._listed(compiled), self._expected)
            self._requests[key] = compiled.create_infer_request()
            while len(self._requests) > _KEPT:
                self._requests.popitem(last=False)
        self._requests.move_to_end(key)
        return self._requests[key]

    def _listed(self, compiled: Any) -> list[ExecutedLayer]:
        try:
            return _executed(compiled)
        except RuntimeError as error:
            raise EngineError(
                f"{self.path.name}: OpenVINO does not say what the {self.device} executes, so nothing can be proven",
                hint="build for the CPU: --set lowering.openvino_device=CPU",
            ) from error

    def _read(self) -> Any:
        try:
            return self._core.read_model(str(self.path))
        except RuntimeError as error:  # OpenVINO raises nothing else
            raise EngineError(f"{self.path}: OpenVINO cannot load this network: {error}") from error


def build_ir(
    graph: Path,
    folder: Path,
    shapes: Mapping[int, Mapping[str, Sequence[int]]],
    *,
    device: str,
    expected: Mapping[str, Sequence[str]],
) -> IrBuild:
    """Convert an ONNX graph to `model.xml` and `model.bin` in `folder`, and prove its layers int8 on `device`.

    shapes: batch → shape of every input, for the batches to compile and prove. expected: torch name of every quantized
    layer → its Conv or MatMul nodes in the graph. The same graph gives the same bytes. Also writes `precision.json`,
    which `open_ir` reads.

    Raises BackendMissingError without OpenVINO or the device, EngineError naming every layer that does not run in int8,
    ResourceError when the folder cannot be written.
    """
    check_device(device)
    start = time.perf_counter()
    import openvino

    try:
        network = _core().read_model(str(graph))
        for index, operation in enumerate(network.get_ordered_ops()):
            if operation.get_friendly_name() == operation.get_name():  # numbered by the process, not by the graph
                operation.set_friendly_name(f"{operation.get_type_name()}.{index}")
        xml = folder / IR_XML
        openvino.save_model(network, str(xml), compress_to_fp16=False)
    except RuntimeError as error:
        if not _writable(folder):
            raise ResourceError(f"{folder}: the IR cannot be written: {error}") from error
        raise EngineError(f"{graph}: OpenVINO cannot convert this graph: {error}") from error
    runner = OpenVinoRunner(xml, device=device)
    proofs: list[LayerProof] = []
    for inputs in shapes.values():
        proofs = prove_int8(runner.executed(inputs), expected)
    document = {"device": device, "expected": expected}
    (folder / IR_JSON).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return IrBuild(
        xml=xml,
        version=str(version()),
        device=device,
        seconds=time.perf_counter() - start,
        size_bytes=xml.stat().st_size + (folder / IR_BIN).stat().st_size,
        batches=tuple(shapes),
        proofs=tuple(proofs),
    )


def open_ir(folder: Path, *, threads: int | None = None, counting: bool = False) -> OpenVinoRunner:
    """The network that `build_ir` left in `folder`, with its precision proven wherever it is compiled.

    counting: `counters` will be asked for.

    Raises BackendMissingError without OpenVINO or the device, EngineError where there is no such network.
    """
    try:
        document = json.loads((folder / IR_JSON).read_text(encoding="utf-8"))
        device, expected = str(document["device"]), dict(document["expected"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{folder / IR_JSON} cannot be read: {error}", hint="build the engine again") from error
    return OpenVinoRunner(folder / IR_XML, device=device, threads=threads, expected=expected, counting=counting)


def prove_int8(layers: Sequence[ExecutedLayer], expected: Mapping[str, Sequence[str]]) -> list[LayerProof]:
    """Return one proof for every node of `expected`, each with two operands of 8 bits.

    Raises EngineError naming every node that is not executed so, and how it is executed instead.
    """
    # Fusing and moving scales renames a product to "<node>/…": rescaled, WithoutBiases, DequantizationMultiply.
    claims: dict[str, list[ExecutedLayer]] = {}
    for layer in layers:
        for owner in {owner for source in layer.sources for owner in accumulate(source.split("/"), "{}/{}".format)}:
            if owner:
                claims.setdefault(owner, []).append(layer)
    proofs = [_proof(name, node, claims.get(node, [])) for name, nodes in expected.items() for node in (nodes or [""])]
    failed = [proof for proof in proofs if proof.problem]
    if failed:
        raise EngineError(
            describe(failed, len(proofs)),
            hint="each activation needs one constant scale and each weight a DequantizeLinear of int8 without "
            "zero_point; a layer that is meant to stay in float does not belong in the plan",
        )
    return proofs


def _proof(layer: str, node: str, claimants: Sequence[ExecutedLayer]) -> LayerProof:
    kernels = [found for found in claimants if found.kind in _PRODUCTS]
    if not kernels:
        seen = ", ".join(sorted({f"{found.name} ({found.kind})" for found in claimants})) or "nothing"
        return LayerProof(layer, node, "", "none", "none", "none", f"is executed by no product, only by {seen}")
    kernel = next((found for found in kernels if not set(found.inputs[:2]) <= set(_INTEGER)), kernels[0])
    activation, weight = (*kernel.inputs, "none", "none")[:2]
    problem = ""
    if not {activation, weight} <= set(_INTEGER):
        problem = f"is executed by {kernel.kernel} on {activation} x {weight}"
    return LayerProof(layer, node, kernel.name, activation, weight, kernel.output, problem)


def _executed(compiled: Any) -> list[ExecutedLayer]:
    layers = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        about = _about(operation)
        layers.append(
            ExecutedLayer(
                name=operation.get_friendly_name(),
                kind=about["layerType"],
                kernel=about["primitiveType"],
                inputs=tuple(_output_type(value.get_node(), value.get_index()) for value in operation.input_values()),
                output=_output_type(operation, 0),
                sources=tuple(about["originalLayersNames"].split(",")),
                shapes=tuple(_extents(value) for value in operation.input_values()),
                result=_extents(operation.output(0)) if operation.get_output_size() else (),
            )
        )
    return layers


def _extents(value: Any) -> tuple[int, ...]:
    """Shape of a tensor of the runtime model; empty where it depends on values."""
    shape = value.get_partial_shape()
    return tuple(shape.to_shape()) if shape.is_static else ()


def _output_type(operation: Any, index: int) -> str:
    types = _about(operation)["outputPrecisions"].split(",")
    return types[index] if index < len(types) else types[0]


def _about(operation: Any) -> dict[str, str]:
    """The fields of a runtime node, as text."""
    found = operation.get_rt_info()
    keys = ("layerType", "primitiveType", "outputPrecisions", "originalLayersNames")
    return {key: str(getattr(found[key], "value", found[key])) if key in found else "" for key in keys}


def _core() -> Any:
    import openvino

    return openvino.Core()


def _writable(folder: Path) -> bool:
    try:
        probe = folder / ".write"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return False
    return True
