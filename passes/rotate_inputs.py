"""Multiply what a rotated layer reads with the matrix that its weight was multiplied with."""

import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import QuantPlan
from dmqexport.rotation_matrix import rotation_matrix
from passes.base import Builder, rank_of
from passes.bind import bind


class RotateInputs(ir.passes.InPlacePass):
    """For every planned layer with a rotation, x becomes Reshape to blocks → MatMul (constant) → Reshape back.

    The weight that the plan's codes stand for is the product with the same matrix (calib/rotation.py), which
    `InsertQDQ` puts in: until then the graph does not compute the model. Layers without a rotation, and those that the
    plan leaves in float, are not touched.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; raises LoweringError where the rank of what is rotated is not known."""
        rotated = [layer for layer in self._plan.layers if layer.rotation is not None]
        if not rotated:
            return ir.passes.PassResult(model, False)
        bindings, builder = bind(model, self._plan), Builder(model.graph)
        matrices: dict[int, ir.Value] = {}
        for layer in rotated:
            size, channels = layer.rotation, layer.segments[-1].stop
            assert size is not None
            if size not in matrices:
                matrices[size] = builder.constant(rotation_matrix(size), f"dmqexport/rotation_{size}")
            for index, node in enumerate(bindings.layers[layer.name].compute):
                # Not "<node>/…": that is what runtimes call the parts of a product, whose kernels are looked at.
                label = f"{layer.name}/rotation{index or ''}"
                node.replace_input_with(0, _rotated(builder, node, matrices[size], size, channels, label))
        return ir.passes.PassResult(model, True)


def _rotated(builder: Builder, node: ir.Node, matrix: ir.Value, size: int, channels: int, label: str) -> ir.Value:
    value = node.inputs[0]
    rank = None if value is None else rank_of(value)
    if value is None or rank is None:
        raise LoweringError(f"rotate_inputs: {node.name} reads a tensor of unknown rank")
    kept = [0] * (rank - 1)  # 0 keeps a dimension as it is (ONNX Reshape, allowzero = 0)
    blocks = builder.node(
        "Reshape", [value, builder.shape([*kept, channels // size, size])], f"{label}/blocks", before=node,
        dtype=ir.DataType.FLOAT,
    )  # fmt: skip
    product = builder.node(
        "MatMul", [blocks.outputs[0], matrix], f"{label}/product", before=node, dtype=ir.DataType.FLOAT
    )
    flat = builder.shape([*kept, channels])
    back = builder.node("Reshape", [product.outputs[0], flat], f"{label}/flat", before=node, like=value)
    return back.outputs[0]
