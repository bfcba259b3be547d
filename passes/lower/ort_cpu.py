"""ONNX Runtime on CPU: every quantized operator becomes one fused u8 × s8 matrix product.

Measured (onnxruntime 1.31, relative to float32): ConvInteger has no fast kernel for u8 × s8 and costs 0.75–1.5 with
u8 × u8, while `MatMulIntegerToFloat` (a contributed operator of every ONNX Runtime build) costs 0.27–0.56. So a
convolution becomes im2col on the one-byte codes (Transpose, Pad, Slice, Concat) and that product: 0.33–0.57 in all.

u8 × s8 saturates on x86 without VNNI when two adjacent products may pass 32767. Where that is possible the weights are
shifted to u8 instead, which is exact everywhere and slower; with `vnni=True` they stay signed, and the bundle then
needs a CPU with VNNI. (ONNX Runtime's own remedy, `session.x64quantprecision`, fails to load graphs whose weights it
has to convert twice.)
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulIntegerToFloat

Both operands of a quantized attention product are activations. With `vnni` the right one has signed codes too: u8 × s8
takes 0.3–0.7 of u8 × u8, quantizers aside (0.5–0.9 with them; 8 to 40 channels a head, 64 to 4096 tokens).

No product's output is quantized inside the product (QLinearConv, QLinearMatMul). In UNets with float attention no layer
has a quantizer for its only reader: results meet norms, sums and activation functions first. With quantized attention
queries, keys and values have, and their codes would be the same, but QLinearMatMul, Reshape and Transpose take 0.95 to
1.01 of this product, Reshape, Transpose and QuantizeLinear: the quantizer is moved before the Transpose anyway.
"""

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import AttentionQuant, LayerOp, QuantPlan, Segment
from dmqexport.quant_types import CENTERED_ZERO_POINT, MAX_BITS, ActivationQuant, CodeArray
from dmqexport.quant_weights import QuantWeights
from passes.base import (
    Builder,
    Role,
    constant_array,
    is_remainder,
    left_over,
    operand_name,
    redirect,
    segment_of,
    tag,
    take_name,
)
from passes.bind import AttentionNodes, LayerNodes, bind

CONTRIB_DOMAIN = "com.microsoft"
FUSED_PRODUCT = "MatMulIntegerToFloat"
#: Names of the other kernels that a layer may have.
CONV_KERNEL, FLOAT_KERNEL = "conv-integer", "float"
#: How the name ends of what scales one operand of a product for both.
BOTH_SCALES = "/both_scales"
#: Largest sum of two adjacent u8 × s8 products that the 16-bit step of AVX2 kernels holds.
_PAIR_LIMIT = 32767


