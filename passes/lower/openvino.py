"""OpenVINO: the canonical graph with weights and scales in the one form that its CPU plugin multiplies as int8.

What decides is OpenVINO's low-precision transformation, which looks for FakeQuantize → Convolution|MatMul ← int8
constant → Convert → Multiply. Measured (2026.4.1):

* a zero_point on the weights, even a constant 0, is a Subtract; once a graph shares that constant between layers, the
  layers that share it run in float. Without it all do in int8;
* 4-bit constants never become int8 operands, but Cast and Sub of constants are folded before the search begins: packed
  codes stay packed on disk;
* runtime scales are never matched; the canonical form has none.

u8 × s8 saturates on x86 without VNNI where two adjacent products may pass 16 bits. Activation codes are stored with
128 added there, so that is a matter of the weights: above 64 in magnitude they are then split into two halves with
half the range, whose products are added. Attention multiplies activations with each other: there its codes are taken
without Q/DQ, and multiplied in float.
https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide.html
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerOp, QuantPlan
from passes.base import Builder, constant_array, is_remainder, redirect, take_name
from passes.bind import bind

#: Largest magnitude at which no pair of u8 × s8 products passes 16 bits: 2 · 255 · 64 < 2^15.
_SAFE = 64


class LowerOpenVINO(ir.passes.InPlacePass):
    """Store the weights of layers with quantized activations as int8 without zero_point, or packed with the arithmetic
    that OpenVINO folds to that.

    vnni=False also splits weights that could saturate and lets attention multiply its codes in float, in graphs that
    were lowered with vnni=True too. Weight-only layers and everything unplanned are not touched.
    """

    def __init__(self, plan: QuantPlan, *, vnni: bool) -> None:
        super().__init__()
        self._plan = plan
        self._vnni = vnni

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        bindings = bind(model, self._plan)
        builder = Builder(model.graph)
        modified = False
        for layer in self._plan.layers:
            for node, segment in bindings.layers[layer.name].pairs(layer):
                dequantize = _dequantizer(node)
                if segment.activation is None or dequantize is None:
                    continue
                if len(dequantize.inputs) > 2:
                    if is_remainder(node):
                        _own_codes(builder, dequantize)
                    _without_zero_point(builder, dequantize)
                    modified = True
                if not self._vnni:
                    modified |= _split(builder, node, dequantize, layer.op is LayerOp.CONV)
                if node.outputs[0].is_graph_output():
                    node.name = node.outputs[0].name  # as OpenVINO will call it, so that the proof finds it
        for attention in self._plan.attentions if not self._vnni else ():
            nodes = bindings.attentions[attention.name]
            for product in (nodes.query_key, nodes.probability_value):
                modified |= _codes_in_float(builder, product)
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _dequantizer(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that makes a compute node's weight."""
    producer = None if node.inputs[1] is None else node.inputs[1].producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _own_codes(builder: Builder, dequantize: ir.Node) -> None:
    """Give a remainder's product a weight of its own: OpenVINO runs both in float when they share one.

    Its IR stores equal constants once.
    """
    codes = dequantize.inputs[0]
    stored = constant_array(codes)
    assert codes is not None
    assert stored is not None
    dequantize.replace_input_with(0, builder.constant(stored, f"{dequantize.name}/own", share=False))


def _without_zero_point(builder: Builder, dequantize: ir.Node) -> None:
    """Give a weight's DequantizeLinear signed codes, and a scale that no other layer reads."""
    stored, scale, zero = (constant_array(value) for value in dequantize.inputs)
    assert stored is not None
    assert scale is not None
    assert zero is not None
    label = str(dequantize.name)
    dequantize.replace_input_with(1, builder.constant(scale, f"{label}/scale", share=False))
    if stored.dtype == np.int8:
        dequantize.resize_inputs(2)
        return
    assert stored.dtype == ml_dtypes.uint4
    axis = dequantize.attributes["axis"].as_int()
    spread = [1] * stored.ndim
    spread[axis] = -1

    def cast(value: ir.Value | None, to: ir.DataType, end: str) -> ir.Value:
        return builder.node(
            "Cast", [value], f"{label}/{end}", before=dequantize, attributes={"to": int(to)}, dtype=to
        ).outputs[0]

    offset = builder.constant(zero.astype(np.int32).reshape(spread), f"{label}/zero", share=False)
    codes = builder.node(
        "Sub", [cast(dequantize.inputs[0], ir.DataType.INT32, "nominal"), offset], f"{label}/signed",
        before=dequantize, dtype=ir.DataType.INT32,
    )  # fmt: skip
    dequantize.replace_input_with(0, cast(codes.outputs[0], ir.DataType.INT8, "s8"))
    dequantize.resize_inputs(2)


