"""Pack every per-row table into one [rows, columns] table with one row Gather per forward."""

import numpy as np
import onnx_ir as ir

from passes.base import Builder, constant_array, redirect
from passes.insert_qdq import ROW

TABLE = "dmqexport/timestep_table"


class GatherTimestepScale(ir.passes.InPlacePass):
    """Replace the Gathers of single table columns by one Gather of a packed table, a Reshape and a Split per rank.

    Touches only Gather(constant [rows], dmqexport/row) → Reshape chains; a graph with fewer than two is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        graph = model.graph
        row = next((node.outputs[0] for node in graph if node.outputs and node.outputs[0].name == ROW), None)
        if row is None:
            return ir.passes.PassResult(model, False)
        by_rank: dict[int, list[tuple[ir.Node, ir.Node, np.ndarray]]] = {}
        for use in list(row.uses()):
            gather = use.node
            column = constant_array(gather.inputs[0])
            if gather.op_type != "Gather" or column is None or column.ndim != 1:
                continue
            reshape = next(iter(gather.outputs[0].uses())).node
            target = constant_array(reshape.inputs[1])
            assert reshape.op_type == "Reshape"
            assert target is not None
            by_rank.setdefault(len(target), []).append((gather, reshape, column))
        if sum(len(items) for items in by_rank.values()) < 2:
            return ir.passes.PassResult(model, False)
        self._pack(graph, row, by_rank)
        return ir.passes.PassResult(model, True)

    def _pack(
        self, graph: ir.Graph, row: ir.Value, by_rank: dict[int, list[tuple[ir.Node, ir.Node, np.ndarray]]]
    ) -> None:
        builder = Builder(graph)
        ranks = sorted(by_rank)
        table = np.stack([column for rank in ranks for _, _, column in by_rank[rank]], axis=1).astype(np.float32)
        anchor = row.producer()
        assert anchor is not None
        last = builder.node(
            "Gather", [builder.constant(table, TABLE), row], "dmqexport/row_values", after=anchor,
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        parts = [last.outputs[0]]
        if len(ranks) > 1:
            sizes = builder.shape([len(by_rank[rank]) for rank in ranks])
            last = builder.node(
                "Split", [parts[0], sizes], "dmqexport/by_rank", after=last, attributes={"axis": 1},
                outputs=len(ranks), dtype=ir.DataType.FLOAT,
            )  # fmt: skip
            parts = list(last.outputs)
        for rank, part in zip(ranks, parts, strict=True):
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
            for (gather, reshape, _), column in zip(items, columns, strict=True):
                old = reshape.outputs[0]
                name = old.name
                redirect(old, column, [])
                graph.remove([reshape, gather], safe=True)
                column.name = name
        graph.sort()
