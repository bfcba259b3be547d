# ruff: noqa: T201 - this file is also a script that runs where dmqexport is not installed; there, print is its output
"""Build a TensorRT engine and prove that its quantized layers multiply int8 by int8. Standard library only.

This one file runs in three places, so that they cannot differ: as the child process of `engines.trt` (a builder may
crash, and must not take the caller along), inside a bundle as `finish_on_gpu.py` (on a machine that has TensorRT and a
GPU but no dmqexport), and imported, for its pure functions. It needs Python 3.9 and, to build, `tensorrt` 10 or later
or `tensorrt_rtx`.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html (explicit
quantization), .../performance/best-practices.html ("Layers:" listing and engine inspector).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

EXIT_FAILED, EXIT_RESOURCE, EXIT_BACKEND = 1, 5, 7
LOG_TAIL_LINES = 12
POLL_SECONDS = 0.1

# -P: neither the folder of this file nor the working folder may shadow a vendor's package
_PYTHON = (sys.executable, "-P") if sys.version_info >= (3, 11) else (sys.executable,)


class BuildError(Exception):
    """A build or proof that ended without a usable engine; `kind` says which way.

    Kinds: "backend" (vendor or GPU missing), "parse", "profile", "build", "proof", "crash", "timeout", "memory", "io".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


# --- what the engine is made of ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """One tensor an engine layer reads or writes; `dims` has -1 where the extent is dynamic."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def is_matrix(self) -> bool:
        """Whether it spans two dimensions or more: a weight does, a bias or a scale does not."""
        return sum(d != 1 for d in self.dims) >= 2

    @property
    def volume(self) -> int:
        """Element count, a dynamic extent counted as 1."""
        total = 1
        for extent in self.dims:
            total *= max(extent, 1)
        return total


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of a built engine and the ONNX nodes it came from."""

    name: str
    type: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    onnx_nodes: tuple[str, ...]
    weight_dtype: str | None = None
    tactic: str = ""

    @property
    def is_matrix_op(self) -> bool:
        """Whether the kernel convolves or multiplies matrices, as opposed to reshaping, moving or scaling."""
        kind = self.type.lower()
        if any(word in kind for word in ("correlation", "conv", "gemm", "matrix", "mha", "attention", "einsum")):
            return True
        # Generated kernels are called after their operations: __myl_FcAdd_..., __myl_MulMinMaxRounCast_...
        return kind in ("kgen", "runtime_fusion", "fusion") and bool(re.search(r"(Fc|Dot|Gemm|Corr|Mma)", self.name))

    @property
    def activation_dtype(self) -> str:
        return self.inputs[0].dtype if self.inputs else "none"

    @property
    def multiplied_dtype(self) -> str:
        """Type of the second factor: the weight, or of a product of two activations the second input."""
        if self.weight_dtype is not None:
            return self.weight_dtype
        weights = [c for c in self.constants if c.is_matrix]
        if not weights and len(self.inputs) > 1:
            return self.inputs[1].dtype  # attention products, and weights that an earlier kernel unpacks
        candidates = weights or list(self.constants)  # a 1x1 depthwise weight is as thin as a bias; it comes first
        return max(candidates, key=lambda c: c.volume).dtype if candidates else "none"

    @property
    def output_dtype(self) -> str:
        return self.outputs[0].dtype if self.outputs else "none"


_DTYPES = (  # in this order: "Float" is also in "BFloat16", "Int8" also in "UInt8"
    ("BFloat16", r"BFloat16|BF16"),
    ("UInt8", r"UInt8"),
    ("FP8", r"FP8|Float8"),
    ("FP4", r"FP4|Float4"),
    ("Half", r"Half|FP16|Float16"),
    ("Float", r"Float|FP32"),
    ("Int8", r"Int8"),
    ("Int4", r"Int4"),
    ("Int32", r"Int32"),
    ("Int64", r"Int64"),
    ("Bool", r"Bool"),
)


def dtype_name(text: str) -> str:
    """Return the element type named in a vendor's format description ("Row major linear FP16 format" -> "Half")."""
    for name, pattern in _DTYPES:
        if re.search(pattern, text, re.IGNORECASE):
            return name
    return text.strip() or "unknown"


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """Return the ONNX node names of a layer's Metadata, "[ONNX Layer: a][ONNX Layer: b]", separators and all."""
    return tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=\s*(?:[\x1e\x1f]|\[ONNX Layer: |$))", metadata))


