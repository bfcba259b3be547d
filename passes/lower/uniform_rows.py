"""The graph for batches whose samples share a table row: per-sample vectors become one number each, and most vanish."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from passes.base import Builder, Role, constant_array, redirect, role_of, take_name
from passes.gather_timestep_scale import TABLE as PACKED
from passes.gather_timestep_scale import TableColumn, pack_tables
from passes.insert_qdq import LEFT_OVER, ROW, SCALED
from passes.lower.ort_cpu import BOTH_SCALES

_Doubles = np.ndarray[Any, np.dtype[np.float64]]
_PRODUCT = "MatMulIntegerToFloat"
#: Operators that move codes about and add none but the zero_point's.
_MOVERS = ("Transpose", "Slice", "Concat", "Pad", "Reshape")
#: Position of the zero_point of operand 0 and 1 of what reads codes.
_ZERO_AT = {(_PRODUCT, 0): 4, (_PRODUCT, 1): 5, ("ConvInteger", 0): 2, ("DequantizeLinear", 0): 2}
#: Types of codes.
_CODES = (np.dtype(np.uint8), np.dtype(np.int8))
#: Packed tables of numbers, by their type.
TABLE = "dmqexport/uniform_table"
#: Name of the node that takes the first sample's row.
FIRST_ROW = f"{ROW}/first"


class UniformRows(ir.passes.InPlacePass):
    """Let a graph lowered for ONNX Runtime take its table row from the first sample, and its scales as single numbers.

    Mul(rho) → Max → Min → QuantizeLinear(s_ref) becomes QuantizeLinear with the row's own scale and zero_point, which
    saturates at code 0 for nothing, and a Min of bytes at the other end; Mul(1/rho), the correction of a shift and the
    bias after a product go into the product. What this does not know keeps its vectors, of one sample now. Valid for
    batches of one row only (any, without a table). Codes are those of the canonical form but for values that lie on a
    rounding tie within float precision: x / s_row is rounded once, (x · rho) / s_ref twice. Remainders have 254
    times as many such ties, each worth a 254th.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        work = _Uniform(model.graph)
        for node in list(model.graph):
            if node.op_type == "QuantizeLinear":
                work.quantizer(node)
        for node in list(model.graph):
            work.product(node)
        work.finish()
        if work.changed:
            model.graph.sort()
            RemoveUnusedNodesPass()(model)
            work.shrink(model)
        return ir.passes.PassResult(model, work.changed)


@dataclass(frozen=True, eq=False)
class _Chain:
    """What precedes a QuantizeLinear. per_row: float64 [rows] s_ref / s_row; factors: what else `source` is multiplied
    by, a vector over channels that no row changes; zero, top: int64 [rows], the codes of zero and of the upper end,
    counted from the lowest code; shifted: whether the operator's result is corrected for zero not being the offset.
    """

    source: ir.Value
    per_row: _Doubles
    factors: np.ndarray | None
    zero: np.ndarray
    top: np.ndarray
    shifted: bool


