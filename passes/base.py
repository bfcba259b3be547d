"""What every pass shares: where names live in the metadata, and a small builder of nodes and constants."""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import onnx_ir as ir

from dmqexport.quant_types import remainder_name

MODULE_KEY = "dmqexport.module"
ROLE_KEY = "dmqexport.role"
SEGMENT_KEY = "dmqexport.segment"
REMAINDER_KEY = "dmqexport.remainder"
_SHARED_BYTES = 64  # larger constants are never compared with each other


class Role(StrEnum):
    """Part that a node plays in the layer named by its `dmqexport.module`."""

    COMPUTE = "compute"
    SUM = "sum"
    BIAS = "bias"
    QUERY_KEY = "query_key"
    SOFTMAX = "softmax"
    PROBABILITY_VALUE = "probability_value"


def module_of(node: ir.Node) -> str | None:
    """Fully qualified name of the torch module the node came from, if it is one that matters."""
    return node.metadata_props.get(MODULE_KEY)


def role_of(node: ir.Node) -> Role | None:
    """Role of the node in its module."""
    role = node.metadata_props.get(ROLE_KEY)
    return None if role is None else Role(role)


def segment_of(node: ir.Node) -> int:
    """Which slice of the layer's input channels this node computes."""
    return int(node.metadata_props.get(SEGMENT_KEY, "0"))


def is_remainder(node: ir.Node) -> bool:
    """Whether this node multiplies what the rounding of its segment's activation leaves over."""
    return REMAINDER_KEY in node.metadata_props


def left_over(node: ir.Node) -> ir.Node | None:
    """The Sub that makes what a remainder's compute node multiplies, None where it multiplies something else."""
    value = node.inputs[0]
    for op_type in ("DequantizeLinear", "QuantizeLinear", "Sub"):
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type != op_type:
            return None
        value = producer.inputs[0]
    return producer


def operand_name(node: ir.Node) -> str:
    """What the activation of a compute node is called: `layer#segment`, or that segment's remainder."""
    operand = f"{module_of(node)}#{segment_of(node)}"
    return remainder_name(operand) if is_remainder(node) else operand


def tag(node: ir.Node, module: str, role: Role, segment: int = 0, *, remainder: bool = False) -> None:
    """Mark `node` as part of `module`."""
    node.metadata_props[MODULE_KEY] = module
    node.metadata_props[ROLE_KEY] = role.value
    if segment:
        node.metadata_props[SEGMENT_KEY] = str(segment)
    if remainder:
        node.metadata_props[REMAINDER_KEY] = "1"


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer; reads nothing, however large it is."""
    return value is not None and value.const_value is not None


def constant_array(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The array of an initializer, or None for a computed value. For a weight, prefer `is_constant`: this reads it."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Shape of an initializer's tensor."""
    return tuple(tensor.shape.numpy())


def rank_of(value: ir.Value) -> int | None:
    """Rank of a value, None when shape inference did not get that far."""
    return None if value.shape is None else len(value.shape)


class Builder:
    """Adds named nodes and initializers to a graph; equal constants are stored once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def constant(self, array: np.ndarray[Any, Any], name: str, *, share: bool = True) -> ir.Value:
        """Return an initializer holding `array`; small equal ones are one (whatever their name) unless told not to."""
        share = share and array.nbytes <= _SHARED_BYTES
        key = (str(array.dtype), array.shape, array.tobytes() if share else b"")
        if share and key in self._constants:
            return self._constants[key]
        value = self._initializer(ir.tensor(array, name=self._unique(name)))
        if share:
            self._constants[key] = value
        return value

    def lazy(
        self, make: Callable[[], np.ndarray[Any, Any]], dtype: ir.DataType, shape: Sequence[int], name: str
    ) -> ir.Value:
        """Return an initializer whose array is made when it is written: weights pass through memory one at a time.

        `make` must give the same array of `dtype` and `shape` whenever it is called.
        """
        tensor = ir.LazyTensor(
            lambda: ir.tensor(make(), dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=self._unique(name)
        )
        return self._initializer(tensor)

    def _unique(self, name: str) -> str:
        unique, count = name, 1
        while unique in self.graph.initializers:
            count += 1
            unique = f"{name}.{count}"
        return unique

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=tensor.name, shape=ir.Shape(dims(tensor)), const_value=tensor)
        value.type = ir.TensorType(tensor.dtype)
        self.graph.register_initializer(value)
        return value

    def scalar(self, number: float, name: str) -> ir.Value:
        """A rank-0 float32 constant (TensorRT wants activation scales of rank 0, not shape [1])."""
        return self.constant(np.array(number, dtype=np.float32), name)

    def shape(self, dims: Sequence[int]) -> ir.Value:
        """An int64 vector constant."""
        return self.constant(np.array(dims, dtype=np.int64), "dmqexport/shape_" + "_".join(str(d) for d in dims))

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
        output_names: Sequence[str] | None = None,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Node:
        """Create `op_type` beside a node; outputs are `<name>` (or `output_names`), typed and shaped like `like`."""
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
        names = output_names or ([name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)])
        for output, output_name in zip(node.outputs, names, strict=True):
            output.name = output_name
            if like is not None:
                output.shape = None if like.shape is None else like.shape.copy()
                output.type = like.type
            if dtype is not None:
                output.type = ir.TensorType(dtype)
        if before is not None:
            self.graph.insert_before(before, node)
        elif after is not None:
            self.graph.insert_after(after, node)
        else:
            self.graph.append(node)
        return node


def redirect(old: ir.Value, new: ir.Value, keep: Sequence[ir.Node]) -> None:
    """Make every reader of `old` read `new`, except the nodes in `keep`; graph outputs follow too."""
    kept = set(keep)
    for use in list(old.uses()):
        if use.node not in kept:
            use.node.replace_input_with(use.idx, new)
    if old.is_graph_output():
        graph = old.graph
        assert graph is not None
        graph.outputs[list(graph.outputs).index(old)] = new


def take_name(old: ir.Value, new: ir.Value, rest: str) -> None:
    """Give `new` the name of `old`, which becomes `rest`: a layer's result keeps its name through every rewrite."""
    name = old.name
    old.name = rest
    new.name = name
