"""Add the integer products of one layer, and its bias with one of them, before anything moves the result."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from passes.base import Builder, Role, constant_array, redirect, role_of, take_name
from passes.lower.group_by_row import drop_unused_constants, layer_graph
from passes.lower.ort_cpu import FUSED_PRODUCT

_BIAS_AT = 6  # of MatMulIntegerToFloat's inputs


class JoinProducts(ir.passes.InPlacePass):
    """Transpose(a) + Transpose(b) becomes Transpose(a + b) where a layer adds the products of its segments and
    remainders, and a bias that is added then goes into a: one pass over the result instead of four.

    Touches sums by `SplitConcat` and `SplitRemainder`, of products by `LowerOrtCpu` that nobody else reads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        graph = layer_graph(model)
        builder = Builder(graph)
        joined: dict[ir.Value, ir.Node] = {}  # result of a sum → a product in it
        modified = False
        for node in list(graph):
            if node.op_type == "Add" and role_of(node) is Role.SUM:
                modified |= _join(builder, node, joined)
        if modified:
            graph.sort()
            RemoveUnusedNodesPass()(model)
            drop_unused_constants(graph)
        return ir.passes.PassResult(model, modified)


def _join(builder: Builder, node: ir.Node, joined: dict[ir.Value, ir.Node]) -> bool:
    moved = [_moved(value) for value in node.inputs]
    raw = [source for source, _ in moved]
    products = [joined.get(value) or _product(value) for value in raw if value is not None]
    orders = {order for _, order in moved}
    if len(products) != 2 or None in products or len(orders) != 1:
        return False
    order, product, result = orders.pop(), products[0], node.outputs[0]
    assert product is not None
    last, replaced, changed = node, result, False
    bias = _bias_behind(result)
    if bias is not None and len(product.inputs) <= _BIAS_AT:
        product.resize_inputs(_BIAS_AT + 1)
        product.replace_input_with(_BIAS_AT, builder.constant(bias[1], f"{product.name}/bias"))
        replaced, changed = bias[0].outputs[0], True
    if order is not None:
        added = builder.node("Add", raw, f"{node.name}/joined", before=node, dtype=ir.DataType.FLOAT)
        last = builder.node(
            "Transpose", [added.outputs[0]], f"{node.name}/moved", before=node, attributes={"perm": list(order)},
            like=result,
        )  # fmt: skip
        changed = True
    total = last.outputs[0] if order is None else last.inputs[0]
    assert total is not None
    joined[total] = product
    if not changed:
        return False
    if last.outputs[0] is not replaced:
        take_name(replaced, last.outputs[0], f"{replaced.name}/apart")
        redirect(replaced, last.outputs[0], [])
    return True


def _moved(value: ir.Value | None) -> tuple[ir.Value | None, tuple[int, ...] | None]:
    """What a Transpose that nobody else reads moves, and how; the value itself where there is none."""
    maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "Transpose" or not _read_once(value):
        return value, None
    return maker.inputs[0], tuple(maker.attributes["perm"].as_ints())


def _product(value: ir.Value) -> ir.Node | None:
    maker = value.producer()
    return maker if maker is not None and maker.op_type == FUSED_PRODUCT and _read_once(value) else None


def _read_once(value: ir.Value | None) -> bool:
    return value is not None and len({use.node for use in value.uses()}) == 1 and not value.is_graph_output()


def _bias_behind(value: ir.Value) -> tuple[ir.Node, np.ndarray] | None:
    """The Add of a layer's bias that alone reads `value`, and the bias, float32 [n]."""
    if not _read_once(value):
        return None
    reader = next(iter(value.uses())).node
    if reader.op_type != "Add" or role_of(reader) is not Role.BIAS:
        return None
    bias = constant_array(reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0])
    return None if bias is None else (reader, np.ascontiguousarray(bias.reshape(-1)))
