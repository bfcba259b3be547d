"""Let a convolution pad by itself where the canonical graph pads before an 8-bit shift."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dmqexport.quant_plan import LayerOp, QuantPlan
from dmqexport.quant_types import dequantize_weight
from dmqexport.quant_weights import QuantWeights
from passes.base import Builder, redirect, segment_of
from passes.bind import bind
from passes.insert_qdq import CODES

#: End of the name of the padding that `InsertQDQ` puts before a shift.
_PADDED = "/padded"


@dataclass(frozen=True, eq=False)
class _Shifted:
    """A convolution behind a Pad. total: float64 [out_channels, kernel_h, kernel_w], its weight summed over inputs."""

    conv: ir.Node
    shift_sum: ir.Node
    total: np.ndarray


class UnpadShifted(ir.passes.InPlacePass):
    """Move the Pad of shifted 8-bit activations into the convolutions that read them.

    The canonical graph pads with real zeros before it adds the shift, and subtracts shift · ΣW everywhere. When the
    convolution pads instead, with code 0, what the shift adds near the border is shift times the weights that lie
    inside: the subtracted sum then depends on the pixel's row and column, which is a table of few distinct borders and
    two Gathers that runtimes fold. Same codes, same products, one pass over the tensor less.

    Touches only shifted convolutions whose height and width are known numbers.
    """

    def __init__(self, plan: QuantPlan, weights: QuantWeights) -> None:
        super().__init__()
        self._plan = plan
        self._weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        bindings = bind(model, self._plan)
        behind: dict[ir.Node, list[_Shifted]] = {}
        for layer in self._plan.layers:
            if layer.op is not LayerOp.CONV:
                continue
            for node, segment in bindings.layers[layer.name].pairs(layer):
                pad, shift_sum = _pad_above(node), _shift_sum(node)
                if segment.activation is None or pad is None or shift_sum is None:
                    continue
                codes = self._weights.codes(layer.name, segment_of(node))
                total = dequantize_weight(codes, segment.weight).astype(np.float64).sum(axis=1)
                behind.setdefault(pad, []).append(_Shifted(node, shift_sum, total))
        builder = Builder(model.graph)
        modified = False
        for pad, convs in behind.items():
            modified |= _unpad(model.graph, builder, pad, convs)
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _unpad(graph: ir.Graph, builder: Builder, pad: ir.Node, convs: list[_Shifted]) -> bool:
    source = pad.inputs[0]
    amounts = None if pad.inputs[1] is None else pad.inputs[1].const_value
    dims = [] if source is None or source.shape is None else list(source.shape)[2:]
    size = [dim for dim in dims if isinstance(dim, int)]
    if source is None or amounts is None or len(size) != 2:
        return False
    _, _, top, left, _, _, bottom, right = (int(amount) for amount in amounts.numpy())
    for shifted in convs:
        conv, name = shifted.conv, str(shifted.conv.name)
        strides, dilations = _pair(conv, "strides"), _pair(conv, "dilations")
        kernel = shifted.total.shape[1:]
        rows, row_of = _borders(size[0], kernel[0], strides[0], dilations[0], top, bottom)
        columns, column_of = _borders(size[1], kernel[1], strides[1], dilations[1], left, right)
        table = np.einsum("oij,ri,cj->orc", shifted.total, rows, columns).astype(np.float32)
        value = builder.constant(table, f"{name}/border_sums")
        for axis, index in ((1, row_of), (2, column_of)):
            value = builder.node(
                "Gather", [value, builder.constant(index, f"{name}/border_of_{axis}")], f"{name}/border_{axis}",
                before=shifted.shift_sum, attributes={"axis": axis}, dtype=ir.DataType.FLOAT,
            ).outputs[0]  # fmt: skip
        shifted.shift_sum.replace_input_with(1, value)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [top, left, bottom, right])
    redirect(pad.outputs[0], source, [])
    graph.remove(pad, safe=True)
    return True


def _borders(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> tuple[np.ndarray, ...]:
    """(distinct sets of kernel taps inside the picture, float64 [n, kernel]; which of them an output pixel sees)."""
    count = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    at = np.arange(count)[:, np.newaxis] * stride - before + np.arange(kernel) * dilation
    inside, which = np.unique((at >= 0) & (at < size), axis=0, return_inverse=True)
    return inside.astype(np.float64), which.reshape(-1).astype(np.int64)


def _pad_above(conv: ir.Node) -> ir.Node | None:
    """The Pad at the head of the quantizer that a convolution reads, None where there is none."""
    value, owner = conv.inputs[0], ""
    while value is not None and (producer := value.producer()) is not None:
        name = str(producer.name)
        if producer.op_type == "Pad":
            return producer if name.endswith(_PADDED) else None
        if producer.op_type == "QuantizeLinear":
            owner = name.removesuffix(CODES)
        elif producer.op_type != "DequantizeLinear" and not name.startswith(f"{owner}/"):
            return None  # above here lies the float graph, with padding of its own
        value = producer.inputs[0]
    return None


def _shift_sum(conv: ir.Node) -> ir.Node | None:
    """The product of the shift's correction and the summed weight, which is subtracted from the convolution."""
    reader = next((use.node for use in conv.outputs[0].uses()), None)
    if reader is not None and reader.op_type == "Mul":
        reader = next((use.node for use in reader.outputs[0].uses()), None)
    product = None if reader is None or reader.op_type != "Sub" else reader.inputs[1]
    return None if product is None else product.producer()


def _pair(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else [1, 1]
