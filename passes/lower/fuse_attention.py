"""OpenVINO: quantized attention in the form that its CPU plugin runs as one kernel, products, softmax and all."""

import numpy as np
import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import AttentionQuant, QuantPlan
from dmqexport.quant_types import MAX_BITS
from passes.base import Builder, constant_array, redirect, take_name
from passes.bind import bind


class FuseAttention(ir.passes.InPlacePass):
    """Let nothing but the two products read what attention quantizes, and multiply each of them back once.

    The canonical graph has int8 operands only: it shifts 8-bit probabilities, whose zero_point is 0, by −128 steps and
    afterwards subtracts that shift times the sum of the values. Here they are uint8 codes, without shift and sum: the
    same products. And the two tables that a product is multiplied back with, one for each operand, are multiplied with
    each other first, since a kernel takes a limited number of operands. Moving heads in front of tokens after
    quantization instead of before, so that the kernel could read codes where they lie, gained nothing.

    For CPUs whose u8 × s8 products do not saturate.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed. LoweringError for a graph that is not canonical."""
        bindings, builder = bind(model, self._plan), Builder(model.graph)
        modified = False
        for attention in self._plan.attentions:
            nodes = bindings.attentions[attention.name]
            if _is_unsigned(attention):
                modified |= _unshift(builder, nodes.probability_value)
            for product in (nodes.query_key, nodes.probability_value):
                modified |= _rescale_once(builder, product)
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _is_unsigned(attention: AttentionQuant) -> bool:
    return attention.probability.bits == MAX_BITS and not np.any(attention.probability.zero_point)


def _unshift(builder: Builder, product: ir.Node) -> bool:
    """Whether the product's first operand was shifted; it no longer is."""
    dequantize = _producer(product.inputs[0], "DequantizeLinear")
    quantize = _producer(dequantize.inputs[0], "QuantizeLinear")
    if quantize.outputs[0].dtype == ir.DataType.UINT8:
        return False
    shift = _producer(quantize.inputs[0], "Add")
    zero = builder.constant(np.array(0, dtype=np.uint8), "dmqexport/zero_u8")
    quantize.replace_input_with(0, shift.inputs[0])
    quantize.replace_input_with(2, zero)
    quantize.outputs[0].dtype = ir.DataType.UINT8
    dequantize.replace_input_with(2, zero)
    builder.graph.remove(shift, safe=True)
    correction = product
    while correction.op_type != "Sub":
        found = _only_reader(correction.outputs[0])
        if found is None or found.op_type not in ("Mul", "Sub"):
            raise LoweringError(f"fuse_attention: nothing after {product.name} takes back the shift of its operand")
        correction = found
    _bypass(builder, correction)
    return True


def _rescale_once(builder: Builder, product: ir.Node) -> bool:
    """Whether the product was multiplied back twice; it is once, by the tables' product."""
    first = _rescale(product)
    second = None if first is None else _rescale(first)
    if first is None or second is None:
        return False
    own, other = first.inputs[1], second.inputs[1]
    left, right = constant_array(own), constant_array(other)
    if left is not None and right is not None:
        both = builder.constant(left * right, f"{product.name}/inv_rho")
    else:
        both = builder.node(
            "Mul", [own, other], f"{product.name}/inv_rho", before=first, dtype=ir.DataType.FLOAT
        ).outputs[0]
    first.replace_input_with(1, both)
    _bypass(builder, second)
    return True


def _rescale(node: ir.Node) -> ir.Node | None:
    """The product with a table that alone reads the node, None where something else does."""
    reader = _only_reader(node.outputs[0])
    return reader if reader is not None and "/rescaled" in str(reader.name) else None


def _bypass(builder: Builder, node: ir.Node) -> None:
    """Remove a node; what read it reads its first input, which takes its name where it was the attention's result."""
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    redirect(after, before, [])
    if after.name != node.name:
        take_name(after, before, str(node.name))
    builder.graph.remove(node, safe=True)


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        found = "nothing" if node is None else f"{node.op_type} {node.name}"
        raise LoweringError(f"fuse_attention: expected {op_type} above the probabilities, found {found}")
    return node
