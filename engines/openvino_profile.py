"""Where OpenVINO's time goes: its performance counters, node by node, as the profile of ONNX Runtime has them."""

import math
import re

from engines.openvino_ir import ExecutedLayer, OpenVinoRunner
from engines.ort_profile import NodeTime
from engines.runner import Arrays


def profile_network(runner: OpenVinoRunner, inputs: Arrays, *, runs: int) -> list[NodeTime]:
    """Least time of every executed node over `runs` runs after one that warms up. runner: opened with `counting`.

    A node has the name of the layer that it was fused into or reordered for. Raises what `runner` raises.
    """
    runner.counters(inputs)
    counted = [runner.counters(inputs) for _ in range(runs)]
    layers = {layer.name: layer for layer in runner.executed({name: inputs[name].shape for name in runner.input_names})}
    return [
        _node(name, layers.get(name), min(times[name] for times in counted if name in times)) for name in counted[0]
    ]


def _node(name: str, layer: ExecutedLayer | None, milliseconds: float) -> NodeTime:
    if layer is None:  # a cast or a copy that the runtime model does not list
        return NodeTime(name, "Other", (), milliseconds, 0, 0)
    operations = 0
    if layer.kind.endswith("Convolution") and len(layer.shapes) > 1:
        operations = 2 * math.prod(layer.result) * math.prod(layer.shapes[1][1:])
    elif layer.kind.startswith(("FullyConnected", "MatMul")) and layer.shapes and layer.shapes[0]:
        operations = 2 * math.prod(layer.result) * layer.shapes[0][-1]
    traffic = sum(
        math.prod(shape) * _bits(kind)
        for shape, kind in zip((*layer.shapes, layer.result), (*layer.inputs, layer.output), strict=True)
    )
    operand = layer.inputs[0] if layer.inputs else ""
    return NodeTime(name, layer.kind, layer.shapes[:2], milliseconds, operations, traffic // 8, operand)


def _bits(kind: str) -> int:
    """Of an element type: f32, i8, boolean."""
    found = re.search(r"\d+", kind)
    return int(found.group()) if found else 8