class _Uniform:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._builder = Builder(graph)
        self.row = next((v for node in graph for v in node.outputs if v.name == ROW), None)
        self._tables = {} if self.row is None else row_tables(self.row)
        self._rows = next((len(table) for table in self._tables.values()), 1)
        self._numbers: dict[str, list[tuple[ir.Value, np.ndarray]]] = {}  # by type
        self._unshifted: set[ir.Value] = set()
        self.changed = False

    # Before the operator

    def quantizer(self, node: ir.Node) -> None:
        """Give one QuantizeLinear of 8-bit codes the row's scale and zero_point."""
        scale, offset = constant_array(node.inputs[1]), constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
        if scale is None or offset is None or offset.dtype not in _CODES or scale.size != 1 or node.inputs[0] is None:
            return
        codes, kind = node.outputs[0], offset.dtype
        lowest = int(np.iinfo(kind).min)
        chain, readers = self._chain(node.inputs[0], float(scale), int(offset) - lowest), list(_readers(codes))
        if chain is None or any(
            (reader.op_type, at) not in _ZERO_AT and reader.op_type != "Pad" for reader, at in readers
        ):
            return
        if chain.source is node.inputs[0] and int(chain.top.min()) == np.iinfo(np.uint8).max:
            return
        self.changed = True
        builder, label = self._builder, str(node.name)
        source = chain.source
        if chain.factors is not None:
            factors = builder.constant(chain.factors, f"{label}/factors")
            source = builder.node("Mul", [source, factors], f"{label}/balanced", before=node, like=source).outputs[0]
        zero = self._number((chain.zero + lowest).astype(kind), f"{label}/zero_point")
        own = self._number((float(scale) / chain.per_row).astype(np.float32), f"{label}/scale")
        node.replace_input_with(0, source)
        node.replace_input_with(1, own)
        node.replace_input_with(2, zero)
        if int(chain.top.min()) < np.iinfo(np.uint8).max:
            top = self._number((chain.top + lowest).astype(kind), f"{label}/top")
            clipped = builder.node("Min", [codes, top], f"{label}/clipped", after=node, like=codes)
            redirect(codes, clipped.outputs[0], [clipped])
        for reader, at in readers:
            rest = _only_reader(reader.outputs[0]) if reader.op_type == "DequantizeLinear" else None
            if rest is not None and str(rest.name).endswith(LEFT_OVER):
                reader.replace_input_with(1, own)
                self._remainder(rest, source, chain.per_row)
            product = _multiplied(reader)
            if product is not None and at == 0:
                self._unshifted.add(product.outputs[0])
            elif chain.shifted:
                continue  # its correction stays, and takes the codes for what they were
            reader.replace_input_with(2 if reader.op_type == "Pad" else _ZERO_AT[reader.op_type, at], zero)

    def _remainder(self, rest: ir.Node, source: ir.Value, per_row: _Doubles) -> None:
        """Take what the codes leave over from what they are made of now, and round it with the row's own scale too."""
        rest.replace_input_with(0, source)
        for use in list(rest.outputs[0].uses()):
            scale = constant_array(use.node.inputs[1])
            if use.node.op_type == "QuantizeLinear" and scale is not None:
                values = (float(scale) / per_row).astype(np.float32)
                use.node.replace_input_with(1, self._number(values, f"{use.node.name}/scale"))

    def _chain(self, value: ir.Value, scale: float, offset: int) -> _Chain | None:
        """Walk up from a quantizer's input over what `InsertQDQ` put there; None where the arithmetic is another."""
        shift, low, high = np.zeros(self._rows), None, None
        for end, op_type in (("/shifted", "Add"), ("/hi_clipped", "Min"), ("/lo_clipped", "Max")):
            node = value.producer()
            if node is None or node.op_type != op_type or not str(node.name).endswith(end):
                continue
            table = self._per_row(node.inputs[1])
            if table is None or node.inputs[0] is None:
                return None
            value = node.inputs[0]
            if op_type == "Add":
                shift = table
            elif op_type == "Min":
                high = table
            else:
                low = table
        ratio: _Doubles = np.ones(self._rows)
        factors: np.ndarray | None = None
        node = value.producer()
        operand = None if node is None else node.inputs[0]
        if node is not None and operand is not None and node.op_type == "Mul" and str(node.name).endswith(SCALED):
            split = self._split(node.inputs[1])
            if split is None:
                return None
            value, (ratio, factors) = operand, split
        if (low is None) != (high is None):
            return None
        zero = offset + np.rint(shift / scale).astype(np.int64)
        top = np.full(self._rows, np.iinfo(np.uint8).max)
        if low is not None and high is not None:
            zero = -np.rint(low / scale).astype(np.int64)
            top = zero + np.rint(high / scale).astype(np.int64)
        if int(zero.min()) < 0 or int(zero.max()) > np.iinfo(np.uint8).max:
            return None
        return _Chain(value, ratio, factors, zero, top, bool(np.any(shift)))

    def _split(self, value: ir.Value | None) -> tuple[_Doubles, np.ndarray | None] | None:
        """A table as (per row [rows], channel factors in the table's shape without rows, or None if they are one)."""
        table = self._table(value)
        if table is None:
            return None
        flat = table.reshape(len(table), -1).astype(np.float64)
        if flat.shape[1] == 1:
            return np.broadcast_to(flat[:, 0], (self._rows,)), None
        per_row = np.broadcast_to(flat[:, 0] / flat[0, 0], (self._rows,))
        if not np.allclose(flat, per_row[: len(flat), np.newaxis] * flat[:1], rtol=1e-6, atol=0):
            return None
        return per_row, flat[0].reshape(table.shape[1:]).astype(np.float32)

    # After the operator

    def product(self, node: ir.Node) -> None:
        """Take multiplications by numbers of the row, a shift's correction and the bias into one product.

        Of an attention's product in float, which has no bias, into what scales its right operand.
        """
        holder, at = _scaled(node)
        scale = None if holder is None else constant_array(holder.inputs[at])
        if holder is None or scale is None or scale.size != 1:
            return
        base = node.outputs[0]
        reader = _only_reader(base)
        if reader is not None and reader.op_type == "Transpose":
            base = reader.outputs[0]
        factor, last, bias = np.ones(self._rows), base, None
        biased = len(node.inputs) > 6 and node.inputs[6] is not None
        while (reader := _only_reader(last)) is not None:
            name, other = str(reader.name), _other(reader, last)
            table = self._per_row(other)
            if reader.op_type == "Mul" and "/rescaled" in name and table is not None and not biased:
                factor = factor * table
            elif reader.op_type != "Sub" or not name.endswith("/corrected") or node.outputs[0] not in self._unshifted:
                bias = None if biased or holder is not node else _bias(reader, other, base is not node.outputs[0])
                last = last if bias is None else reader.outputs[0]
                break
            last = reader.outputs[0]
        if last is base:
            return
        self.changed = True
        values = (float(scale) * factor).astype(np.float32)
        holder.replace_input_with(at, self._number(values, f"{node.name}/scale", tolerance=1e-6))
        if bias is not None:
            node.resize_inputs(max(7, len(node.inputs)))
            node.replace_input_with(6, self._builder.constant(bias, f"{node.name}/bias"))
        base.shape = None if last.shape is None else last.shape.copy()
        take_name(last, base, f"{last.name}/vector")
        redirect(last, base, [])

    # Numbers of the row

    def _table(self, value: ir.Value | None) -> np.ndarray | None:
        """[rows or 1, ...]: what a value is in every row; None for what depends on more than the row."""
        if value is None:
            return None
        constant = constant_array(value)
        return self._tables.get(value) if constant is None else constant[np.newaxis]

    def _per_row(self, value: ir.Value | None) -> np.ndarray | None:
        """float64 [rows], where a value is one number a row."""
        table = self._table(value)
        if table is None or table.size != len(table):
            return None
        return np.broadcast_to(table.reshape(-1).astype(np.float64), (self._rows,))

    def _number(self, values: np.ndarray, name: str, *, tolerance: float = 0.0) -> ir.Value:
        """[1] of the array's type, or rank 0 where no row changes it; one that differs by a relative `tolerance` will
        do.
        """
        if bool(np.all(values == values[0])):
            return self._builder.constant(values[0], name)
        numbers = self._numbers.setdefault(str(values.dtype), [])
        for value, known in numbers:
            if np.allclose(known, values, rtol=tolerance, atol=0):
                return value
        kind = ir.DataType.from_numpy(values.dtype)
        numbers.append((ir.Value(name=f"{name}/of_row", shape=ir.Shape([1]), type=ir.TensorType(kind)), values))
        return numbers[-1][0]

    def finish(self) -> None:
        """A packed table, a Gather and a Split a type make all numbers; what still reads the row reads the first."""
        if self.row is None or not self.changed:
            return
        builder, row, anchor = self._builder, self.row, self.row.producer()
        assert anchor is not None
        ends = [builder.constant(np.array([n], dtype=np.int64), f"dmqexport/int_{n}") for n in (0, 1)]
        first = builder.node("Slice", [row, *ends], FIRST_ROW, after=anchor, dtype=ir.DataType.INT64)
        redirect(row, first.outputs[0], [first])
        last = first
        for kind, numbers in sorted(self._numbers.items()):
            label, dtype = f"{TABLE}/{kind}", numbers[0][0].dtype
            table = builder.constant(np.stack([column for _, column in numbers], axis=1), label)
            gather = builder.node("Gather", [table, first.outputs[0]], f"{label}/row", after=last, dtype=dtype)
            flat = builder.node(
                "Reshape", [gather.outputs[0], builder.shape([-1])], f"{label}/flat", after=gather, dtype=dtype
            )
            last = builder.node(
                "Split", [flat.outputs[0]], f"{label}/numbers", after=flat,
                attributes={"axis": 0, "num_outputs": len(numbers)}, outputs=len(numbers),
                output_names=[str(value.name) for value, _ in numbers], dtype=dtype,
            )  # fmt: skip
            for (value, _), output in zip(numbers, last.outputs, strict=True):
                output.shape = ir.Shape([1])
                redirect(value, output, [])

    def shrink(self, model: ir.Model) -> None:
        """Pack what is still read of the tables by itself: most of their columns have become numbers of their own."""
        left = [
            value
            for value in self._tables
            if any(use.node.outputs[0] not in self._tables for use in value.uses()) or value.is_graph_output()
        ]
        row = next((node.outputs[0] for node in self._graph if node.name == FIRST_ROW), None)
        packed = self._graph.initializers.get(PACKED)
        if row is None or packed is None or not left:
            return
        columns = []
        for value in left:
            table = self._tables[value]
            flat = table.reshape(len(table), -1) if table[0].size > 1 else table.reshape(-1)
            stand_in = ir.Value(name=value.name, type=value.type)
            columns.append(TableColumn(stand_in, flat, [-1, *table.shape[1:]], str(value.name)))
            redirect(value, stand_in, [])
        RemoveUnusedNodesPass()(model)
        pack_tables(self._graph, row, columns)


