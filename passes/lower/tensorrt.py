"""TensorRT 10, 11 and TensorRT-RTX: the canonical graph with the weights they accept, and the traps ruled out.

Integer products take int8 codes. With `fp8`, those whose codes are all E4M3 numbers (integers up to 16) take these
instead: FP8 products of the very same codes. Weights of layers with float activations stay packed: INT4 at up to 4
bits, else INT8. TensorRT-RTX 1.7.1 builds all of it, and keeps INT4 in the engine, for convolutions too.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

import math
from collections.abc import Sequence
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import code_range
from dmqexport.quant_weights import QuantWeights
from passes.base import Builder, constant_array, dims, is_constant, segment_of
from passes.bind import bind
from passes.weight_storage import PACKED_BITS, nominal_codes, signed_codes, signed_weight, weight_axis

#: TensorRT parses opset 21 and 22 without decomposing or refusing what the exporter emits.
MAX_OPSET = 22
#: E4M3 has every integer up to this one.
_FP8_INTEGERS = 16
#: What INT4 calls 0 when nominal codes 0 to 15 become -8 to 7.
_INT4_ZERO = 8
_ZEROS = (np.dtype(np.int8), np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.float8_e4m3fn))
_KINDS = {ir.DataType.INT8: "Int8", ir.DataType.INT4: "Int4", ir.DataType.FLOAT8E4M3FN: "FP8"}


class LowerTensorRT(ir.passes.InPlacePass):
    """Store every planned weight with a zero_point of zero, as TensorRT requires: int8, FP8 or INT4 (see above).

    Activations, clips and tables are left as they are, but for the rounding of operands that become FP8. A zero_point
    that INT4 cannot carry is subtracted after DequantizeLinear, and the scale comes then.
    """

    def __init__(self, plan: QuantPlan, weights: QuantWeights, *, fp8: bool = False) -> None:
        super().__init__()
        self._plan = plan
        self._weights = weights
        self._fp8 = fp8

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        bindings = bind(model, self._plan)
        work = _Lowering(Builder(model.graph), self._weights)
        modified = False
        for layer in self._plan.layers:
            shapes = [self._weights.shape(layer.name, index) for index in range(len(layer.segments))]
            int4 = layer.activation_bits is None and all(holds_int4(shape) for shape in shapes)
            fp8 = self._fp8 and all(fits_fp8(segment) for segment in layer.segments)
            for node, segment in bindings.layers[layer.name].pairs(layer):
                dequantize = node.inputs[1].producer() if node.inputs[1] is not None else None
                if dequantize is None or dequantize.op_type != "DequantizeLinear" or segment.weight.bits > PACKED_BITS:
                    continue
                stored = dequantize.inputs[0]
                if stored is None or stored.const_value is None or stored.dtype in _KINDS:
                    continue
                if int4:
                    work.int4(layer, segment, node, dequantize)
                elif fp8:
                    work.fp8(layer, node, dequantize)
                else:
                    work.int8(layer, node, dequantize)
                modified = True
        if modified:
            model.graph.sort()
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def holds_int4(shape: Sequence[int]) -> bool:
    """Whether a weight can be INT4: TensorRT-RTX 1.7.1 refuses tensors of an odd number of elements, so INT8 then."""
    return math.prod(shape) % 2 == 0


def fits_fp8(segment: Segment) -> bool:
    """Whether every code of a layer's weight and activation is an E4M3 number, so that FP8 computes the same."""
    if segment.activation is None:
        return False
    ranges = (
        code_range(segment.weight.bits, segment.weight.zero_point),
        code_range(segment.activation.widths, segment.activation.zero_point),
    )
    return all(int(np.abs(end).max()) <= _FP8_INTEGERS for pair in ranges for end in pair)


def product_types(model: ir.Model, plan: QuantPlan) -> dict[str, tuple[str, list[str | list[str]]]]:
    """What an engine must do with each planned layer: (type, nodes to prove it by).

    "Int8" or "FP8", of both factors, by the layer's products; "weight Int4" or "weight Int8" of a layer with float
    activations, by the nodes that dequantize its weights or the products that read them.
    """
    found = {}
    for name, nodes in bind(model, plan).layers.items():
        kinds: set[str] = set()
        names: list[str | list[str]] = []
        for node in nodes.compute:
            weight, activation = _dequantize_of(node.inputs[1]), _dequantize_of(node.inputs[0])
            assert weight is not None
            kind = _KINDS[_type(weight)]
            planned = plan.layer(name).activation_bits is not None
            agree = activation is not None and _KINDS[_type(activation)] == kind
            kinds.add(kind if planned and agree else f"weight {kind}")
            names.append(str(node.name) if planned else [str(weight.name), str(node.name)])
        assert len(kinds) == 1, f"segments of {name} share their weight bits"
        found[name] = (kinds.pop(), names)
    return found


def _type(dequantize: ir.Node) -> ir.DataType:
    codes = dequantize.inputs[0]
    assert codes is not None
    assert codes.dtype is not None
    return codes.dtype


def _dequantize_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear behind an operand, through what moves its zero_point or narrows its type."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "Sub", "Mul"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


