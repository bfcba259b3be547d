"""How near an operator comes to what the machine can do: its arithmetic or its traffic, whichever bounds it.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009).
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmqexport.errors import BackendMissingError
from engines.ort import available_cores
from engines.ort_profile import OperatorTime

_SIDES = (192, 384, 768)  # of the square matrices: the caches that suit the kernels best differ between machines
_STREAM = 2**24  # floats read and written: past the last cache
_SECONDS = 0.2  # of repetitions of one measurement
_INTEGER = ("MatMulInteger", "ConvInteger", "QLinear", "QGemm", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class Peaks:
    """What ONNX Runtime reaches here at its best. gflops, int8_gops: 1e9 multiplications and additions a second of
    float32 and of u8 × s8 products; gbytes: 1e9 bytes a second, read and written, of one pass over memory.
    """

    gflops: float
    int8_gops: float
    gbytes: float


def measure_peaks(threads: int | None) -> Peaks:
    """Time products of several sizes in both types and a pass over memory; about two seconds.

    threads: None takes every core.

    Raises BackendMissingError without onnxruntime.
    """
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise BackendMissingError("onnxruntime is not installed", hint="pip install 'dmqexport[cpu]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or available_cores(), 4

    def best(node: Any, feed: np.ndarray, kind: int, constants: dict[str, np.ndarray]) -> float:
        graph = helper.make_graph(
            [node], "peak", [helper.make_tensor_value_info("x", kind, feed.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )  # fmt: skip
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        content = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": feed})
        times: list[float] = []
        while sum(times) < _SECONDS or len(times) < 3:
            start = time.perf_counter()
            session.run(None, {"x": feed})
            times.append(time.perf_counter() - start)
        return min(times)

    def product(side: int, *, integer: bool) -> float:
        square, weight = (side, side), "int8" if integer else "float32"
        constants: dict[str, np.ndarray] = {"w": np.ones(square, dtype=weight)}
        node, kind = helper.make_node("MatMul", ["x", "w"], ["y"]), TensorProto.FLOAT
        if integer:
            constants |= {"a": np.array(0.1, dtype=np.float32), "b": np.ones(side, dtype=np.float32)}
            node = helper.make_node("MatMulIntegerToFloat", ["x", *constants], ["y"], domain="com.microsoft")
            kind = TensorProto.UINT8
        feed = np.ones(square, dtype="uint8" if integer else "float32")
        return 2 * side**3 / 1e9 / best(node, feed, kind, constants)

    negated = helper.make_node("Neg", ["x"], ["y"])
    return Peaks(
        max(product(side, integer=False) for side in _SIDES),
        max(product(side, integer=True) for side in _SIDES),
        2 * 4 * _STREAM / 1e9 / best(negated, np.ones(_STREAM, dtype=np.float32), TensorProto.FLOAT, {}),
    )


def place(row: OperatorTime, peaks: Peaks) -> dict[str, Any]:
    """bound: `arithmetic` or `traffic`, what would take longer at the peaks; of_peak: that time ÷ the measured one.

    Above 1 where operands are still in a cache: the peak of traffic is memory's.
    """
    integer = row.op.startswith(_INTEGER)
    arithmetic = row.gflops / (peaks.int8_gops if integer else peaks.gflops)
    traffic = row.gbytes / peaks.gbytes
    return {"bound": "arithmetic" if arithmetic >= traffic else "traffic", "of_peak": max(arithmetic, traffic)}