_OPERAND = re.compile(r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[-\d, ]*)\](?P<rest>.*?)\}")
_LIST = r"\[\]|\[ \{.*?\}\]"
_LAYER = re.compile(
    rf"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<inputs>{_LIST}), "
    rf"(?:Constants: (?P<constants>{_LIST}), )?Outputs: (?P<outputs>{_LIST}), (?P<rest>.*)$"
)


def _operands(text: str | None) -> tuple[Operand, ...]:
    found = []
    for match in _OPERAND.finditer(text or ""):
        dims = tuple(int(d) for d in match["dims"].split(",") if d.strip())
        kind = re.search(r"Datatype: ([^,}]*)", match["rest"])
        found.append(Operand(match["name"], dims, dtype_name(kind[1] if kind else "")))
    return tuple(found)


def parse_layers(log: str) -> list[EngineLayer]:
    """Return the layers of the last "Layers:" listing in a verbose build log (DETAILED profiling verbosity).

    Empty where there is none. The listing is one line a layer and ends at the first other line.
    """
    layers: list[EngineLayer] = []
    listing = False
    for line in log.split("\n"):  # splitlines would also break at \x1e, which separates the nodes of a Metadata
        if re.fullmatch(r"(\[[^\]]*\] ?)*Layers: ?", line):
            layers, listing = [], True
            continue
        match = _LAYER.match(line) if listing else None
        if match is None:
            listing = listing and line.startswith("Name: ")  # a line we cannot read proves nothing, but ends nothing
            continue
        rest = match["rest"]
        weight = re.search(r'Weights: \{"Type": "(\w+)"', rest)
        tactic = re.search(r"TacticName: ([^,]*)", rest)
        metadata = rest.partition("Metadata: ")[2]
        layers.append(
            EngineLayer(
                match["name"],
                match["type"],
                _operands(match["inputs"]),
                _operands(match["constants"]),
                _operands(match["outputs"]),
                onnx_nodes(metadata) or _nodes_of_name(match["name"]),
                dtype_name(weight[1]) if weight else None,
                tactic[1] if tactic else "",
            )
        )
    return layers


def parse_inspector(text: str) -> list[EngineLayer]:
    """Return the layers of `EngineInspector.get_engine_information(JSON)`; names without details are left out."""

    def operands(items: Any) -> tuple[Operand, ...]:
        return tuple(
            Operand(
                str(item.get("Name", "")),
                tuple(int(d) for d in item.get("Dimensions", ())),
                dtype_name(str(item.get("Datatype") or item.get("Format/Datatype") or "")),
            )
            for item in items or ()
            if isinstance(item, dict)
        )

    layers = []
    for item in json.loads(text).get("Layers", []):
        if not isinstance(item, dict):
            continue
        name = str(item.get("Name", ""))
        weights = item.get("Weights")
        layers.append(
            EngineLayer(
                name,
                str(item.get("LayerType", "")),
                operands(item.get("Inputs")),
                operands(item.get("Constants")),
                operands(item.get("Outputs")),
                onnx_nodes(str(item.get("Metadata", ""))) or _nodes_of_name(name),
                dtype_name(str(weights["Type"])) if isinstance(weights, dict) and "Type" in weights else None,
                str(item.get("TacticName", "")),
            )
        )
    return layers


def _nodes_of_name(name: str) -> tuple[str, ...]:
    """Read a fused layer's name, "a+b_myl0_9" or "a + b", where it carries no Metadata."""
    return tuple(part.strip() for part in re.sub(r"_myl\d+_\d+$", "", name).split("+") if part.strip())


# --- the proof --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerProof:
    """One compute node of a quantized layer and what the engine multiplies for it; `problem` is empty when int8."""

    layer: str
    node: str
    engine_layer: str
    activation: str
    weight: str
    output: str
    problem: str = ""


def examine_int8(layers: Sequence[EngineLayer], expected: Mapping[str, Sequence[str]]) -> list[LayerProof]:
    """Say for every compute node of every quantized layer what the engine multiplies.

    `expected`: torch name of the layer -> names of its Conv/MatMul/Gemm nodes in the ONNX graph. A node is proven when
    at least one matrix kernel of the engine claims it and all that do take Int8 x Int8. A node that none claims is a
    problem, as is a layer without nodes: silence proves nothing.
    """
    by_node: dict[str, list[EngineLayer]] = {}
    for engine_layer in layers:
        for node in set(engine_layer.onnx_nodes):
            by_node.setdefault(node, []).append(engine_layer)
    proofs = []
    for name, nodes in expected.items():
        if not nodes:
            proofs.append(LayerProof(name, "", "", "none", "none", "none", "no compute node was named for this layer"))
        proofs.extend(_examine_node(name, node, by_node.get(node, []), len(layers)) for node in nodes)
    return proofs


