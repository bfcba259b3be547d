"""Insert Q/DQ pairs and the constants around them: the canonical quantized operator."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import AttentionQuant, LayerOp, LayerQuant, QuantPlan
from dmqexport.quant_types import ActivationQuant, RowConstants, dequantize_weight, remainder_of
from dmqexport.quant_weights import QuantWeights
from passes.base import (
    Builder,
    Role,
    constant_array,
    is_constant,
    is_remainder,
    operand_name,
    rank_of,
    redirect,
    segment_of,
    tag,
    take_name,
)
from passes.bind import AttentionNodes, LayerNodes, bind
from passes.weight_storage import PACKED_BITS, nominal_weight, signed_weight, weight_axis

ROW = "dmqexport/row"
ROW_MAP = "dmqexport/row_map"
TIMESTEP = "timestep"
#: Ends of the names of a quantizer's product with rho, of its codes, and of what these stand for.
SCALED, CODES, DEQUANTIZED = "/scaled", "/codes", "/dequantized"
#: End of the name of what rounding leaves over.
LEFT_OVER = "/left_over"


@dataclass(frozen=True, eq=False)
class _Quantized:
    """A dequantized activation, what was rounded to it, and the constants that its operator's output needs."""

    value: ir.Value
    scaled: ir.Value
    constants: RowConstants
    inv_rho: ir.Value | None
    correction: ir.Value | None


