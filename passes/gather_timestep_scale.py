"""Pack every per-row table into one [rows, columns] table with one row Gather per forward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.base import Builder, constant_array, redirect, take_name
from passes.insert_qdq import ROW

TABLE = "dmqexport/timestep_table"


@dataclass(frozen=True, eq=False)
class TableColumn:
    """What is read of the row. value: what has to be found in the packed table; table: float32 [rows] or
    [rows, channels]; dims: what the row's part is reshaped to; label: of the Reshape of a table with channels.
    """

    value: ir.Value
    table: np.ndarray
    dims: Sequence[int]
    label: str


class GatherTimestepScale(ir.passes.InPlacePass):
    """Replace the Gathers of single tables by one Gather of a packed table, and a Split and Reshapes of its columns.

    Tables [rows] of one rank share a Reshape and a Split; a table [rows, channels] has a Reshape of its own. Touches
    only Gather(constant, dmqexport/row) → Reshape chains; a graph with fewer than two is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        graph = model.graph
        row = next((node.outputs[0] for node in graph if node.outputs and node.outputs[0].name == ROW), None)
        if row is None:
            return ir.passes.PassResult(model, False)
        columns: list[TableColumn] = []
        for use in list(row.uses()):
            operand = use.node.inputs[0]
            table = constant_array(operand)
            if use.node.op_type != "Gather" or operand is None or table is None or operand.name == TABLE:
                continue
            reshape = next(iter(use.node.outputs[0].uses())).node
            target = constant_array(reshape.inputs[1])
            assert reshape.op_type == "Reshape"
            assert target is not None
            columns.append(TableColumn(reshape.outputs[0], table, target.tolist(), str(reshape.name)))
        if len(columns) < 2:
            return ir.passes.PassResult(model, False)
        singles = [node for column in columns if (node := column.value.producer()) is not None]
        pack_tables(graph, row, columns)
        for node in singles:
            source = node.inputs[0]
            gather = None if source is None else source.producer()
            graph.remove([node] if gather is None else [node, gather], safe=True)
        return ir.passes.PassResult(model, True)


def pack_tables(graph: ir.Graph, row: ir.Value, columns: Sequence[TableColumn]) -> None:
    """Let readers of every column's value read it from one packed table, after what makes `row`, under its name.

    Nodes that made a value before are left without readers.
    """
    by_rank: dict[int, list[TableColumn]] = {}
    wide = [column for column in columns if column.table.ndim == 2]
    for column in columns:
        if column.table.ndim == 1:
            by_rank.setdefault(len(column.dims), []).append(column)
    builder = Builder(graph)
    ranks = sorted(by_rank)
    tables = [np.stack([item.table for item in by_rank[rank]], axis=1) for rank in ranks]
    tables += [item.table for item in wide]
    anchor = row.producer()
    assert anchor is not None
    packed = builder.constant(np.concatenate(tables, axis=1).astype(np.float32), TABLE)
    last = builder.node("Gather", [packed, row], "dmqexport/row_values", after=anchor, dtype=ir.DataType.FLOAT)
    parts = [last.outputs[0]]
    if len(tables) > 1:
        sizes = builder.shape([table.shape[1] for table in tables])
        last = builder.node(
            "Split", [parts[0], sizes], "dmqexport/by_rank", after=last, attributes={"axis": 1},
            outputs=len(tables), dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        parts = list(last.outputs)
    for rank, part in zip(ranks, parts, strict=False):
        items = by_rank[rank]
        shape = builder.shape([-1, len(items)] + [1] * (rank - 2))
        last = builder.node("Reshape", [part, shape], f"dmqexport/rank{rank}", after=last, dtype=ir.DataType.FLOAT)
        found = [last.outputs[0]]
        if len(items) > 1:
            last = builder.node(
                "Split", [found[0]], f"dmqexport/columns{rank}", after=last,
                attributes={"axis": 1, "num_outputs": len(items)}, outputs=len(items), dtype=ir.DataType.FLOAT,
            )  # fmt: skip
            found = list(last.outputs)
        for item, value in zip(items, found, strict=True):
            _replace(item, value)
    for item, part in zip(wide, parts[len(ranks) :], strict=True):
        last = builder.node(
            "Reshape", [part, builder.shape(item.dims)], f"{item.label}/packed", after=last, dtype=ir.DataType.FLOAT
        )
        _replace(item, last.outputs[0])
    graph.sort()


def _replace(column: TableColumn, value: ir.Value) -> None:
    """Let `value` stand for the column's, under its name."""
    take_name(column.value, value, f"{column.value.name}/unpacked")
    redirect(column.value, value, [])