def _examine_node(name: str, node: str, claimants: Sequence[EngineLayer], total: int) -> LayerProof:
    kernels = [layer for layer in claimants if layer.is_matrix_op]
    if not kernels:
        if claimants:
            where = ", ".join(sorted({f"{layer.name} ({layer.type})" for layer in claimants}))
            problem = f"no matrix kernel computes it, only {where}: it was dissolved into element-wise kernels"
        else:
            problem = (
                f"none of the {total} engine layers names it: folded away, renamed after the graph was exported, or "
                "the log lacks details"
            )
        return LayerProof(name, node, "", "none", "none", "none", problem)
    worst = next((k for k in kernels if (k.activation_dtype, k.multiplied_dtype) != ("Int8", "Int8")), kernels[0])
    activation, weight = worst.activation_dtype, worst.multiplied_dtype
    return LayerProof(
        name, node, worst.name, activation, weight, worst.output_dtype, _cause_of_float(activation, weight)
    )


def _cause_of_float(activation: str, weight: str) -> str:
    if activation == weight == "Int8":
        return ""
    took = f"takes {activation} x {weight}"
    if activation == "Int8":
        return f"{took}: its weight has no int8 DequantizeLinear, or one the builder could not keep (axis, zero-point)"
    if weight == "Int8":
        return f"{took}: only the weight is quantized, its input comes without QuantizeLinear/DequantizeLinear"
    return (
        f"{took}: not quantized at all, or the activation scale is not a rank-0 constant (a scale of shape [1] or one "
        "computed at run time builds, and falls back to float)"
    )


# --- the build --------------------------------------------------------------------------------------------------------


def build_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Build the requested engine in this process, write it to request["engine"], and return what was built.

    Every message of the builder goes to stderr. Raises BuildError; a builder that crashes takes the process along.

    Request keys: "module" (vendor package), "onnx", "engine", "partial" (paths; the engine is written to
    the latter and renamed), "profiles" {input: {min, opt, max}},
    "workspace_bytes" (or None), "inspect" (whether to load the engine and ask its inspector; needs a GPU).
    """
    try:
        trt: Any = importlib.import_module(str(request["module"]))
    except Exception as error:  # a broken vendor install raises OSError, RuntimeError, ... as readily as ImportError
        raise BuildError("backend", f"{request['module']} cannot be imported: {error!r}") from error
    engine = Path(request["engine"])
    try:
        engine.parent.mkdir(parents=True, exist_ok=True)  # known now rather than after a build of minutes
    except OSError as error:
        raise BuildError("io", f"the engine cannot be written to {engine}: {error}") from error
    listing: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                listing.append(message)
            sys.stderr.write(f"[{severity.name}] {message}\n")

    logger = Log()
    started = time.monotonic()
    builder = trt.Builder(logger)
    if builder is None:  # a vendor package that finds no driver
        raise BuildError("backend", f"{request['module']} has no usable device")
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    typed = getattr(flags, "STRONGLY_TYPED", None)  # the only kind of network from version 11 on: the flag may go
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request["onnx"])):  # by path, or external data would not be found
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError("parse", f"the graph cannot be parsed: {errors}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.get("workspace_bytes"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request["workspace_bytes"]))
    _add_profile(builder, network, config, request["profiles"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError("build", "the builder returned no engine; its errors are in the log")
    seconds = time.monotonic() - started
    partial = Path(request["partial"])
    try:
        partial.write_bytes(plan)
        partial.replace(engine)  # a reader sees the whole engine or none
    except OSError as error:
        raise BuildError("io", f"the engine cannot be written to {engine}: {error}") from error
    layers = _inspect(trt, logger, plan) if request.get("inspect") else []
    source = "inspector" if layers else "log"
    return {
        "version": str(trt.__version__),
        "size_bytes": engine.stat().st_size,
        "seconds": seconds,
        "peak_rss_bytes": _peak_rss_bytes(),
        "layers_from": source,
        "layers": [asdict(layer) for layer in layers or parse_layers("\n".join(listing[-1:]))],
    }


def _add_profile(builder: Any, network: Any, config: Any, profiles: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    unknown = sorted(set(profiles) - set(inputs))
    open_ended = sorted(name for name, shape in inputs.items() if -1 in shape and name not in profiles)
    if unknown or open_ended:
        raise BuildError(
            "profile",
            f"shape ranges do not fit the graph's inputs {inputs}: unknown {unknown}, dynamic without a range "
            f"{open_ended}",
        )
    if not profiles:
        return
    profile = builder.create_optimization_profile()
    for name, ranges in profiles.items():
        if len(ranges["min"]) != len(inputs[name]):
            raise BuildError("profile", f"input {name!r} has shape {inputs[name]}, its range is {dict(ranges)}")
        profile.set_shape(name, tuple(ranges["min"]), tuple(ranges["opt"]), tuple(ranges["max"]))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError("profile", f"the builder refuses the shape ranges {dict(profiles)} for inputs {inputs}")


def _inspect(trt: Any, logger: Any, plan: Any) -> list[EngineLayer]:
    """Ask the built engine itself; an engine that this machine cannot load leaves the build log as the witness."""
    try:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        if engine is None:
            return []
        inspector = engine.create_engine_inspector()
        return parse_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except Exception as error:  # whatever the vendor raises here, the log still holds the same listing
        sys.stderr.write(f"[WARNING] the engine inspector cannot be used: {error!r}\n")
        return []


def _peak_rss_bytes() -> int | None:
    """Peak resident memory of this process; getrusage would count the parent's before exec, so read the kernel's."""
    return _status_bytes(os.getpid(), "VmHWM")


def _status_bytes(pid: int, key: str) -> int | None:
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None  # not Linux, or the process has just ended
    return int(match[1]) * 1024 if match else None


# --- the child process ------------------------------------------------------------------------------------------------


def build_in_child(
    request: Mapping[str, Any], log: Path, *, timeout_s: float | None = None, max_ram_bytes: int | None = None
) -> dict[str, Any]:
    """Run `build_here(request)` in a child process, its output in `log`, and return its result.

    Raises BuildError, also where the child crashes, exceeds `timeout_s` or holds more than `max_ram_bytes` (watched
    on Linux only); the last log lines are in the message.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trt-build-") as folder:
        order, answer = Path(folder, "request.json"), Path(folder, "result.json")
        engine = Path(str(request["engine"]))
        partial = engine.with_name(f".{engine.name}.{os.getpid()}.partial")
        order.write_text(json.dumps({**request, "partial": str(partial)}))
        command = [*_PYTHON, __file__, "--child", str(order), str(answer)]
        try:
            with log.open("wb") as sink, _running(command, sink) as child:
                _watch(child, log, timeout_s, max_ram_bytes)
        finally:
            with contextlib.suppress(OSError):  # there is none unless the child ended while it wrote
                partial.unlink()
        if child.returncode < 0 or not answer.exists():
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit status {child.returncode}"
            raise BuildError("crash", f"the builder process died ({how}).{_tail(log)}")
        result: dict[str, Any] = json.loads(answer.read_text())
    if "failure" in result:
        raise BuildError(str(result["failure"]), f"{result['message']}{_tail(log)}")
    return result


