"""Integer products that are exact on every x86: for graphs of ONNX Runtime that were lowered for CPUs with VNNI."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from passes.base import Builder, constant_array
from passes.lower.group_by_row import drop_unused_constants, layer_graph
from passes.lower.uniform_rows import TABLE

#: Operator → positions of its weight and of the weight's zero_point.
_OPERANDS = {
    "MatMulIntegerToFloat": (1, 5),
    "MatMulInteger": (1, 3),
    "ConvInteger": (1, 3),
    "QLinearMatMul": (3, 5),
    "QLinearConv": (3, 5),
}
#: Largest magnitude at which no pair of u8 × s8 products passes 16 bits: 2 · 255 · 64 < 2^15.
_SAFE = 64


class MakePortable(ir.passes.InPlacePass):
    """Shift signed weights that could saturate without VNNI to unsigned ones, whose products never do.

    q and q + 128 with zero_point z and z + 128 are the same weight. Touches the constant int8 weights of integer
    products, and only those with a magnitude above 64; packed weights of at most 4 bits never need it. Computed codes
    that are signed, the right operands of attention products, are all made unsigned.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        graph = layer_graph(model)
        builder = Builder(graph)
        modified = False
        for node in graph:
            if node.op_type not in _OPERANDS:
                continue
            weight_at, zero_at = _OPERANDS[node.op_type]
            if (made := node.inputs[weight_at]) is not None and _signed(made) and made.producer() is not None:
                modified |= _unsign(builder, node, made, zero_at)
                continue
            codes = constant_array(node.inputs[weight_at])
            if codes is None or codes.dtype != np.int8 or int(np.abs(codes.astype(np.int64)).max(initial=0)) <= _SAFE:
                continue
            zero = constant_array(node.inputs[zero_at]) if len(node.inputs) > zero_at else None
            if zero is None:
                zero = np.array(0, dtype=np.int8)
            node.resize_inputs(max(len(node.inputs), zero_at + 1))
            for position, values, end in ((weight_at, codes, "weight_u8"), (zero_at, zero, "weight_u8_zero")):
                unsigned = (values.astype(np.int64) + 128).astype(np.uint8)
                node.replace_input_with(position, builder.constant(unsigned, f"{node.name}/{end}", share=False))
            modified = True
        if modified:
            _unsign_numbers(graph)
            RemoveUnusedNodesPass()(model)
            drop_unused_constants(graph)
        return ir.passes.PassResult(model, modified)


def _signed(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT8


def _unsign(builder: Builder, node: ir.Node, codes: ir.Value, zero_at: int) -> bool:
    """Make what quantizes a product's right operand write unsigned codes; False for any other int8 than a quantizer's.

    Its numbers are constants, which change here, or a row's, which `_unsign_numbers` changes for all.
    """
    made: list[tuple[ir.Node, int]] = [(node, zero_at)]
    maker = codes.producer()
    while maker is not None and maker.op_type == "Min" and maker.inputs[0] is not None:
        made.append((maker, 1))
        maker.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        maker = maker.inputs[0].producer()
    if maker is None or maker.op_type != "QuantizeLinear":
        return False
    made.append((maker, 2))
    maker.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    for reader, position in made:
        values = constant_array(reader.inputs[position])
        if values is not None:
            unsigned = (values.astype(np.int64) + 128).astype(np.uint8)
            reader.replace_input_with(position, builder.constant(unsigned, f"{reader.name}/unsigned"))
    return True


def _unsign_numbers(graph: ir.Graph) -> None:
    """Make the numbers of a row that belong to signed codes those of unsigned ones."""
    table = graph.initializers.get(f"{TABLE}/int8")
    values = constant_array(table)
    if table is None or values is None or values.dtype != np.int8:
        return
    table.const_value = ir.tensor((values.astype(np.int64) + 128).astype(np.uint8), name=table.name)
    waiting = [table]
    while waiting:
        value = waiting.pop()
        value.type = ir.TensorType(ir.DataType.UINT8)
        waiting += [
            output
            for use in value.uses()
            if use.node.op_type in ("Gather", "Reshape", "Split")
            for output in use.node.outputs
        ]
