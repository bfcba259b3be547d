"""One table row at a time: a batch is taken apart by row, so that scales are single numbers to every product."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from passes.base import Builder, redirect
from passes.insert_qdq import ROW, TIMESTEP
from passes.lower.uniform_rows import FIRST_ROW, UniformRows

#: Name of the Loop node, and of the values that it carries: results so far, and whose samples they are of.
GROUPS, SAMPLES = "dmqexport/groups", "dmqexport/samples"


class GroupByRow(ir.passes.InPlacePass):
    """Run a graph lowered for ONNX Runtime once for every table row that its batch holds, on the samples of that row
    together, with `UniformRows`.

    A sampler's call has one timestep and so one group, and pays no vector of scales; a mixed batch costs as many
    passes as it has rows, and gives every sample what it gets alone. Initializers move into the body: one that is read
    from outside costs time in every call. A graph without a table gets `UniformRows` alone; one whose inputs or results
    are not batches is left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        graph = model.graph
        row = next((value for node in graph for value in node.outputs if value.name == ROW), None)
        if row is None:
            return UniformRows()(model)
        batch = _batch(next((value for value in graph.inputs if value.name == TIMESTEP), None))
        if looping(model) is not None or batch is None or any(_batch(value) != batch for value in graph.outputs):
            return ir.passes.PassResult(model, False)
        if not UniformRows()(model).modified:
            return ir.passes.PassResult(model, False)
        _wrap(graph, [value for value in graph.inputs if _batch(value) == batch])
        graph.sort()
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)


def layer_graph(model: ir.Model) -> ir.Graph:
    """The graph that holds the layers: the body of the Loop of `GroupByRow`, else the model's own."""
    loop = looping(model)
    return model.graph if loop is None else loop.attributes["body"].as_graph()


def looping(model: ir.Model) -> ir.Node | None:
    """The Loop of `GroupByRow`, None where there is none."""
    return next((node for node in model.graph if node.name == GROUPS), None)


def drop_unused_constants(graph: ir.Graph) -> None:
    """Remove initializers that no node reads; `RemoveUnusedNodesPass` does so for a model's own graph alone."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def add_results(loop: ir.Node, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Let the Loop carry `values` of its body too; returns them for the whole batch, in its order.

    Every value must have the batch as its first axis.
    """
    body, graph = loop.attributes["body"].as_graph(), loop.graph
    assert graph is not None
    builder, inside = Builder(graph), Builder(body)
    order = next(node for node in graph if node.name == f"{SAMPLES}/order").outputs[1]
    results = []
    for value in values:
        name, dtype = str(value.name), value.dtype or ir.DataType.FLOAT
        value.name = f"{name}/group"  # a name inside may not be one outside
        whole = _carry(builder, inside, loop, value, dtype, name)
        result = builder.node("Gather", [whole, order], f"{name}/whole", after=order.producer(), dtype=dtype)
        result.outputs[0].name = name
        result.outputs[0].shape = None if value.shape is None else value.shape.copy()
        results.append(result.outputs[0])
    graph.sort()
    return results


def _batch(value: ir.Value | None) -> str | None:
    """Name of the first axis, where it is dynamic."""
    if value is None or value.shape is None or not len(value.shape):
        return None
    first = value.shape[0]
    return first.value if isinstance(first, ir.SymbolicDim) else None


