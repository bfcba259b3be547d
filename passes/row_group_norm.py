"""Rewrite group normalization as the normalization of rows, for runtimes whose kernel for rows is the faster one."""

import math

import numpy as np
import onnx_ir as ir

from passes.base import Builder, constant_array, redirect, take_name


class RowGroupNorm(ir.passes.InPlacePass):
    """Replace GroupNormalization by Reshape to [batch, groups, elements], LayerNormalization, Reshape, Mul and Add.

    The function is the same (ONNX GroupNormalization-21: mean and variance over a group's channels and pixels). Touches
    only nodes whose channels and pixels are known numbers and whose scale and bias are constants; the batch may be
    dynamic.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        builder = Builder(model.graph)
        modified = False
        for node in list(model.graph):
            if node.op_type == "GroupNormalization":
                modified |= _rewrite(model.graph, builder, node)
        return ir.passes.PassResult(model, modified)


def _rewrite(graph: ir.Graph, builder: Builder, node: ir.Node) -> bool:
    source, output = node.inputs[0], node.outputs[0]
    scale, bias = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    dims = known_dims(source)
    if source is None or dims is None or scale is None or bias is None or scale.shape != (dims[0],) != bias.shape:
        return False
    groups, label = node.attributes["num_groups"].as_int(), str(node.name)
    elements = math.prod(dims) // groups
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    spread = (dims[0],) + (1,) * (len(dims) - 1)

    def add(op_type: str, inputs: list[ir.Value | None], end: str, **attributes: float) -> ir.Value:
        return builder.node(
            op_type, inputs, f"{label}/{end}", before=node, attributes=attributes, dtype=ir.DataType.FLOAT
        ).outputs[0]

    rows = add("Reshape", [source, builder.shape([-1, groups, elements])], "rows")
    ones = builder.constant(np.ones(elements, dtype=np.float32), f"dmqexport/ones_{elements}")
    normal = add("LayerNormalization", [rows, ones], "normal", axis=-1, epsilon=epsilon)
    value = add("Reshape", [normal, builder.shape([-1, *dims])], "pixels")
    value = add("Mul", [value, builder.constant(scale.reshape(spread), f"{label}/gamma")], "scaled")
    value = add("Add", [value, builder.constant(bias.reshape(spread), f"{label}/beta")], "biased")
    value.shape = None if output.shape is None else output.shape.copy()
    take_name(output, value, f"{label}/whole")
    redirect(output, value, [])
    graph.remove(node, safe=True)
    return True


def known_dims(value: ir.Value | None) -> list[int] | None:
    """Every dimension but the batch, or None where one is not a number."""
    if value is None or value.shape is None or len(value.shape) < 2:
        return None
    dims = [dim for dim in list(value.shape)[1:] if isinstance(dim, int)]
    return dims if len(dims) == len(value.shape) - 1 else None
