"""One table row at a time: a batch is taken apart by row, so that scales are single numbers to every product."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from passes.base import Builder, redirect
from passes.insert_qdq import ROW, TIMESTEP
from passes.lower.uniform_rows import FIRST_ROW, UniformRows

#: Name of the Loop node, and of the positions of a group's samples in the batch.
GROUPS, SAMPLES = "dmqexport/groups", "dmqexport/samples"


class GroupByRow(ir.passes.InPlacePass):
    """Run a graph lowered for ONNX Runtime once for every table row that its batch holds, on the samples of that row
    together, with `UniformRows`.

    A sampler's call has one timestep and so one group, and pays no vector of scales; a mixed batch costs as many
    passes as it has rows, and gives every sample what it gets alone. Initializers move into the body: one that is read
    from outside costs time in every call. What is carried are tensors: with a sequence among them ONNX Runtime plans no
    memory for the body, which cost 2 to 4 % of a call. A graph without a table gets `UniformRows` alone; one whose
    inputs or results are not batches is left as it is.
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

    Every value must have the batch as its first axis, and a known number of axes.
    """
    graph = loop.graph
    assert graph is not None
    results = [_carry(graph, loop, value) for value in values]
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
    inside.node("Reshape", [found, inside.shape([-1, 1])], f"{SAMPLES}/column", after=samples.producer(), dtype=integer)
    builder.node("Shape", [row], f"{SAMPLES}/count", before=loop, dtype=integer)
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


def _carry(graph: ir.Graph, loop: ir.Node, value: ir.Value) -> ir.Value:
    """Write `value` of every group to the places of its samples; returns the whole batch, under the value's name.

    What the first group finds has one element a sample, and takes the size of a result there.
    """
    body, name, dtype = loop.attributes["body"].as_graph(), str(value.name), value.dtype or ir.DataType.FLOAT
    builder, inside = Builder(graph), Builder(body)
    assert value.shape is not None, f"{name} has a known number of axes"
    integer, rank = ir.DataType.INT64, len(value.shape)
    value.name = f"{name}/group"  # a name inside may not be one outside
    count = next(node for node in graph if node.name == f"{SAMPLES}/count").outputs[0]
    column = next(node for node in body if node.name == f"{SAMPLES}/column").outputs[0]
    sizes = [count] if rank == 1 else [count, builder.shape([1] * (rank - 1))]
    flat = builder.node("Concat", sizes, f"{name}/flat", before=loop, attributes={"axis": 0}, dtype=integer).outputs[0]
    zero = ir.tensor(np.zeros(1, dtype=dtype.numpy()))
    empty = builder.node(
        "ConstantOfShape", [flat], f"{name}/empty", before=loop, attributes={"value": zero}, dtype=dtype
    )

    before = ir.Value(name=f"{name}/before", shape=ir.Shape([None] * rank), type=ir.TensorType(dtype))
    body.inputs.append(before)
    one = inside.shape([1])
    rest = inside.node("Shape", [value], f"{name}/rest", attributes={"start": 1}, dtype=integer).outputs[0]
    full = inside.node("Concat", [one, rest], f"{name}/full", attributes={"axis": 0}, dtype=integer).outputs[0]
    whole = inside.node("Expand", [before, full], f"{name}/expanded", dtype=dtype).outputs[0]
    written = inside.node("ScatterND", [whole, column, value], f"{name}/written", dtype=dtype).outputs[0]
    written.shape = ir.Shape([None] * rank)
    body.outputs.append(written)
    loop.resize_inputs(len(loop.inputs) + 1)
    loop.replace_input_with(len(loop.inputs) - 1, empty.outputs[0])
    loop.resize_outputs(len(loop.outputs) + 1)
    result = loop.outputs[-1]
    result.name, result.type, result.shape = name, ir.TensorType(dtype), value.shape.copy()
    return result