@contextlib.contextmanager
def _running(command: Sequence[str], sink: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that never outlives this block, however the block is left."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _watch(child: subprocess.Popen[bytes], log: Path, timeout_s: float | None, max_ram_bytes: int | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=POLL_SECONDS)
            return
        if deadline is not None and time.monotonic() > deadline:
            raise BuildError("timeout", f"the builder was still running after {timeout_s:g} s.{_tail(log)}")
        used = None if max_ram_bytes is None else _status_bytes(child.pid, "VmRSS")
        if used is not None and max_ram_bytes is not None and used > max_ram_bytes:
            raise BuildError(
                "memory", f"the builder held {used >> 20} MiB, more than the {max_ram_bytes >> 20} MiB allowed"
            )


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    shown = "\n".join(f"    {line[:300]}" for line in lines[-LOG_TAIL_LINES:])
    return f"\n  last lines of {log}:\n{shown}" if shown else f"\n  {log} is empty"


def _child_main(order: str, answer: str) -> NoReturn:
    faulthandler.enable()  # where it crashed, in the log
    try:
        result = build_here(json.loads(Path(order).read_text()))
    except BuildError as failure:
        result = {"failure": failure.kind, "message": failure.message}
    Path(answer).write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)  # all is on disk: a vendor library that crashes while it unloads must not spoil it


# --- the GPU ----------------------------------------------------------------------------------------------------------


def gpu_arch() -> str | None:
    """Return the first GPU's architecture, "sm89", or None where the NVIDIA driver or a GPU is missing."""
    driver = None
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            driver = ctypes.CDLL(name)
            break
    if driver is None or driver.cuInit(0) != 0:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, _MINOR = 76 (cuda.h)
    if driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device) != 0:
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device) != 0:
        return None
    return f"sm{major.value}{minor.value}"


