"""Pack every per-row table into one [rows, columns] table with one row Gather per forward."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.base import Builder, constant_array, redirect
from passes.insert_qdq import ROW

TABLE = "dmqexport/timestep_table"


@dataclass(frozen=True, eq=False)
class _Column:
    """One Gather → Reshape chain. table: float32 [rows] or [rows, channels]; dims: what it is reshaped to."""

    gather: ir.Node
    reshape: ir.Node
    table: np.ndarray
    dims: list[int]


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
        by_rank: dict[int, list[_Column]] = {}
        wide: list[_Column] = []
        for use in list(row.uses()):
            gather = use.node
            operand = gather.inputs[0]
            table = constant_array(operand)
            if gather.op_type != "Gather" or operand is None or table is None or operand.name == TABLE:
                continue
            reshape = next(iter(gather.outputs[0].uses())).node
            target = constant_array(reshape.inputs[1])
            assert reshape.op_type == "Reshape"
            assert target is not None
            column = _Column(gather, reshape, table, target.tolist())
            (wide if table.ndim == 2 else by_rank.setdefault(len(target), [])).append(column)
        if sum(len(items) for items in by_rank.values()) + len(wide) < 2:
            return ir.passes.PassResult(model, False)
        self._pack(graph, row, by_rank, wide)
        return ir.passes.PassResult(model, True)

    def _pack(self, graph: ir.Graph, row: ir.Value, by_rank: dict[int, list[_Column]], wide: list[_Column]) -> None:
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
            columns = [last.outputs[0]]
            if len(items) > 1:
                last = builder.node(
                    "Split", [columns[0]], f"dmqexport/columns{rank}", after=last,
                    attributes={"axis": 1, "num_outputs": len(items)}, outputs=len(items), dtype=ir.DataType.FLOAT,
                )  # fmt: skip
                columns = list(last.outputs)
            for item, value in zip(items, columns, strict=True):
                _replace(graph, item, value)
        for item, part in zip(wide, parts[len(ranks) :], strict=True):
            label = str(item.reshape.name)
            last = builder.node(
                "Reshape", [part, builder.shape(item.dims)], f"{label}/packed", after=last, dtype=ir.DataType.FLOAT
            )
            _replace(graph, item, last.outputs[0])
        graph.sort()


def _replace(graph: ir.Graph, column: _Column, value: ir.Value) -> None:
    """Let `value` stand for the column's result, under its name."""
    old = column.reshape.outputs[0]
    name = old.name
    redirect(old, value, [])
    graph.remove([column.reshape, column.gather], safe=True)
    value.name = name