def _split(builder: Builder, node: ir.Node, dequantize: ir.Node, conv: bool) -> bool:
    """Compute y = x·(w//2) + x·(w − w//2) where w could saturate: twice the output channels, then one Add.

    Returns whether it could. Halves never do, so that a second run finds nothing to split.
    """
    codes, scale = constant_array(dequantize.inputs[0]), constant_array(dequantize.inputs[1])
    if codes is None or scale is None or int(np.abs(codes.astype(np.int64)).max(initial=0)) <= _SAFE:
        return False
    axis, label = (0 if conv else codes.ndim - 1), str(dequantize.name)
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    channels = np.arange(codes.shape[axis]).reshape(groups, -1)
    order = np.concatenate([channels, channels + channels.size], axis=1).reshape(-1)  # both halves of a group together
    half = codes >> 1
    both = np.concatenate([half, codes - half], axis=axis).take(order, axis=axis)
    dequantize.replace_input_with(0, builder.constant(both, f"{label}/halves", share=False))
    dequantize.replace_input_with(1, builder.constant(np.tile(scale, 2)[order], f"{label}/scales", share=False))
    dequantize.outputs[0].shape = ir.Shape(both.shape)
    if len(node.inputs) > 2 and (bias := constant_array(node.inputs[2])) is not None:
        doubled = np.append(bias, np.zeros_like(bias))[order]
        node.replace_input_with(2, builder.constant(doubled, f"{node.name}/bias"))
    output, name = node.outputs[0], str(node.name)
    if groups == 1:
        last = builder.node(
            "Split", [output], f"{name}/halves", after=node, attributes={"axis": 1 if conv else -1, "num_outputs": 2},
            outputs=2, dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        readers, halves = [last], list(last.outputs)
    else:
        readers, last = [], node
        for side in (order < channels.size, order >= channels.size):
            index = builder.constant(np.flatnonzero(side), f"{name}/half_of")
            last = builder.node(
                "Gather", [output, index], f"{name}/half{len(readers)}", after=last, attributes={"axis": 1},
                dtype=ir.DataType.FLOAT,
            )  # fmt: skip
            readers.append(last)
        halves = [reader.outputs[0] for reader in readers]
    total = builder.node("Add", halves, f"{name}/whole", after=last, like=output)
    output.shape = None
    take_name(output, total.outputs[0], f"{name}/both")
    redirect(output, total.outputs[0], readers)
    return True


def _codes_in_float(builder: Builder, product: ir.Node) -> bool:
    """Divide, round, clip and multiply where the operands of an attention product are quantized and dequantized.

    The same values, in operators that OpenVINO does not take for a quantizer. Returns whether there were any.
    """
    found = False
    for value in list(product.inputs):
        dequantize = None if value is None else value.producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize, name = dequantize.inputs[0].producer() if dequantize.inputs[0] else None, str(dequantize.name)
        zero = constant_array(dequantize.inputs[2])
        if quantize is None or quantize.op_type != "QuantizeLinear" or zero is None or np.any(zero):
            raise LoweringError(f"lower_openvino: {name} is not the end of a quantizer with zero_point 0")
        ends, last = np.iinfo(zero.dtype), quantize.inputs[0]
        for label, op_type, operands in (
            ("steps", "Div", [quantize.inputs[1]]),
            ("rounded", "Round", []),
            ("clipped", "Clip", [builder.scalar(float(end), f"{name}/end") for end in (ends.min, ends.max)]),
            ("multiplied", "Mul", [quantize.inputs[1]]),
        ):
            node = builder.node(op_type, [last, *operands], f"{name}/{label}", before=dequantize, like=value)
            last = node.outputs[0]
        assert last is not None
        redirect(dequantize.outputs[0], last, [])
        found = True
    return found


class VerifyOpenVINO(ir.passes.InPlacePass):
    """Refuse what OpenVINO would run in float or not load at all; changes nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raise LoweringError listing every violation with its reason."""
        problems = [
            f"{node.name}: operator {node.domain}.{node.op_type} exists in ONNX Runtime only"
            for node in model.graph
            if node.domain not in ("", "ai.onnx")
        ]
        problems += [
            f"{node.name}: a scale that is not constant runs in float"
            for node in model.graph
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and constant_array(node.inputs[1]) is None
        ]
        if problems:
            raise LoweringError("lower_openvino: " + "; ".join(problems[:20]))
        return ir.passes.PassResult(model, False)