# --- the script in a bundle -------------------------------------------------------------------------------------------

#: Filled in when this file is copied into a bundle: what to build there (see `engines.trt.write_finish_script`).
BUNDLE_REQUEST = ""


def finish(bundle: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Build the bundle's engine for this machine's GPU, prove it, put it in place; return the written record.

    The engine goes to "<engines>/<target>-<arch>-<version>/engine.plan" under the bundle, and only once every expected
    layer is proven; build.log and result.json lie beside it. Raises BuildError.
    """
    arch = gpu_arch()
    if arch is None:
        raise BuildError("backend", "no NVIDIA GPU, or no driver for it, on this machine: run this where the GPU is")
    version = vendor_version(str(request["module"]))
    if version is None:
        raise BuildError("backend", f"{request['module']} cannot be imported: pip install {request['package']}")
    folder = bundle / str(request["engines"]) / f"{request['target']}-{arch}-{version}"
    engine = folder / "engine.plan"
    unproven = folder / "engine.plan.unproven"
    build = {**request, "onnx": str(bundle / str(request["onnx"])), "engine": str(unproven), "inspect": True}
    try:
        result = build_in_child(build, folder / "build.log")
        proofs = examine_int8([layer_from_json(layer) for layer in result.pop("layers")], request["expected"])
        record = {
            "engine": str(engine.relative_to(bundle)),
            "arch": arch,
            "module": request["module"],
            **result,
            "int8_layers": sum(not proof.problem for proof in proofs),
            "proofs": [asdict(proof) for proof in proofs],
        }
        (folder / "result.json").write_text(json.dumps(record, indent=1) + "\n")
        failed = [proof for proof in proofs if proof.problem]
        if failed:
            raise BuildError("proof", describe(failed, len(proofs)))
        unproven.replace(engine)
    finally:
        unproven.unlink(missing_ok=True)
    return record


def describe(failed: Sequence[LayerProof], total: int) -> str:
    """Return one line a layer that is not int8, under a line that counts them."""
    lines = "\n".join(f"    {proof.layer} (node {proof.node!r}) {proof.problem}" for proof in failed)
    return f"{len(failed)} of {total} quantized operators do not run in int8:\n{lines}"


def layer_from_json(item: Mapping[str, Any]) -> EngineLayer:
    """Undo `dataclasses.asdict` after a trip through JSON."""

    def operands(key: str) -> tuple[Operand, ...]:
        return tuple(Operand(o["name"], tuple(o["dims"]), o["dtype"]) for o in item[key])

    return EngineLayer(
        item["name"],
        item["type"],
        operands("inputs"),
        operands("constants"),
        operands("outputs"),
        tuple(item["onnx_nodes"]),
        item["weight_dtype"],
        item["tactic"],
    )


def vendor_version(module: str) -> str | None:
    """Return the version of `tensorrt` or `tensorrt_rtx`, None where it cannot be imported.

    Asked in a child process: a broken native library may abort, and a working one stays out of the caller's memory.
    """
    code = f"import {module}; print({module}.__version__)"
    try:
        answer = subprocess.run([*_PYTHON, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split()[-1] if answer.returncode == 0 and answer.stdout.strip() else None


def main(arguments: Sequence[str]) -> int:
    """Run as the child of a build, or, inside a bundle, as its finish script. Returns the exit status."""
    if len(arguments) == 3 and arguments[0] == "--child":
        _child_main(arguments[1], arguments[2])
    parser = argparse.ArgumentParser(
        description="Build this bundle's TensorRT engine here and prove that its quantized layers run in int8.",
        epilog="exit status: 0 built and proven, 1 build or proof failed, 5 resource limit, 7 TensorRT or GPU missing",
    )
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help="default: this folder")
    options = parser.parse_args(arguments)
    if not BUNDLE_REQUEST:
        parser.error("this copy was not written into a bundle; use `dmqexport compile`")
    request = json.loads(BUNDLE_REQUEST)
    try:
        record = finish(options.bundle.resolve(), request)
    except BuildError as failure:
        print(f"failed ({failure.kind}): {failure.message}", file=sys.stderr)
        return {"backend": EXIT_BACKEND, "io": EXIT_RESOURCE, "memory": EXIT_RESOURCE}.get(failure.kind, EXIT_FAILED)
    print(
        f"{record['engine']}: {record['size_bytes']} bytes in {record['seconds']:.1f} s, {record['module']} "
        f"{record['version']} on {record['arch']}; {record['int8_layers']} of {record['int8_layers']} quantized "
        f"operators take int8 x int8 (by engine {record['layers_from']})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
