"""ONNX Runtime on CPU: layers whose activations stay in float, with weights packed in the file and as fast as float.

Left as it is, a DequantizeLinear of a constant runs at every call, and in front of a MatMul ONNX Runtime replaces a
4-bit one by MatMulNBits of accuracy level 4, which rounds the activations to 8 bits (measured: 0.4–0.7 % of the
largest output). Neither is what was calibrated, so the graph says itself what is to be computed.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from collections.abc import Collection
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan
from dmqexport.quant_weights import QuantWeights
from passes.base import Builder, Role, constant_array, redirect, segment_of, tag, take_name
from passes.bind import bind
from passes.lower.ort_cpu import CONTRIB_DOMAIN
from passes.weight_storage import PACKED_BITS

BLOCK_PRODUCT = "MatMulNBits"
#: Widths of MatMulNBits' weights, and the blocks of input channels that share a scale.
_CONTAINERS, _BLOCKS = (4, 8), (16, 32, 64, 128, 256)
#: Activations are multiplied as float32; at the operator's default, level 4, they would be rounded to 8 bits.
_FLOAT_ACCURACY = 1


class LowerWeightOnly(ir.passes.InPlacePass):
    """Replace the DequantizeLinear of weights whose layer has a float activation, or is named in `expanded`; nothing
    else is touched.

    By default by (Cast(codes) - zero_point) · scale, which ONNX Runtime computes once, when it creates the session:
    the same float32 numbers, float's latency, and float's memory. With `packed` a MatMul becomes MatMulNBits, whose
    weights stay packed in memory too; it costs 1.0 to 1.6 of a float MatMul here, since every call unpacks them.
    """

    def __init__(self, plan: QuantPlan, weights: QuantWeights, *, packed: bool, expanded: Collection[str] = ()) -> None:
        super().__init__()
        self._expanded = frozenset(expanded)
        self._plan = plan
        self._weights = weights
        self._packed = packed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        bindings, builder = bind(model, self._plan), Builder(model.graph)
        modified = False
        for layer in self._plan.layers:
            for node, segment in bindings.layers[layer.name].pairs(layer):
                dequantize = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
                chosen = segment.activation is None or layer.name in self._expanded
                if not chosen or dequantize is None or dequantize.op_type != "DequantizeLinear":
                    continue
                if (
                    self._packed
                    and segment.activation is None
                    and layer.op is LayerOp.LINEAR
                    and node.op_type == "MatMul"
                ):
                    _block_product(builder, self._weights, layer, node)
                    model.graph.opset_imports[CONTRIB_DOMAIN] = 1
                else:
                    _expand(builder, dequantize)
                modified = True
        if modified:
            model.graph.sort()
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _expand(builder: Builder, dequantize: ir.Node) -> None:
    """Say in plain operators what a DequantizeLinear of a weight computes: ONNX Runtime folds these, and not that."""
    codes, result, name = dequantize.inputs[0], dequantize.outputs[0], str(dequantize.name)
    scale, zero = constant_array(dequantize.inputs[1]), constant_array(dequantize.inputs[2])
    assert codes is not None
    assert codes.shape is not None
    assert scale is not None
    spread = [1] * len(codes.shape)
    spread[dequantize.attributes["axis"].as_int()] = -1
    value = builder.node(
        "Cast", [codes], f"{name}/codes", before=dequantize, attributes={"to": int(ir.DataType.FLOAT)}, like=result,
        dtype=ir.DataType.FLOAT,
    ).outputs[0]  # fmt: skip
    if zero is not None and np.any(zero.astype(np.int64)):
        offset = builder.constant(zero.astype(np.float32).reshape(spread), f"{name}/zero_point")
        value = builder.node("Sub", [value, offset], f"{name}/centered", before=dequantize, like=result).outputs[0]
    factor = builder.constant(scale.reshape(spread), f"{name}/scale")
    value = builder.node("Mul", [value, factor], f"{name}/expanded", before=dequantize, like=result).outputs[0]
    redirect(result, value, [])


def _block_product(builder: Builder, weights: QuantWeights, layer: LayerQuant, node: ir.Node) -> None:
    """MatMul of a dequantized weight → MatMulNBits; every block of an output channel has the channel's scale."""
    index = segment_of(node)
    qparams, (channels, features) = layer.segments[index].weight, weights.shape(layer.name, index)
    bits = _CONTAINERS[qparams.bits > PACKED_BITS]
    block = best_block(features, bits)
    blocks, label = -(-features // block), f"{layer.name}#{index}"
    zero = np.repeat(np.asarray(qparams.zero_point, dtype=np.uint8)[:, np.newaxis], blocks, axis=1)
    product = builder.node(
        BLOCK_PRODUCT,
        [
            node.inputs[0],
            builder.lazy(
                partial(block_codes, weights, layer, index, block, bits),
                ir.DataType.UINT8,
                (channels, blocks, block * bits // 8),
                f"{label}/weight_blocks",
            ),
            builder.constant(np.repeat(np.asarray(qparams.scale), blocks), f"{label}/weight_block_scale"),
            builder.constant(_pack(zero, bits).reshape(-1), f"{label}/weight_block_zero_point", share=False),
        ],
        f"{node.name}/packed",
        before=node,
        attributes={
            "K": features,
            "N": channels,
            "bits": bits,
            "block_size": block,
            "accuracy_level": _FLOAT_ACCURACY,
        },
        like=node.outputs[0],
    )
    product.domain = CONTRIB_DOMAIN
    tag(product, layer.name, Role.COMPUTE, index)
    old = node.outputs[0]
    take_name(old, product.outputs[0], f"{old.name}/float")
    redirect(old, product.outputs[0], [])
    builder.graph.remove(node, safe=True)


def best_block(features: int, bits: int) -> int:
    """The block size of fewest bytes for `features` input channels: scales against padding; the larger of two."""
    return min(reversed(_BLOCKS), key=lambda block: -(-features // block) * (block * bits / 8 + 4 + bits / 8))


def block_codes(weights: QuantWeights, layer: LayerQuant, segment: int, block: int, bits: int) -> np.ndarray:
    """uint8 [out, blocks, block · bits / 8]: nominal codes, the low half of a byte first; padding is real zero."""
    qparams, codes = layer.segments[segment].weight, weights.codes(layer.name, segment)
    zero = qparams.zero_point[:, np.newaxis]
    nominal = np.repeat(zero, -(-codes.shape[1] // block) * block, axis=1)
    nominal[:, : codes.shape[1]] += codes
    return _pack(nominal.astype(np.uint8), bits).reshape(len(codes), -1, block * bits // 8)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, columns] → the same, or at 4 bits two columns a byte and an odd one alone."""
    if bits > PACKED_BITS:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: np.ndarray = even[:, 0::2] | (even[:, 1::2] << 4)
    return packed
