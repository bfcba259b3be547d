"""Half precision for what a plan leaves in float, said in the graph: TensorRT's strongly typed networks take it so."""

from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dmqexport.quant_plan import QuantPlan
from passes.base import Builder, constant_array, redirect, take_name
from passes.bind import Bindings, bind
from passes.insert_qdq import ROW

#: Operators that half precision does no harm: products accumulate in float32, the others hardly accumulate at all.
#: Norms are not among them, nor what computes sines of timesteps.
_NARROW = frozenset(
    (
        *("MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Sub", "Mul", "Div", "Neg", "Where", "Pad", "AveragePool"),
        *("Sigmoid", "Tanh", "Erf", "Gelu", "Relu", "LeakyRelu", "Softmax", "Identity", "Resize", "Flatten"),
        *("Concat", "Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand"),
    )
)
_PERIODIC = ("Sin", "Cos")
#: What carries a timestep table to its columns.
_TABLE = ("Gather", "Split", "Reshape")
_NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.38e38}
#: Positions of float operands that the operator wants in float32 whatever its data are.
_ALWAYS_WIDE = {"Resize": (1, 2)}


class NarrowFloat(ir.passes.InPlacePass):
    """Give everything but quantized operators, norms and the embedding of timesteps a 16-bit type, by Casts between.

    A quantizer (product, clip, QuantizeLinear, DequantizeLinear) and what follows its operator (1/rho, correction,
    bias) stay in float32: in half an operand would be rounded to 11 bits before it is rounded to a code, and
    TensorRT's int8 products write the unscaled sums of codes in the type of their scales, which half cannot hold.
    Weights that are only stored as integers are scaled in float32 and cast then. Inputs and outputs keep their types.
    """

    def __init__(self, plan: QuantPlan, dtype: ir.DataType) -> None:
        super().__init__()
        self._plan = plan
        self._dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; reports whether anything changed."""
        graph = model.graph
        wide = _wide(graph, bind(model, self._plan), self._plan)
        work = _Narrowing(graph, self._dtype)
        narrow = [node for node in graph if node not in wide and node.op_type in _NARROW and work.takes(node)]
        for node in narrow:
            work.inputs(node)
        members = set(narrow)
        for node in narrow:
            work.outputs(node, members)
        if narrow:
            graph.sort()
        return ir.passes.PassResult(model, bool(narrow))


def _wide(graph: ir.Graph, bindings: Bindings, plan: QuantPlan) -> set[ir.Node]:
    """Nodes that must compute in float32."""
    found: set[ir.Node] = set()
    owners: list[str] = []
    for layer in plan.layers:
        nodes = bindings.layers[layer.name]
        if layer.activation_bits is not None:
            found.update(nodes.compute)
            found.update([] if nodes.bias is None else [nodes.bias])
            owners += [f"{node.name}/" for node in nodes.compute]
        owners.append(f"{layer.name}#")
    for pair in bindings.attentions.values():
        found.update((pair.query_key, pair.probability_value))
        owners += [f"{node.name}/" for node in (pair.query_key, pair.probability_value)]
        owners.append(f"{pair.name}#")
    prefixes = tuple(owners)
    found.update(node for node in graph if str(node.name).startswith(prefixes))
    todo = [node for node in graph if node.op_type in _PERIODIC]
    while todo:  # what computes an angle
        node = todo.pop()
        if node not in found or node.op_type in _PERIODIC:
            found.add(node)
            producers = [value.producer() for value in node.inputs if value is not None]
            todo += [item for item in producers if item is not None and item not in found]
    rows = [value for node in graph for value in node.outputs if value.name == ROW]
    while rows:
        for use in rows.pop().uses():
            if use.node.op_type in _TABLE and use.node not in found:
                found.add(use.node)
                rows += use.node.outputs
    return found


class _Narrowing:
    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._builder = Builder(graph)
        self._dtype = dtype
        self._type = ir.TensorType(dtype)
        self._largest = _LARGEST[dtype]
        self._cast: dict[ir.Value, ir.Value] = {}
        self._constants: dict[ir.Value, ir.Value] = {}

    def takes(self, node: ir.Node) -> bool:
        """Whether the node computes floats, none of its constants too large for the type."""
        operands = self._operands(node)
        if not any(value.dtype == ir.DataType.FLOAT for value in (*node.outputs, *(v for _, v in operands))):
            return False
        if any(value.dtype not in (None, ir.DataType.FLOAT) for value in node.outputs):
            return False
        arrays = [constant_array(value) for _, value in operands if value.dtype == ir.DataType.FLOAT]
        return not any(a is not None and a.size and float(np.abs(a).max()) > self._largest for a in arrays)

    def _operands(self, node: ir.Node) -> list[tuple[int, ir.Value]]:
        skipped = _ALWAYS_WIDE.get(node.op_type, ())
        return [(i, value) for i, value in enumerate(node.inputs) if value is not None and i not in skipped]

    def inputs(self, node: ir.Node) -> None:
        """Let the node read 16-bit forms of its float operands, its own kind's results included."""
        for position, value in self._operands(node):
            if value.dtype != ir.DataType.FLOAT and not (value.dtype is None and value.producer() is not None):
                continue
            if value.const_value is not None:
                node.replace_input_with(position, self._constant(value))
                continue
            if value not in self._cast:
                self._cast[value] = self._casting(value)
            node.replace_input_with(position, self._cast[value])

    def _casting(self, value: ir.Value) -> ir.Value:
        producer = value.producer()
        first = self._builder.graph[0]
        node = self._builder.node(
            "Cast", [value], f"{value.name}/half", after=producer, before=None if producer else first,
            attributes={"to": int(self._dtype)}, like=value, dtype=self._dtype,
        )  # fmt: skip
        return node.outputs[0]

    def _constant(self, value: ir.Value) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        if value not in self._constants:
            make = partial(_narrowed, tensor, _NUMPY[self._dtype])
            shape = tuple(tensor.shape.numpy())
            self._constants[value] = self._builder.lazy(make, self._dtype, shape, f"{value.name}/half")
        return self._constants[value]

    def outputs(self, node: ir.Node, narrow: set[ir.Node]) -> None:
        """Type the node's results; readers that compute in float32 get them cast back, and so does the graph."""
        for value in node.outputs:
            cast = self._cast.get(value)
            if cast is not None:  # narrow readers were given a Cast of what is 16 bits wide already
                producer = cast.producer()
                assert producer is not None
                redirect(cast, value, [])
                self._builder.graph.remove(producer, safe=True)
            back = [use.node for use in value.uses() if use.node not in narrow]
            value.type = self._type
            if not back and not value.is_graph_output():
                continue
            cast_back = self._builder.node(
                "Cast", [value], f"{value.name}/wide", after=node, attributes={"to": int(ir.DataType.FLOAT)},
                like=value, dtype=ir.DataType.FLOAT,
            )  # fmt: skip
            widened = cast_back.outputs[0]
            is_output = value.is_graph_output()
            inside = [use.node for use in value.uses() if use.node in narrow]
            redirect(value, widened, [*inside, cast_back])
            if is_output:
                take_name(value, widened, f"{value.name}/half")


def _narrowed(tensor: ir.TensorProtocol, dtype: np.dtype) -> np.ndarray:
    array: np.ndarray = np.asarray(tensor.numpy()).astype(dtype)
    return array