class InsertQDQ(ir.passes.InPlacePass):
    """Quantize the inputs and weights of every planned layer and attention; everything else stays as it is.

    Emits per operand Mul(rho), with the channel factors in it, Max(lo), Min(hi) (or Add(shift)), QuantizeLinear,
    DequantizeLinear with one constant rank-0 scale and an int8 zero, and after the operator Mul(1/rho), the shift
    correction and the bias. Values that depend on the timestep come from one Gather each; `GatherTimestepScale` packs
    those. Weights of at most 4 bits are stored as packed uint4 nominal codes with their zero_point, wider ones as
    signed int8.
    """

    def __init__(self, plan: QuantPlan, weights: QuantWeights) -> None:
        super().__init__()
        self._plan = plan
        self._weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; a graph that is already quantized is left alone."""
        bindings = bind(model, self._plan)
        work = _Insertion(model.graph, self._plan, self._weights)
        modified = False
        for layer in self._plan.layers:
            nodes = bindings.layers[layer.name]
            if is_constant(nodes.compute[0].inputs[1]):
                work.layer(layer, nodes)
                modified = True
        for attention in self._plan.attentions:
            pair = bindings.attentions[attention.name]
            if not _reads_dequantized(pair.query_key):
                work.attention(attention, pair)
                modified = True
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _reads_dequantized(node: ir.Node) -> bool:
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


class _Insertion:
    def __init__(self, graph: ir.Graph, plan: QuantPlan, weights: QuantWeights) -> None:
        self._graph = graph
        self._plan = plan
        self._weights = weights
        self._builder = Builder(graph)
        self._done: dict[tuple[object, ...], _Quantized] = {}
        self._stored: dict[tuple[str, int], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._columns: dict[tuple[bytes, tuple[int, ...]], ir.Value] = {}
        self._row: ir.Value | None = None

    # Layers

    def layer(self, plan: LayerQuant, nodes: LayerNodes) -> None:
        bias_moves = any(
            segment.activation is not None
            and (segment.activation.constants().has_rescale or segment.activation.constants().has_shift)
            for segment in plan.segments
        )
        quantized: _Quantized | None = None
        for node in nodes.compute:
            index = segment_of(node)
            segment = plan.segments[index]
            name = operand_name(node)
            conv = plan.op is LayerOp.CONV
            node.replace_input_with(1, self._weight(name, node, plan, index))
            bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
            if bias is not None and plan.bias is not None:
                bias = np.asarray(plan.bias)
                node.replace_input_with(2, self._builder.constant(bias, f"{plan.name}/bias"))
            if bias is not None and bias_moves:
                node.resize_inputs(2)
            else:
                bias = None
            if segment.activation is None:
                continue
            padded = conv and segment.activation.constants().has_shift
            source = node.inputs[0]
            assert source is not None
            if padded:
                source = self._pad(source, node, name)
            rank, axis = (4, 1) if conv else (rank_of(source), -1)
            if is_remainder(node):
                assert quantized is not None, "a remainder follows its own segment"
                quantized = self._remainder(quantized, segment.activation, name, node)
            else:
                quantized = self._activation(source, segment.activation, name, node, rank, axis)
            node.replace_input_with(0, quantized.value)
            sums: ir.Value | None = None
            if quantized.correction is not None:
                codes = self._weights.codes(plan.name, index)
                total = dequantize_weight(codes, segment.weight).astype(np.float64)
                total = total.reshape(total.shape[0], -1).sum(axis=1).astype(np.float32)
                sums = self._builder.constant(total.reshape(-1, 1, 1) if conv else total, f"{name}/weight_sum")
            self._after(node, [quantized], sums, bias, plan.name)
        if nodes.bias is not None and plan.bias is not None:
            self._replace_bias(nodes.bias, np.asarray(plan.bias), plan.name)

    def _replace_bias(self, node: ir.Node, bias: np.ndarray, module: str) -> None:
        """Put a trained bias in the place of the one a bias node adds."""
        for position, value in enumerate(node.inputs):
            original = constant_array(value)
            if original is not None and original.size == bias.size:
                replacement = self._builder.constant(bias.reshape(original.shape), f"{module}/bias")
                node.replace_input_with(position, replacement)
                return
        raise LoweringError(f"insert_qdq: {module} has a trained bias of {bias.size} values and no constant to replace")

    def _weight(self, name: str, node: ir.Node, plan: LayerQuant, index: int) -> ir.Value:
        original, qparams = node.inputs[1], plan.segments[index].weight
        shape = self._weights.shape(plan.name, index)
        shape = shape if plan.op is LayerOp.CONV else shape[::-1]
        if original is None or original.shape is None or tuple(original.shape) != shape:
            got = None if original is None else original.shape
            raise LoweringError(f"insert_qdq: {name} has codes {shape}, the graph's weight is {got}")
        if (plan.name, index) not in self._stored:  # a remainder's product has the weight of its segment's
            scale = self._builder.constant(np.asarray(qparams.scale), f"{name}/weight_scale")
            store = nominal_weight if qparams.bits <= PACKED_BITS else signed_weight
            weight = store(self._builder, self._weights, plan, index, shape, f"{name}/weight_codes")
            packed = qparams.bits <= PACKED_BITS
            zeros = qparams.zero_point.astype(ml_dtypes.uint4) if packed else np.zeros(len(qparams.scale), np.int8)
            self._stored[plan.name, index] = (weight, scale, self._builder.constant(zeros, f"{name}/weight_zero_point"))
        dequantize = self._builder.node(
            "DequantizeLinear",
            self._stored[plan.name, index],
            f"{name}/weight_dequantized",
            before=node,
            attributes={"axis": weight_axis(plan)},
            like=original,
        )
        return dequantize.outputs[0]

    def _pad(self, source: ir.Value, node: ir.Node, name: str) -> ir.Value:
        """Pad with real zeros first: after a shift, zero is no longer code 0 and the operator may not pad."""
        if node.attributes.get("auto_pad") and node.attributes["auto_pad"].as_string() not in ("NOTSET", ""):
            raise LoweringError(f"insert_qdq: {name} uses auto_pad, which a shifted 8-bit activation cannot follow")
        pads = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else [0, 0, 0, 0]
        if not any(pads):
            return source
        key = ("pad", source, tuple(pads))
        if key not in self._done:
            amounts = self._builder.shape([0, 0, pads[0], pads[1], 0, 0, pads[2], pads[3]])
            padded = self._builder.node("Pad", [source, amounts], f"{name}/padded", before=node, dtype=source.dtype)
            self._done[key] = _Quantized(
                padded.outputs[0], padded.outputs[0], ActivationQuant.from_rows(8, [1.0], [0]).constants(), None, None
            )
        node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0])
        return self._done[key].value

    # Activations

    def _activation(
        self, source: ir.Value, qparams: ActivationQuant, name: str, node: ir.Node, rank: int | None, axis: int = -1
    ) -> _Quantized:
        if rank is None:
            raise LoweringError(f"insert_qdq: the rank of {source.name!r}, read by {name}, is unknown")
        factor = None if qparams.channel_factor is None else (axis % rank, qparams.channel_factor.tobytes())
        key = (
            source, rank, factor, qparams.bits, qparams.scale_ref, qparams.scale.tobytes(),
            qparams.zero_point.tobytes(), qparams.widths.tobytes(),
        )  # fmt: skip
        if key in self._done:
            return self._done[key]
        builder, constants = self._builder, qparams.constants()
        value = source

        def step(op_type: str, table: np.ndarray, label: str, done: str) -> None:
            nonlocal value
            operand = self._column(table, f"{name}/{label}", rank, axis)
            value = builder.node(op_type, [value, operand], name + done, before=node, like=source).outputs[0]

        if constants.has_rho:
            step("Mul", constants.rho, "scal", SCALED)
        if constants.has_clip:
            step("Max", constants.lo, "lo_clipp", "/lo_clipped")
            step("Min", constants.hi, "hi_clipp", "/hi_clipped")
        if constants.has_shift:
            step("Add", constants.shift, "shift", "/shifted")
        self._done[key] = _Quantized(
            self._rounded(value, constants.scale_ref, name, node),
            value,
            constants,
            self._column(constants.inv_rho, f"{name}/inv_rho", rank) if constants.has_rescale else None,
            self._column(constants.correction, f"{name}/correction", rank) if constants.has_shift else None,
        )
        return self._done[key]

    def _rounded(self, value: ir.Value, scale: float, name: str, node: ir.Node) -> ir.Value:
        """Q/DQ with one constant scale and an int8 zero."""
        builder = self._builder
        step = builder.scalar(scale, f"{name}/scale")
        zero = builder.constant(np.array(0, dtype=np.int8), "dmqexport/zero")
        codes = builder.node(
            "QuantizeLinear", [value, step, zero], name + CODES, before=node, like=value, dtype=ir.DataType.INT8
        )
        return builder.node(
            "DequantizeLinear", [codes.outputs[0], step, zero], name + DEQUANTIZED, before=node, like=value
        ).outputs[0]

    def _remainder(self, first: _Quantized, qparams: ActivationQuant, name: str, node: ir.Node) -> _Quantized:
        """Quantize what the codes of `first`, whose quantizer is `qparams`, leave over of what was rounded to them."""
        key = ("remainder", first.value)
        if key not in self._done:
            rest = self._builder.node(
                "Sub", [first.scaled, first.value], name + LEFT_OVER, before=node, like=first.value
            ).outputs[0]
            value = self._rounded(rest, remainder_of(qparams).scale_ref, name, node)
            self._done[key] = replace(first, value=value, scaled=rest)
        return self._done[key]

    def _column(self, table: np.ndarray, name: str, rank: int, axis: int = -1) -> ir.Value:
        """A per-row table [rows] gathered by timestep to [batch, 1, …], or a scalar when it does not vary.

        A table [rows, channels] becomes [batch, …, channels, …] with the channels at `axis`, or that without a batch.
        """
        spread = [1] * (rank - 1)
        if table.ndim == 2:
            spread[axis % rank - 1] = table.shape[1]
        if bool(np.all(table == table[0])):
            if table.ndim == 1:
                return self._builder.scalar(float(table[0]), name)
            return self._builder.constant(np.array(table[0]).reshape(spread), name)
        key = (table.tobytes(), (rank, *spread))
        if key not in self._columns:
            row = self._row_index()
            column = self._builder.constant(np.asarray(table), f"{name}/table")
            gathered = self._builder.node("Gather", [column, row], f"{name}/row", before=self._first(row))
            gathered.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            shape = self._builder.shape([-1, *spread])
            reshaped = self._builder.node("Reshape", [gathered.outputs[0], shape], name, after=gathered)
            reshaped.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            self._columns[key] = reshaped.outputs[0]
        return self._columns[key]

    def _row_index(self) -> ir.Value:
        if self._row is None:
            timestep = next((value for value in self._graph.inputs if value.name == TIMESTEP), None)
            if timestep is None:
                raise LoweringError(f"insert_qdq: the graph has no input {TIMESTEP!r} to index the table with")
            table = self._builder.constant(np.asarray(self._plan.row_map), ROW_MAP)
            first = next(iter(self._graph))
            key = self._timestep_key(timestep, first)
            node = self._builder.node("Gather", [table, key], ROW, before=first, dtype=ir.DataType.INT64)
            self._row = node.outputs[0]
        return self._row

    def _timestep_key(self, timestep: ir.Value, first: ir.Node) -> ir.Value:
        """The timestep itself where it is an integer, round(timestep · scale) where it is a float; before `first`."""
        if timestep.dtype == ir.DataType.INT64:
            return timestep
        builder, name = self._builder, "dmqexport/timestep"
        if self._plan.timestep_scale != 1.0:
            scale = builder.scalar(self._plan.timestep_scale, f"{name}_scale")
            scaled = builder.node("Mul", [timestep, scale], f"{name}_scaled", before=first, like=timestep)
            timestep = scaled.outputs[0]
        rounded = builder.node("Round", [timestep], f"{name}_rounded", before=first, like=timestep)
        node = builder.node(
            "Cast", [rounded.outputs[0]], f"{name}_key", before=first, attributes={"to": ir.DataType.INT64},
            dtype=ir.DataType.INT64,
        )  # fmt: skip
        return node.outputs[0]

    def _first(self, row: ir.Value) -> ir.Node | None:
        """The node after the row index: gathers go to the top, so that any later node may read them."""
        producer = row.producer()
        assert producer is not None
        nodes = iter(self._graph)
        while next(nodes) is not producer:
            pass
        return next(nodes)

    # After the operator

    def _after(
        self, node: ir.Node, operands: list[_Quantized], sums: ir.Value | None, bias: np.ndarray | None, module: str
    ) -> None:
        """Append Mul(1/rho), the correction of a shifted first operand, and a bias that had to move."""
        builder, output = self._builder, node.outputs[0]
        last, previous = output, node

        def append(op_type: str, operand: ir.Value, label: str) -> ir.Node:
            nonlocal last, previous
            previous = builder.node(op_type, [last, operand], f"{node.name}/{label}", after=previous, like=output)
            last = previous.outputs[0]
            return previous

        added: list[ir.Node] = []
        for position, operand in enumerate(operands):
            if operand.inv_rho is not None:
                added.append(append("Mul", operand.inv_rho, f"rescaled{position or ''}"))
            if position == 0 and operand.correction is not None:
                assert sums is not None
                product = builder.node(
                    "Mul", [operand.correction, sums], f"{node.name}/shift_sum", after=previous,
                    dtype=ir.DataType.FLOAT,
                )  # fmt: skip
                previous = product
                added.append(product)
                added.append(append("Sub", product.outputs[0], "corrected"))
        if bias is not None:
            added.append(append("Add", builder.constant(bias.reshape(-1, 1, 1), f"{module}/bias"), "biased"))
            tag(added[-1], module, Role.BIAS)
        if added:
            take_name(output, last, f"{node.name}/raw")
            redirect(output, last, [reader for reader in added if output in reader.inputs])

    # Attention

    def attention(self, plan: AttentionQuant, nodes: AttentionNodes) -> None:
        pairs = (
            (nodes.query_key, plan.query, "query", plan.key, "key"),
            (nodes.probability_value, plan.probability, "probability", plan.value, "value"),
        )
        for node, left, left_name, right, right_name in pairs:
            assert node.inputs[0] is not None
            assert node.inputs[1] is not None
            first = self._activation(node.inputs[0], left, f"{plan.name}#{left_name}", node, 4)
            second = self._activation(node.inputs[1], right, f"{plan.name}#{right_name}", node, 4)
            if second.constants.has_shift:
                raise LoweringError(f"insert_qdq: {plan.name}#{right_name} is shifted; only the first operand may be")
            sums: ir.Value | None = None
            if first.correction is not None:
                axes = self._builder.shape([-2])
                sums = self._builder.node(
                    "ReduceSum", [second.value, axes], f"{plan.name}#{right_name}/sum", before=node,
                    attributes={"keepdims": 1}, dtype=ir.DataType.FLOAT,
                ).outputs[0]  # fmt: skip
            node.replace_input_with(0, first.value)
            node.replace_input_with(1, second.value)
            self._after(node, [first, second], sums, None, plan.name)
