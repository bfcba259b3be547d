"""Where ONNX Runtime's time goes: every node that it executes, with its arithmetic and its traffic."""

import json
import math
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.ort import OrtRunner
from engines.runner import Arrays

_BYTES = {"float": 4, "int64": 8, "int32": 4, "double": 8, "float16": 2, "uint8": 1, "int8": 1, "bool": 1}
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits")
_KERNEL = "_kernel_time"
_ROTATION = re.compile(r"/rotation\d*/")  # behind a layer's name: what RotateInputs puts in front of it
#: Operators whose time is that of the nodes inside them.
_CONTAINERS = ("Loop", "If", "Scan")


@dataclass(frozen=True)
class NodeTime:
    """One executed node. ms: the least of its runs, since other processes only add to it; operations: multiplications
    and additions of a product or convolution, 0 for others; traffic: bytes of all inputs and outputs, each counted
    once; operand: type of the first input.
    """

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    ms: float
    operations: int
    traffic: int
    operand: str = ""


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator on the same shapes; share: of the whole graph's time."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    count: int
    ms: float
    gflops: float
    gbytes: float
    share: float


def profile_nodes(
    path: Path, inputs: Arrays, *, runs: int, threads: int | None, config: Mapping[str, str] | None = None
) -> list[NodeTime]:
    """Least time of every node over `runs` runs after one that warms up, in order of execution.

    Raises what `OrtRunner` raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = OrtRunner(path, threads=threads, config=config, profile_prefix=str(Path(folder) / "profile"))
        for _ in range(runs + 1):
            runner.run(inputs)
        events: list[dict[str, Any]] = json.loads(Path(runner.session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    arguments: dict[str, dict[str, Any]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_KERNEL) and event["args"]["op_name"] not in _CONTAINERS:
            times.setdefault(name.removesuffix(_KERNEL), []).append(float(event["dur"]))
            arguments[name.removesuffix(_KERNEL)] = event["args"]
    return [_node(name, arguments[name], values[1:] or values) for name, values in times.items()]


def by_operator(nodes: Sequence[NodeTime]) -> list[OperatorTime]:
    """A roofline table, costliest first: what is far below the machine's rates in both columns has room left."""
    groups: dict[tuple[str, tuple[tuple[int, ...], ...]], list[NodeTime]] = {}
    for node in nodes:
        groups.setdefault((node.op, node.shapes), []).append(node)
    total = sum(node.ms for node in nodes) or 1.0
    table = []
    for (op, shapes), members in groups.items():
        ms = sum(node.ms for node in members)
        rate = 1e6 * max(ms, 1e-3)  # 1e9 a second, from milliseconds
        operations, traffic = sum(node.operations for node in members), sum(node.traffic for node in members)
        table.append(OperatorTime(op, shapes, len(members), ms, operations / rate, traffic / rate, ms / total))
    return sorted(table, key=lambda row: -row.ms)


def by_layer(nodes: Sequence[NodeTime], layers: Sequence[str]) -> dict[str, float]:
    """Milliseconds of the nodes that carry a layer's name: its product, its quantizers, its columns, its bias.

    A quantizer that several layers share is named after, and counted for, the first.
    """
    found = dict.fromkeys(layers, 0.0)
    for node in nodes:
        name = _layer_of(node.name, found)
        if name:
            found[name] += node.ms
    return found


def multiplied_types(nodes: Sequence[NodeTime], layers: Sequence[str]) -> dict[str, set[str]]:
    """Element types of what the products and convolutions of every layer were executed on; empty where none was seen.

    That is the proof of int8 in ONNX Runtime, from what its profile says was run: a graph may hold integer operators
    that the runtime replaces, and Q/DQ pairs that it does not. The rotation of a layer's inputs (RotateInputs) is a
    float product in front of what is quantized, not one of the layer's.
    """
    found: dict[str, set[str]] = {name: set() for name in layers}
    for node in nodes:
        if node.op in _PRODUCTS or node.op.endswith(("Conv", "ConvInteger")):
            name = _layer_of(node.name, found)
            if name and not _ROTATION.match(node.name, len(name)):
                found[name].add(node.operand)
    return found


def _layer_of(name: str, layers: Collection[str]) -> str:
    """The layer that a node's name begins with; empty when there is none."""
    while name and name not in layers:
        name = name[: max(name.rfind("/"), name.rfind("#"), 0)]
    return name


def _node(name: str, arguments: Mapping[str, Any], durations: Sequence[float]) -> NodeTime:
    inputs, outputs = _tensors(arguments.get("input_type_shape")), _tensors(arguments.get("output_type_shape"))
    op = str(arguments.get("op_name"))
    if op in _PRODUCTS and inputs and outputs and (len(inputs) < 2 or len(inputs[1][1]) < 2):
        # A weight that was packed when the session was made is not listed among the inputs.
        kind = "int8" if op.startswith("MatMulInteger") else "float"
        inputs.insert(1, (kind, (inputs[0][1][-1], outputs[0][1][-1])))
    shapes = tuple(shape for _, shape in inputs)
    operations = 0
    if outputs and op in _PRODUCTS and shapes and shapes[0]:
        operations = 2 * math.prod(outputs[0][1]) * shapes[0][-1]
    elif outputs and op.endswith(("Conv", "ConvInteger")) and len(shapes) > 1:
        operations = 2 * math.prod(outputs[0][1]) * math.prod(shapes[1][1:])
    traffic = sum(_BYTES.get(kind, 4) * math.prod(shape) for kind, shape in inputs + outputs)
    operand = inputs[0][0] if inputs else ""
    return NodeTime(name, op, shapes[:2], min(durations) / 1e3, operations, traffic, operand)


def _tensors(described: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(str(kind), tuple(shape)) for item in described or [] for kind, shape in item.items()]
