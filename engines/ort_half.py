"""float16 in ONNX Runtime: the float graph converted, and whether this machine's CPU kernels compute in it at all.

Where the runtime has no float16 kernel for an operator, it casts the operands to float32 around it: the graph runs,
slower than in float32. On x86 that is so for Conv and MatMul. The runtime does not say; its profile does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmqexport.errors import BackendMissingError, EngineError, ResourceError
from engines.ort_profile import NodeTime, profile_nodes
from engines.runner import Arrays

#: Beyond this a protobuf file holds no weights; they go beside it.
_INLINE_BYTES = 2**30
_MULTIPLY = ("Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm")


def write_half(graph: Path, output: Path) -> None:
    """Write `graph` with weights and computation in float16, inputs and outputs as they were.

    The conversion is ONNX Runtime's own. Raises BackendMissingError without it, EngineError when it fails,
    ResourceError when `output` cannot be written.
    """
    try:
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise BackendMissingError("onnxruntime is not installed", hint="pip install 'dmqexport[cpu]'") from error
    try:
        half: Any = convert_float_to_float16(onnx.load(str(graph)), keep_io_types=True)
    except Exception as error:  # untyped errors of the converter
        raise EngineError(f"{graph}: onnxruntime cannot convert this graph to float16: {error}") from error
    large = half.ByteSize() > _INLINE_BYTES
    try:
        onnx.save_model(half, str(output), save_as_external_data=large, location=output.name + ".data")
    except OSError as error:
        raise ResourceError(f"{output} cannot be written: {error.strerror}") from error


def type_of_products(nodes: Sequence[NodeTime]) -> str:
    """Type that most of the time of convolutions and products is spent in: float16 where there are kernels for it."""
    spent: dict[str, float] = {}
    for node in nodes:
        if node.op in _MULTIPLY:
            spent[node.operand] = spent.get(node.operand, 0.0) + node.ms
    return max(spent, key=lambda kind: spent[kind]) if spent else ""


def half_computes_in(graph: Path, inputs: Arrays, threads: int | None) -> str:
    """Type in which a float16 graph multiplies on this machine: float16, or float where there are no kernels."""
    return type_of_products(profile_nodes(graph, inputs, runs=1, threads=threads))