class _Lowering:
    def __init__(self, builder: Builder, weights: QuantWeights) -> None:
        self._builder = builder
        self._weights = weights
        self._fp8_of: dict[ir.Value, ir.Value] = {}

    def int8(self, layer: LayerQuant, node: ir.Node, dequantize: ir.Node) -> None:
        label, shape, channels = self._about(layer, node, dequantize)
        weight = signed_weight(self._builder, self._weights, layer, segment_of(node), shape, f"{label}/weight_s8")
        dequantize.replace_input_with(0, weight)
        zeros = np.zeros(channels, dtype=np.int8)
        dequantize.replace_input_with(2, self._builder.constant(zeros, f"{label}/weight_s8_zero"))

    def int4(self, layer: LayerQuant, segment: Segment, node: ir.Node, dequantize: ir.Node) -> None:
        """DequantizeLinear of INT4 codes; then, where they have a zero_point, (codes - zero_point) · scale, which is
        the same number to the last bit and stays INT4 in the engine.
        """
        builder, (label, shape, channels) = self._builder, self._about(layer, node, dequantize)
        codes = partial(_int4_codes, self._weights, layer, segment_of(node))
        dequantize.replace_input_with(0, builder.lazy(codes, ir.DataType.INT4, shape, f"{label}/weight_s4"))
        zeros = np.zeros(channels, dtype=ml_dtypes.int4)
        dequantize.replace_input_with(2, builder.constant(zeros, f"{label}/weight_s4_zero"))
        rest = (segment.weight.zero_point - _INT4_ZERO).astype(np.float32)
        if np.any(rest):
            spread = [1] * len(shape)
            spread[weight_axis(layer)] = -1
            scale = np.asarray(segment.weight.scale)
            dequantize.replace_input_with(1, builder.constant(np.ones_like(scale), f"{label}/weight_one"))
            last = dequantize
            for op, factor, end in (("Sub", rest, "centered"), ("Mul", scale, "scaled")):
                operand = builder.constant(factor.reshape(spread), f"{label}/weight_{end}_by")
                value = last.outputs[0]
                last = builder.node(op, [value, operand], f"{label}/weight_{end}", after=last, like=value)
            node.replace_input_with(1, last.outputs[0])

    def fp8(self, layer: LayerQuant, node: ir.Node, dequantize: ir.Node) -> None:
        builder, (label, shape, channels) = self._builder, self._about(layer, node, dequantize)
        make = partial(_fp8_codes, self._weights, layer, segment_of(node))
        dequantize.replace_input_with(0, builder.lazy(make, ir.DataType.FLOAT8E4M3FN, shape, f"{label}/weight_e4m3"))
        zeros = np.zeros(channels, dtype=ml_dtypes.float8_e4m3fn)
        dequantize.replace_input_with(2, builder.constant(zeros, f"{label}/weight_e4m3_zero"))
        value = node.inputs[0]
        assert value is not None
        if value not in self._fp8_of:
            self._fp8_of[value] = self._fp8_activation(value, label)
        node.replace_input_with(0, self._fp8_of[value])

    def _fp8_activation(self, value: ir.Value, label: str) -> ir.Value:
        """x / scale rounded to an integer, which is then an E4M3 number, instead of what E4M3 would round x to."""
        builder, dequantize = self._builder, value.producer()
        quantize = None if dequantize is None or dequantize.inputs[0] is None else dequantize.inputs[0].producer()
        if quantize is None or quantize.op_type != "QuantizeLinear":
            raise LoweringError(f"lower_tensorrt: the input of {label} is not quantized in the canonical graph")
        source, scale = quantize.inputs[0], quantize.inputs[1]
        one, zero = builder.scalar(1.0, "dmqexport/one"), np.array(0, dtype=ml_dtypes.float8_e4m3fn)
        zero_point = builder.constant(zero, "dmqexport/e4m3_zero")
        for op, second, end in (("Div", [scale], "divided"), ("Round", [], "rounded")):
            source = builder.node(op, [source, *second], f"{label}/{end}", before=quantize, like=value).outputs[0]
        codes = builder.node(
            "QuantizeLinear", [source, one, zero_point], f"{label}/e4m3", before=quantize, like=value,
            dtype=ir.DataType.FLOAT8E4M3FN,
        )  # fmt: skip
        return builder.node(
            "DequantizeLinear", [codes.outputs[0], scale, zero_point], f"{label}/e4m3_dequantized", before=quantize,
            like=value,
        ).outputs[0]  # fmt: skip

    def _about(self, layer: LayerQuant, node: ir.Node, dequantize: ir.Node) -> tuple[str, tuple[int, ...], int]:
        """Label, shape and output channels of a weight."""
        stored = dequantize.inputs[0]
        assert stored is not None
        assert stored.const_value is not None
        index = segment_of(node)
        return f"{layer.name}#{index}", dims(stored.const_value), len(layer.segments[index].weight.scale)


def _int4_codes(weights: QuantWeights, layer: LayerQuant, segment: int) -> np.ndarray:
    return (nominal_codes(weights, layer, segment).astype(np.int8) - _INT4_ZERO).astype(ml_dtypes.int4)


def _fp8_codes(weights: QuantWeights, layer: LayerQuant, segment: int) -> np.ndarray:
    return signed_codes(weights, layer, segment).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)


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
    elif zero.dtype not in _ZEROS or bool(np.any(zero.astype(np.float32) != 0)):
        problems.append(f"{node.name}: zero_point must be an int8 zero (or INT4, E4M3), got {zero.dtype}")
    return problems