def row_tables(row: ir.Value) -> dict[ir.Value, np.ndarray]:
    """Every value that is a function of the row alone, as an array [rows, ...]: Gathers of constants by `row`, and what
    Reshape and Split make of them. Shapes are taken as they are for a batch of one sample a row.
    """
    found: dict[ir.Value, np.ndarray] = {}
    waiting = [use.node for use in row.uses()]
    while waiting:
        node = waiting.pop()
        constant = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        table = constant_array(node.inputs[0]) if node.op_type == "Gather" else found.get(_first(node))
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if table is None:
            continue
        if node.op_type == "Gather" and axis == 0:
            results = [table]
        elif node.op_type == "Reshape" and constant is not None and int(constant[0]) == -1:
            results = [table.reshape(len(table), *constant[1:])]
        elif node.op_type == "Split" and axis == 1:
            sizes = [table.shape[1] // len(node.outputs)] * len(node.outputs) if constant is None else constant
            results = np.split(table, np.cumsum(sizes)[:-1], axis=1)
        else:
            continue
        for output, values in zip(node.outputs, results, strict=True):
            found[output] = values
            waiting += [use.node for use in output.uses()]
    return found


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _readers(codes: ir.Value) -> Iterable[tuple[ir.Node, int]]:
    """(node, position) of everything that reads codes, moved about or not; a Pad at its constant, 2, too."""
    seen, waiting = set(), [codes]
    while waiting:
        for use in waiting.pop().uses():
            if use.node.op_type in _MOVERS:
                if use.node not in seen:
                    seen.add(use.node)
                    waiting.append(use.node.outputs[0])
                    if use.node.op_type == "Pad":
                        yield use.node, 2
            else:
                yield use.node, use.idx


def _multiplied(reader: ir.Node) -> ir.Node | None:
    """The product that takes codes, or an attention's that takes what they were dequantized to; None for others."""
    if reader.op_type == "DequantizeLinear":
        product = _only_reader(reader.outputs[0])
        return None if product is None or _scaled(product)[0] is None else product
    return reader if reader.op_type == _PRODUCT else None


def _scaled(product: ir.Node) -> tuple[ir.Node | None, int]:
    """(node, position) of the scale of a product whose scale can be changed: its own, or its right operand's."""
    if product.op_type == _PRODUCT:
        return product, 2
    maker = product.inputs[1].producer() if product.op_type == "MatMul" and product.inputs[1] is not None else None
    return (maker, 1) if maker is not None and str(maker.name).endswith(BOTH_SCALES) else (None, 0)


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`; None where there are several, or where it is the graph's result."""
    nodes = {use.node for use in value.uses()}
    return None if len(nodes) != 1 or value.is_graph_output() else nodes.pop()


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a node with two."""
    if len(node.inputs) != 2:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _bias(node: ir.Node, operand: ir.Value | None, convolution: bool) -> np.ndarray | None:
    """float32 [n] that an Add puts onto a product, None where it is another Add."""
    bias = constant_array(operand) if node.op_type == "Add" and role_of(node) is Role.BIAS else None
    if bias is None or bias.size != bias.shape[0 if convolution else -1]:
        return None
    return np.ascontiguousarray(bias.reshape(-1))