class LowerOrtCpu(ir.passes.InPlacePass):
    """Replace planned Conv and MatMul nodes (and quantized attention matmuls) of the canonical graph by integer ones.

    Codes become unsigned with a constant offset, weights stay signed (packed int4 at up to 4 bits). Grouped or dilated
    convolutions use ConvInteger. Weight-only layers and everything unplanned are not touched.

    kernels: layers and attentions that another kernel than the fused product suits better, by name: FLOAT_KERNEL
    multiplies the dequantized codes in float (a weight's DequantizeLinear is left to `LowerWeightOnly`), CONV_KERNEL is
    ConvInteger.
    """

    def __init__(
        self, plan: QuantPlan, weights: QuantWeights, *, vnni: bool, kernels: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self._kernels = dict(kernels or {})
        self._plan = plan
        self._weights = weights
        self._vnni = vnni

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        bindings = bind(model, self._plan)
        work = _Lowering(model.graph, self._plan, self._weights, self._vnni)
        modified = False
        for layer in self._plan.layers:
            nodes = bindings.layers[layer.name]
            for node, segment in nodes.pairs(layer):
                if segment.activation is None or node.op_type in (FUSED_PRODUCT, "ConvInteger"):
                    continue
                kernel = self._kernels.get(layer.name)
                if kernel == FLOAT_KERNEL:
                    modified |= work.float_layer(segment, node)
                else:
                    work.layer(layer.name, layer.op, segment, nodes, node, convolve=kernel == CONV_KERNEL)
                    modified = True
        for attention in self._plan.attentions:
            in_float = self._kernels.get(attention.name) == FLOAT_KERNEL
            modified |= work.attention(attention, bindings.attentions[attention.name], in_float=in_float)
        if modified:
            model.graph.opset_imports[CONTRIB_DOMAIN] = 1
            model.graph.sort()
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


class _Lowering:
    def __init__(self, graph: ir.Graph, plan: QuantPlan, weights: QuantWeights, vnni: bool) -> None:
        self._builder = Builder(graph)
        self._graph = graph
        self._plan = plan
        self._weights = weights
        self._vnni = vnni
        self._codes: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._channels_last: dict[ir.Value, ir.Value] = {}
        self._columns: dict[tuple[object, ...], ir.Value] = {}
        self._floats: dict[ir.Value, ir.Value] = {}
        self._stored: dict[tuple[str, int], tuple[ir.Value, ir.Value]] = {}

    def layer(
        self, name: str, op: LayerOp, segment: Segment, nodes: LayerNodes, node: ir.Node, *, convolve: bool = False
    ) -> None:
        assert segment.activation is not None
        index = segment_of(node)
        offset = unsigned_offset(segment.activation)
        codes = self._quantized(node, 0, self._offset(offset))
        if is_remainder(node):
            self._leave_over(node)
        weight_codes = self._weights.codes(name, index)
        scale = np.asarray(segment.weight.scale) * np.float32(1.0)
        if op is LayerOp.CONV and (convolve or not _plain(node)):
            self._conv_integer(name, segment, node, codes, weight_codes, offset)
            return
        label = operand_name(node)
        if op is LayerOp.CONV:
            columns = self._im2col(node, codes, weight_codes.shape[2:], offset)
            matrix = np.ascontiguousarray(weight_codes.transpose(2, 3, 1, 0).reshape(-1, weight_codes.shape[0]))
        else:
            columns, matrix = codes, np.ascontiguousarray(weight_codes.T)
        if (name, index) not in self._stored:  # a remainder's product has the weight of its segment's
            self._stored[name, index] = self._weight(label, node, matrix, segment)
        weight, zero = self._stored[name, index]
        activation_scale = self._builder.scalar(segment.activation.scale_ref, f"{label}/scale")
        offset_value = self._offset(offset)
        inputs: list[ir.Value | None] = [
            columns,
            weight,
            activation_scale,
            self._builder.constant(scale, f"{label}/weight_scale"),
            offset_value,
            zero,
        ]
        bias = _movable_bias(nodes, node, op)
        if bias is not None:
            inputs.append(self._builder.constant(bias[1], f"{name}/bias"))
        product = self._builder.node(FUSED_PRODUCT, inputs, f"{node.name}/int8", before=node, dtype=ir.DataType.FLOAT)
        product.domain = CONTRIB_DOMAIN
        tag(product, name, Role.COMPUTE, index, remainder=is_remainder(node))
        result = product.outputs[0]
        if op is LayerOp.CONV:
            result = self._builder.node(
                "Transpose", [result], f"{node.name}/nchw", before=node, attributes={"perm": [0, 3, 1, 2]},
                like=node.outputs[0],
            ).outputs[0]  # fmt: skip
        else:
            result.shape = node.outputs[0].shape
        replaced = node if bias is None or bias[0] is None else bias[0]
        self._replace(node, replaced, result)

    def float_layer(self, segment: Segment, node: ir.Node) -> bool:
        """Let the operator read what the shared unsigned codes stand for; False where it does already."""
        assert segment.activation is not None
        value = node.inputs[0]
        dequantize = None if value is None else value.producer()
        if (
            dequantize is not None
            and dequantize.inputs[0] is not None
            and dequantize.inputs[0].dtype == ir.DataType.UINT8
        ):
            return False
        if is_remainder(node):
            self._leave_over(node)
        self._dequantize(node, 0, unsigned_offset(segment.activation), segment.activation.scale_ref)
        return True

    def _dequantize(self, node: ir.Node, operand: int, unsigned: int, reference: float) -> None:
        """Let `node` read what the shared unsigned codes of its operand stand for."""
        value, offset = node.inputs[operand], self._offset(unsigned)
        codes = self._quantized(node, operand, offset)
        if codes not in self._floats:
            scale = self._builder.scalar(reference, f"{codes.name}/scale")
            name = f"{codes.name}/dequantized"
            created = self._builder.node("DequantizeLinear", [codes, scale, offset], name, before=node, like=value)
            self._floats[codes] = created.outputs[0]
        node.replace_input_with(operand, self._floats[codes])

    def _leave_over(self, node: ir.Node) -> None:
        """Let a remainder be that of the unsigned codes, so that nothing is rounded twice."""
        rest = left_over(node)
        maker = None if rest is None or rest.inputs[1] is None else rest.inputs[1].producer()
        if rest is None or maker is None or maker.inputs[0] is None or maker.inputs[0].dtype != ir.DataType.INT8:
            return  # shared with a layer that was here before
        scale = constant_array(maker.inputs[1])
        assert scale is not None
        self._dequantize(rest, 1, CENTERED_ZERO_POINT, float(scale))

    def _replace(self, node: ir.Node, last: ir.Node, result: ir.Value) -> None:
        old = last.outputs[0]
        take_name(old, result, f"{old.name}/float")
        redirect(old, result, [])
        if last is not node:
            self._graph.remove(last, safe=True)
        self._graph.remove(node, safe=True)

    # Operands

    def _offset(self, offset: int) -> ir.Value:
        return self._builder.constant(np.array(offset, dtype=np.uint8), f"dmqexport/offset_{offset}")

    def _signed_offset(self, offset: int) -> ir.Value:
        return self._builder.constant(np.array(offset - 128, dtype=np.int8), f"dmqexport/signed_offset_{offset}")

    def _quantized(self, node: ir.Node, operand: int, zero: ir.Value) -> ir.Value:
        """The operand's codes plus `zero`, in its type; one QuantizeLinear a type however many readers."""
        value = node.inputs[operand]
        dequantize = value.producer() if value is not None else None
        quantize = None
        if dequantize is not None and dequantize.op_type == "DequantizeLinear" and dequantize.inputs[0] is not None:
            quantize = dequantize.inputs[0].producer()
        if quantize is None or quantize.op_type != "QuantizeLinear":
            raise LoweringError(
                f"lower_ort_cpu: operand {operand} of {node.name} is not quantized in the canonical graph"
            )
        codes, kind = quantize.outputs[0], zero.dtype
        assert kind is not None
        if (codes, kind) not in self._codes:
            created = self._builder.node(
                "QuantizeLinear",
                [quantize.inputs[0], quantize.inputs[1], zero],
                f"{codes.name}_{'u8' if kind == ir.DataType.UINT8 else 's8'}",
                before=quantize,
                like=codes,
                dtype=kind,
            )
            self._codes[codes, kind] = created.outputs[0]
        return self._codes[codes, kind]

    def _weight(self, label: str, node: ir.Node, matrix: CodeArray, segment: Segment) -> tuple[ir.Value, ir.Value]:
        """Signed codes [k, n] int8 and their zero_point int8 [n]; packed int4 plus Cast at up to 4 bits.

        ONNX Runtime folds the Cast of a constant when it creates the session.
        """
        builder, qparams = self._builder, segment.weight
        assert segment.activation is not None
        if not self._vnni and may_saturate(matrix, segment.activation):
            unsigned = (matrix.astype(np.int64) + 128).astype(np.uint8)
            zero = np.full(matrix.shape[1], 128, dtype=np.uint8)
            return builder.constant(unsigned, f"{label}/weight_u8"), builder.constant(
                zero, f"{label}/weight_u8_zero", share=False
            )
        if qparams.bits > 4:
            zero = np.zeros(matrix.shape[1], dtype=np.int8)
            return builder.constant(matrix, f"{label}/weight_s8"), builder.constant(
                zero, f"{label}/weight_s8_zero", share=False
            )
        # Nominal codes minus 8 fit int4 whatever the zero_point.
        centered = matrix.astype(np.int64) + qparams.zero_point - 8
        packed = builder.constant(centered.astype(ml_dtypes.int4), f"{label}/weight_s4")
        cast = builder.node(
            "Cast", [packed], f"{label}/weight_s8", before=node, attributes={"to": int(ir.DataType.INT8)},
            dtype=ir.DataType.INT8,
        )  # fmt: skip
        zero = (qparams.zero_point - 8).astype(np.int8)
        return cast.outputs[0], builder.constant(zero, f"{label}/weight_s8_zero", share=False)

    def _im2col(self, node: ir.Node, codes: ir.Value, kernel: tuple[int, ...], offset: int) -> ir.Value:
        """Codes [B, C, H, W] → [B, H', W', kh·kw·C], padded with the code of zero."""
        strides, pads = _ints(node, "strides", [1, 1]), _ints(node, "pads", [0, 0, 0, 0])
        key = (codes, tuple(kernel), tuple(strides), tuple(pads))
        if key in self._columns:
            return self._columns[key]
        builder, label = self._builder, f"{codes.name}_im2col"
        # Convolutions that read the same tensor may differ in kernel or stride; node names must not repeat.
        others = sum(known[0] is codes for known in self._columns)
        if others:
            label = f"{label}.{others + 1}"
        if codes not in self._channels_last:
            self._channels_last[codes] = builder.node(
                "Transpose", [codes], f"{codes.name}/nhwc", before=node, attributes={"perm": [0, 2, 3, 1]},
                dtype=ir.DataType.UINT8,
            ).outputs[0]  # fmt: skip
        value = self._channels_last[codes]
        if any(pads):
            amounts = builder.shape([0, pads[0], pads[1], 0, 0, pads[2], pads[3], 0])
            value = builder.node(
                "Pad", [value, amounts, self._offset(offset)], f"{label}/padded", before=node, dtype=ir.DataType.UINT8
            ).outputs[0]
        for axis, size, stride in ((2, kernel[1], strides[1]), (1, kernel[0], strides[0])):
            if size == 1 and stride == 1:
                continue
            parts = [self._window(value, node, f"{label}/axis{axis}", axis, i, size, stride) for i in range(size)]
            value = parts[0]
            if size > 1:
                value = builder.node(
                    "Concat", parts, f"{label}/axis{axis}", before=node, attributes={"axis": 3},
                    dtype=ir.DataType.UINT8,
                ).outputs[0]  # fmt: skip
        self._columns[key] = value
        return value

    def _window(
        self, value: ir.Value, node: ir.Node, label: str, axis: int, start: int, size: int, stride: int
    ) -> ir.Value:
        remaining = size - 1 - start
        end = -remaining if remaining else np.iinfo(np.int64).max
        inputs = [value] + [self._builder.constant(np.array([n], dtype=np.int64), f"dmqexport/int_{n}") for n in (
            start, end, axis, stride)]  # fmt: skip
        return self._builder.node("Slice", inputs, f"{label}_{start}", before=node, dtype=ir.DataType.UINT8).outputs[0]

    # Other operators

    def _conv_integer(
        self, name: str, segment: Segment, node: ir.Node, codes: ir.Value, weight_codes: CodeArray, offset: int
    ) -> None:
        """Grouped or dilated convolution: ConvInteger with u8 weights (s8 has wrong or slow kernels)."""
        assert segment.activation is not None
        builder, index = self._builder, segment_of(node)
        label = operand_name(node)
        unsigned = (weight_codes.astype(np.int64) + 128).astype(np.uint8)
        weight = builder.constant(unsigned, f"{label}/weight_u8")
        attributes = {key: node.attributes[key].value for key in node.attributes}
        conv = builder.node(
            "ConvInteger",
            [codes, weight, self._offset(offset), self._offset(128)],
            f"{node.name}/int8",
            before=node,
            attributes=attributes,
            dtype=ir.DataType.INT32,
        )
        tag(conv, name, Role.COMPUTE, index, remainder=is_remainder(node))
        cast = builder.node(
            "Cast", [conv.outputs[0]], f"{node.name}/int32", before=node, attributes={"to": int(ir.DataType.FLOAT)},
            like=node.outputs[0],
        )  # fmt: skip
        scale = np.asarray(segment.weight.scale) * np.float32(segment.activation.scale_ref)
        factor = builder.constant(scale.reshape(-1, 1, 1), f"{label}/product_scale")
        result = builder.node(
            "Mul", [cast.outputs[0], factor], f"{node.name}/scaled", before=node, like=node.outputs[0]
        )
        value = result.outputs[0]
        bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            shaped = builder.constant(bias.reshape(-1, 1, 1), f"{name}/bias")
            value = builder.node("Add", [value, shaped], f"{node.name}/biased", before=node, like=value).outputs[0]
        self._replace(node, node, value)

    def attention(self, plan: AttentionQuant, nodes: AttentionNodes, *, in_float: bool) -> bool:
        """Quantized attention matmuls: both operands are activations. False where they are lowered already."""
        modified = False
        for node, left, right in (
            (nodes.query_key, plan.query, plan.key),
            (nodes.probability_value, plan.probability, plan.value),
        ):
            maker = None if node.inputs[0] is None else node.inputs[0].producer()
            if node.op_type == FUSED_PRODUCT or (maker is not None and maker.op_type != "DequantizeLinear"):
                continue
            first = self._offset(unsigned_offset(left))
            second = unsigned_offset(right)
            zeros = (first, self._signed_offset(second) if self._vnni else self._offset(second))
            codes = [self._quantized(node, operand, zero) for operand, zero in enumerate(zeros)]
            if in_float:
                self._float_product(node, codes, left.scale_ref * right.scale_ref, zeros)
            else:
                scales = [
                    self._builder.scalar(qparams.scale_ref, f"{node.name}/{side}_scale")
                    for qparams, side in ((left, "left"), (right, "right"))
                ]
                product = self._builder.node(
                    FUSED_PRODUCT, [*codes, *scales, *zeros], f"{node.name}/int8", before=node, like=node.outputs[0]
                )
                product.domain = CONTRIB_DOMAIN
                product.metadata_props.update(node.metadata_props)
                self._replace(node, node, product.outputs[0])
            modified = True
        return modified

    def _float_product(self, node: ir.Node, codes: Sequence[ir.Value], scale: float, zeros: Sequence[ir.Value]) -> None:
        """Multiply what the codes stand for; the right operand, which is small, takes both scales.

        Two operands straight from DequantizeLinear would be made an integer product by ONNX Runtime.
        """
        builder, one = self._builder, self._builder.scalar(1.0, "dmqexport/one")
        for operand, (value, zero) in enumerate(zip(codes, zeros, strict=True)):
            label, old = f"{value.name}/dequantized", node.inputs[operand]
            result = builder.node("DequantizeLinear", [value, one, zero], label, before=node, like=old).outputs[0]
            if operand:
                factor = builder.scalar(scale, f"{node.name}/scale")
                result = builder.node(
                    "Mul", [result, factor], f"{node.name}{BOTH_SCALES}", before=node, like=old
                ).outputs[0]
            node.replace_input_with(operand, result)


def may_saturate(codes: CodeArray, activation: ActivationQuant) -> bool:
    """Whether two adjacent u8 × s8 products could pass 16 bits for these weight codes."""
    offset = unsigned_offset(activation)
    highest = 2**activation.widths - 1 - activation.zero_point
    largest = 255 if activation.bits == MAX_BITS else offset + int(highest.max())
    return 2 * largest * int(np.abs(codes.astype(np.int64)).max(initial=0)) > _PAIR_LIMIT


def unsigned_offset(qparams: ActivationQuant) -> int:
    """What turns signed codes into uint8: 128 at 8 bits, else the largest zero_point, which keeps codes small."""
    return 128 if qparams.bits == MAX_BITS else int(qparams.zero_point.max())


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def _plain(node: ir.Node) -> bool:
    """Whether im2col as written here applies."""
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    auto_pad = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    return group == 1 and _ints(node, "dilations", [1, 1]) == [1, 1] and auto_pad in ("NOTSET", "")


def _movable_bias(nodes: LayerNodes, node: ir.Node, op: LayerOp) -> tuple[ir.Node | None, np.ndarray] | None:
    """(node to absorb or None, bias [n]) if the bias directly follows the product and can be fused into it."""
    if op is LayerOp.CONV and len(node.inputs) > 2:
        bias = constant_array(node.inputs[2])
        return None if bias is None else (None, bias)
    add, output = nodes.bias, node.outputs[0]
    if add is None or output.is_graph_output() or {use.node for use in output.uses()} != {add}:
        return None
    other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    bias = constant_array(other)
    if bias is None or bias.size != bias.shape[-1 if op is LayerOp.LINEAR else 0]:
        return None
    return add, np.ascontiguousarray(bias.reshape(-1))