def _wrap(graph: ir.Graph, batched: Sequence[ir.Value]) -> None:
    """Move everything but what makes the row into the body of a Loop over the rows of the batch."""
    outside, outputs = _outside(graph), list(graph.outputs)
    nodes = [node for node in graph if node not in outside]
    row = next(value for node in outside for value in node.outputs if value.name == ROW)
    graph.outputs.clear()
    graph.remove(nodes)
    number = _input("dmqexport/group", ir.DataType.INT64)
    going = _input("dmqexport/going", ir.DataType.BOOL)
    inner = [value for value in graph.initializers.values() if not any(use.node in outside for use in value.uses())]
    for value in inner:
        del graph.initializers[str(value.name)]
    body = ir.Graph(
        [number, going], [], nodes=nodes, initializers=inner, name="group", opset_imports=dict(graph.opset_imports)
    )
    builder, inside = Builder(graph), Builder(body)
    integer = ir.DataType.INT64
    rows = builder.node("Unique", [row], f"{ROW}s", dtype=integer).outputs[0]
    count = builder.node("Size", [rows], f"{ROW}s/count", dtype=integer).outputs[0]

    # The samples of a group, before everything else in the body.
    start = nodes[0]
    index = inside.node(
        "Reshape", [number, inside.shape([1])], f"{number.name}/index", before=start, dtype=integer
    ).outputs[0]
    own = inside.node("Gather", [rows, index], f"{ROW}/own", before=start, dtype=integer).outputs[0]
    same = inside.node("Equal", [row, own], f"{ROW}/same", before=start, dtype=ir.DataType.BOOL).outputs[0]
    found = inside.node("NonZero", [same], f"{SAMPLES}/found", before=start, dtype=integer).outputs[0]
    samples = inside.node(
        "Reshape", [found, inside.shape([-1])], f"{SAMPLES}/own", before=start, dtype=integer
    ).outputs[0]
    for value in batched:
        part = inside.node("Gather", [value, samples], f"{value.name}/own", before=start, like=value).outputs[0]
        for use in list(value.uses()):
            if use.node.graph is body and use.node is not part.producer():
                use.node.replace_input_with(use.idx, part)
    for node in nodes:
        if node.name == FIRST_ROW:
            redirect(node.outputs[0], own, [])
            body.remove(node, safe=True)

    drop_unused_constants(body)
    true = builder.constant(np.array(True), "dmqexport/true")
    loop = builder.node("Loop", [count, true], GROUPS, attributes={"body": body}, outputs=0)
    inside.node("Identity", [going], f"{going.name}/on", dtype=ir.DataType.BOOL)
    body.outputs.append(next(reversed(body)).outputs[0])
    whole = _carry(builder, inside, loop, samples, integer, SAMPLES)
    size = builder.node("Shape", [whole], f"{SAMPLES}/count", dtype=integer).outputs[0]
    # The positions that sort a permutation are its inverse.
    builder.node("TopK", [whole, size], f"{SAMPLES}/order", attributes={"largest": 0}, outputs=2, dtype=integer)
    graph.outputs.extend(add_results(loop, outputs))


def _outside(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that make the row."""
    found: set[ir.Node] = set()
    waiting = [node for node in graph if node.outputs[0].name == ROW]
    while waiting:
        node = waiting.pop()
        found.add(node)
        waiting += [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    return found


def _input(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(dtype))


def _carry(
    builder: Builder, inside: Builder, loop: ir.Node, value: ir.Value, dtype: ir.DataType, name: str
) -> ir.Value:
    """Collect `value` of every group; returns all of them along the first axis, group after group."""
    kind = ir.SequenceType(ir.TensorType(dtype))
    empty = builder.node("SequenceEmpty", [], f"{name}/none", before=loop, attributes={"dtype": int(dtype)})
    empty.outputs[0].type = kind
    body = inside.graph
    carried = ir.Value(name=f"{name}/before", type=kind)
    body.inputs.append(carried)
    insert = inside.node("SequenceInsert", [carried, value], f"{name}/after")
    insert.outputs[0].type = kind
    body.outputs.append(insert.outputs[0])
    loop.resize_inputs(len(loop.inputs) + 1)
    loop.replace_input_with(len(loop.inputs) - 1, empty.outputs[0])
    loop.resize_outputs(len(loop.outputs) + 1)
    loop.outputs[-1].name, loop.outputs[-1].type = f"{name}/groups", kind
    return builder.node(
        "ConcatFromSequence", [loop.outputs[-1]], f"{name}/all", after=loop, attributes={"axis": 0}, dtype=dtype
    ).outputs[0]
