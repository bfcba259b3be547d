"""TensorRT 10, 11 and TensorRT-RTX: the canonical graph with the weights they accept, and the traps ruled out."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import QuantPlan, QuantWeights
from passes.base import Builder, constant_array, dims, is_constant, segment_of
from passes.bind import bind
from passes.weight_storage import signed_weight

#: TensorRT parses opset 21 and 22 without decomposing or refusing what the exporter emits.
MAX_OPSET = 22


class LowerTensorRT(ir.passes.InPlacePass):
    """Store every planned weight as signed int8 codes with an explicit zero of int8, as TensorRT requires.

    TensorRT is symmetric only: a non-zero zero_point is a parse error, and there is no integer activation narrower than
    int8, so narrower codes travel in int8. Activations, clips and tables are left exactly as they are.
    """

    def __init__(self, plan: QuantPlan, weights: QuantWeights) -> None:
        super().__init__()
        self._plan = plan
        self._weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        bindings = bind(model, self._plan)
        builder = Builder(model.graph)
        modified = False
        for layer in self._plan.layers:
            for node, segment in zip(bindings.layers[layer.name].compute, layer.segments, strict=True):
                dequantize = node.inputs[1].producer() if node.inputs[1] is not None else None
                if dequantize is None or segment.weight.bits > 4:
                    continue
                stored = dequantize.inputs[0]
                if stored is None or stored.const_value is None or stored.dtype == ir.DataType.INT8:
                    continue
                label = f"{layer.name}#{segment_of(node)}"
                zeros = np.zeros(len(segment.weight.scale), dtype=np.int8)
                shape = dims(stored.const_value)
                weight = signed_weight(builder, self._weights, layer, segment_of(node), shape, f"{label}/weight_s8")
                dequantize.replace_input_with(0, weight)
                dequantize.replace_input_with(2, builder.constant(zeros, f"{label}/weight_s8_zero"))
                modified = True
        if modified:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


class VerifyTensorRT(ir.passes.InPlacePass):
    """Refuse what TensorRT would refuse, crash on, or silently run in float; changes nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raise LoweringError listing every violation with its reason."""
        problems: list[str] = []
        opset = model.graph.opset_imports.get("", 0)
        if opset > MAX_OPSET:
            problems.append(f"opset {opset}: TensorRT parses up to {MAX_OPSET} without decomposing attention")
        for node in model.graph:
            if node.domain not in ("", "ai.onnx"):
                problems.append(f"{node.name}: operator {node.domain}.{node.op_type} exists in ONNX Runtime only")
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                problems += _check_qdq(node)
        if problems:
            raise LoweringError("lower_tensorrt: " + "; ".join(problems[:20]))
        return ir.passes.PassResult(model, False)


def _check_qdq(node: ir.Node) -> list[str]:
    problems = []
    scale = constant_array(node.inputs[1])
    zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    is_weight = node.op_type == "DequantizeLinear" and is_constant(node.inputs[0])
    if scale is None:
        problems.append(f"{node.name}: a scale that is not constant runs in float or crashes the builder")
    elif not is_weight and scale.ndim != 0:
        problems.append(
            f"{node.name}: an activation scale of shape {scale.shape} drops the layer to float; rank 0 needed"
        )
    if zero is None:
        problems.append(f"{node.name}: no zero_point (TensorRT reads int8, ONNX reads uint8)")
    elif zero.dtype != np.int8 or bool(np.any(zero != 0)):
        problems.append(f"{node.name}: zero_point must be an int8 zero, got {zero.dtype}")
    return problems
