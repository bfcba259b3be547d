"""Rewrites of the float graph that change no value: what both the float and the quantized side profit from."""

import numpy as np
import onnx_ir as ir

from passes.base import (
    Builder,
    Role,
    constant_array,
    dims,
    is_constant,
    module_of,
    redirect,
    role_of,
    segment_of,
    tag,
    take_name,
)


class SimplifyKeyTranspose(ir.passes.InPlacePass):
    """Replace the exporter's Reshape–Transpose–Reshape of an attention key by one Transpose.

    The exporter flattens a key of rank 4 to rank 3 by its runtime shape, swaps the last two axes and restores the rank:
    that is Transpose(perm=[0, 1, 3, 2]). Touches nothing else.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        builder = Builder(model.graph)
        modified = False
        for node in list(model.graph):
            source = _flattened_transpose(node)
            if source is None:
                continue
            output = node.outputs[0]
            transpose = builder.node(
                "Transpose",
                [source],
                f"{output.name}/transpose",
                before=node,
                attributes={"perm": [0, 1, 3, 2]},
                dtype=source.dtype,
            )
            shape = source.shape
            if shape is not None:
                transpose.outputs[0].shape = ir.Shape([shape[0], shape[1], shape[3], shape[2]])
            redirect(output, transpose.outputs[0], [])
            modified = True
        return ir.passes.PassResult(model, modified)


def _flattened_transpose(restore: ir.Node) -> ir.Value | None:
    """The rank-4 source if `restore` ends Reshape([-1, a, b]) → Transpose([0, 2, 1]) → Reshape(rank 4)."""
    if restore.op_type != "Reshape" or restore.inputs[0] is None:
        return None
    if not restore.outputs[0].uses() and not restore.outputs[0].is_graph_output():
        return None  # already replaced
    transpose = restore.inputs[0].producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    if list(transpose.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    flatten = transpose.inputs[0].producer()
    if flatten is None or flatten.op_type != "Reshape" or flatten.inputs[0] is None:
        return None
    source = flatten.inputs[0]
    if source.shape is None or len(source.shape) != 4:
        return None
    # Both target shapes are computed from the source's own Shape; anything else is another computation.
    return source if _from_shape_of(flatten.inputs[1], source) and _from_shape_of(restore.inputs[1], source) else None


def _from_shape_of(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether `value` is built from Shape(source) by Slice and Concat (with constants) alone."""
    if value is None:
        return False
    if is_constant(value):
        return True
    producer = value.producer()
    if producer is None:
        return False
    if producer.op_type == "Shape":
        return producer.inputs[0] is source
    if producer.op_type in ("Slice", "Concat"):
        return all(_from_shape_of(item, source) for item in producer.inputs)
    return False


class DropIdleSqueeze(ir.passes.InPlacePass):
    """Remove a Squeeze whose axes all have a known size other than 1.

    torch's `squeeze` leaves such an axis alone and the exporter writes the node all the same, which ONNX's Squeeze
    (operator spec, since opset 13) refuses. Touches no Squeeze with an axis of size 1 or unknown.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Squeeze" or len(node.inputs) < 2:
                continue
            source, axes = node.inputs[0], constant_array(node.inputs[1])
            if source is None or source.shape is None or axes is None or not axes.size:
                continue
            sizes = [source.shape[int(axis)] for axis in axes.reshape(-1)]
            if all(isinstance(size, int) and size != 1 for size in sizes):
                redirect(node.outputs[0], source, [])
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


class GemmToMatMul(ir.passes.InPlacePass):
    """Turn every layer's Gemm (alpha = beta = 1, no transA) into MatMul plus Add, so that linear layers have one form.

    The bias has to stand after the rescaling that a timestep table needs. Other Gemms are not touched.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        builder = Builder(model.graph)
        modified = False
        for node in list(model.graph):
            module = module_of(node)
            if node.op_type != "Gemm" or module is None or role_of(node) is not Role.COMPUTE:
                continue
            attributes = {name: node.attributes[name].value for name in node.attributes}
            weight = node.inputs[1]
            if (
                weight is None
                or weight.const_value is None
                or attributes.get("transA")
                or {attributes.get(k, 1.0) for k in ("alpha", "beta")} != {1.0}
            ):
                continue
            output = node.outputs[0]
            if attributes.get("transB"):
                weight = _transposed(builder, weight.const_value, f"{module}/weight")
            product = builder.node("MatMul", [node.inputs[0], weight], f"{module}/MatMul", before=node, like=output)
            tag(product, module, Role.COMPUTE, segment_of(node))
            result = product.outputs[0]
            result.name = f"{module}/product"
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                add = builder.node("Add", [result, node.inputs[2]], f"{module}/Add", before=node, like=output)
                tag(add, module, Role.BIAS)
                result = add.outputs[0]
            take_name(output, result, f"{module}/gemm")
            redirect(output, result, [])
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _transposed(builder: Builder, weight: ir.TensorProtocol, name: str) -> ir.Value:
    """A matrix transposed when it is written, if it ever is: most are replaced by codes before."""
    rows, columns = dims(weight)
    return builder.lazy(lambda: np.ascontiguousarray(weight.numpy().T), weight.dtype, [columns, rows], name)
