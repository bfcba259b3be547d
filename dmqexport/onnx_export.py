"""Torch module → float ONNX graph whose nodes name the module they came from. The only module that sees both worlds.

Uses `torch.onnx.export(dynamo=True)`. The exporter's scope metadata is reduced to two properties on the nodes that
matter, `dmqexport.module` (fully qualified name in the denoiser) and `dmqexport.role`; everything else it writes (stack
traces with paths of the exporting machine) is dropped, so that the same model exports to the same bytes anywhere.
"""

import ast
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dmqexport.errors import BindingError
from passes.base import MODULE_KEY, ROLE_KEY, Role

OPSET = 21
OUTPUT_NAME = "out_sample"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_INLINE_LIMIT = 64 * 2**20  # protobuf stops at 2 GB and copies several times; stay far below, memory-map the rest
# Smaller tensors stay in the graph: shape inference reads nothing beside it, and needs the sizes of a Split's parts.
_INLINE_TENSOR = 2**16

_STAND_IN_BYTES = 2**20  # of the smallest weight that a model may leave out

logger = logging.getLogger(__name__)


def export_float_graph(
    wrapped: nn.Module,
    inputs: Mapping[str, Tensor],
    path: Path,
    simplify: Callable[[ir.Model], object] | None = None,
    *,
    wrapper: str = "denoiser",
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    weight_of: Callable[[str], Tensor] | None = None,
) -> None:
    """Export `wrapped` (forward takes `inputs` by name) to `path`, opset 21.

    wrapper: the attribute of `wrapped` that is the model, "" when it is the model itself. The first axis of every input
    is the dynamic batch; the sample batch must be at least 2 so that it does not specialise. dynamic_axes: input → axis
    → name, of further axes that may vary; one name is one size. `simplify` rewrites the graph before it is written, so
    that its weights are written once. weight_of: parameter name of the model → its tensor, where the model holds none
    (its own is on the meta device); weights are then asked for one at a time as the file is written. Raises
    BindingError when the graph names no layer at all; `passes.bind` then checks every single one.
    """
    batch = torch.export.Dim("batch", min=1, max=4096)
    further = {label for axes in (dynamic_axes or {}).values() for label in axes.values()}
    sizes = {label: torch.export.Dim(label, min=1, max=65536) for label in sorted(further)}
    shapes = {
        name: {0: batch, **{axis: sizes[label] for axis, label in (dynamic_axes or {}).get(name, {}).items()}}
        for name in inputs
    }
    layers = {
        _inside(name, wrapper): module
        for name, module in wrapped.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    with _quiet(), torch.no_grad(), _stand_ins(wrapped, wrapper) as absent:
        program = torch.onnx.export(
            wrapped.eval(),
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            output_names=[OUTPUT_NAME],
            verbose=False,
        )
    assert program is not None
    model = program.model
    _annotate(model, layers, wrapper)
    if absent:
        assert weight_of is not None, "a module without its weights needs somebody who has them"
        _attach(model, absent, weight_of)
    _rename(model)
    if simplify is not None:
        simplify(model)
    save_model(model, path)


@contextmanager
def _stand_ins(wrapped: nn.Module, wrapper: str) -> Iterator[dict[str, Tensor]]:
    """Give parameters on the meta device memory that nobody touches, so that the system never finds any for it.

    Yields them by name in the model, for as long as the exporter needs them.
    """
    absent = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.is_meta}
    places = {name: (wrapped.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in absent}
    for name, (owner, leaf) in places.items():
        owner.register_parameter(leaf, nn.Parameter(torch.empty(absent[name].shape), requires_grad=False))
    try:
        yield {_inside(name, wrapper): owner.get_parameter(leaf).detach() for name, (owner, leaf) in places.items()}
    finally:
        for name, (owner, leaf) in places.items():
            owner.register_parameter(leaf, absent[name])


def _attach(model: ir.Model, absent: Mapping[str, Tensor], weight_of: Callable[[str], Tensor]) -> None:
    """Put weights that are read when they are written in the place of stand-ins, transposed where the exporter did.

    Raises BindingError when a layer's weight is not a stand-in as it was: then it holds nothing.
    """
    names = {tensor.data_ptr(): name for name, tensor in absent.items()}
    found = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        name = None if tensor is None or tensor.nbytes < _STAND_IN_BYTES else names.get(_address(tensor))
        if name is None or tensor is None:
            continue
        array, expected = tensor.numpy(), tuple(absent[name].shape)
        as_is = array.shape == expected and array.flags.c_contiguous
        transposed = not as_is and array.shape == expected[::-1] and array.T.flags.c_contiguous
        if not as_is and not transposed:
            raise BindingError(f"the exporter rearranged the weight {name}: {expected} became {array.shape}")

        def read(name: str = name, transposed: bool = transposed) -> ir.TensorProtocol:
            weight = weight_of(name).numpy()
            return ir.tensor(np.ascontiguousarray(weight.T if transposed else weight))

        value.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=value.name)
        found.add(name)
    for node in model.graph:
        weight = f"{node.metadata_props.get(MODULE_KEY)}.weight"
        if node.metadata_props.get(ROLE_KEY) == Role.COMPUTE and weight in absent and weight not in found:
            raise BindingError(f"the exported graph lacks the weight {weight}: the exporter made another of it")


def _address(tensor: ir.TensorProtocol) -> int:
    return int(tensor.numpy().__array_interface__["data"][0])


def save_model(model: ir.Model, path: Path) -> None:
    """Save, with external data beside the graph when the initializers are large."""
    initializers = [value for graph in model.graphs() for value in graph.initializers.values()]
    size = sum(value.const_value.nbytes for value in initializers if value.const_value is not None)
    with _described_once(initializers):
        if size > _INLINE_LIMIT:
            _bring_in_small(initializers)
            ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE_TENSOR)
        else:
            ir.save(ir.external_data.load_to_model(model), path)  # what was read from beside another graph comes along


def _bring_in_small(initializers: Sequence[ir.Value]) -> None:
    """Copy small tensors from beside the graph that the model was read from. onnx_ir would, and then close the file,
    which it cannot while an array of any of its tensors is in use.
    """
    for value in initializers:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _INLINE_TENSOR:
            value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


@contextmanager
def _described_once(initializers: Sequence[ir.Value]) -> Iterator[None]:
    """Inside the block constants have no type and shape beside their tensor's: onnx_ir would write them once more, as a
    value_info each, 2 % of a small graph."""
    known = [(value, value.type, value.shape) for value in initializers if value.const_value is not None]
    for value, _, _ in known:
        value.type = value.shape = None
    try:
        yield
    finally:
        for value, kind, shape in known:
            value.type, value.shape = kind, shape


def _annotate(model: ir.Model, layers: Mapping[str, nn.Module], wrapper: str) -> None:
    """Turn exporter scopes into module and role properties."""
    bound: set[str] = set()
    attention_matmuls: dict[str, int] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "[]"))
        node.metadata_props.clear()
        node.doc_string = None
        if len(scopes) < 2:
            continue
        module = _inside(str(scopes[-2]), wrapper)
        role: Role | None = None
        if str(scopes[-1]).startswith("scaled_dot_product_attention"):
            if node.op_type == "MatMul":
                seen = attention_matmuls[module] = attention_matmuls.get(module, 0) + 1
                role = Role.QUERY_KEY if seen == 1 else Role.PROBABILITY_VALUE
            elif node.op_type == "Softmax":
                role = Role.SOFTMAX
        elif module in layers:
            bound.add(module)
            if node.op_type in ("Conv", "MatMul", "Gemm"):
                role = Role.COMPUTE
            elif node.op_type == "Add":
                role = Role.BIAS
        if role is not None:
            node.metadata_props[MODULE_KEY] = module
            node.metadata_props[ROLE_KEY] = role.value
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_version = torch.__version__.split("+")[0]
    for value in list(model.graph.initializers.values()) + list(model.graph.inputs) + list(model.graph.outputs):
        value.metadata_props.clear()
    for node in model.graph:
        for output in node.outputs:
            output.metadata_props.clear()
    if not bound:
        raise BindingError(
            "the exported graph names no torch module: no layer can be bound",
            hint=f"torch {torch.__version__} may write its scopes elsewhere; supported: torch 2.9 and newer",
        )


def _inside(scope: str, wrapper: str) -> str:
    """The name of a module in the model, from its name in what was exported."""
    return scope.removeprefix(wrapper).removeprefix(".") if wrapper else scope


def _rename(model: ir.Model) -> None:
    """Name the nodes of a layer after it, and its result `<module>/output`: stable across runs and readable."""
    names = {value.name for value in model.graph.outputs}
    seen: Counter[str] = Counter()

    def unique(name: str) -> str:
        seen[name] += 1  # a layer that runs twice has two nodes
        return name if seen[name] == 1 else f"{name}.{seen[name]}"

    for node in model.graph:
        module, role = node.metadata_props.get(MODULE_KEY), node.metadata_props.get(ROLE_KEY)
        if module is None:
            continue
        kinds = {Role.QUERY_KEY: "QueryKey", Role.PROBABILITY_VALUE: "ProbabilityValue"}
        node.name = unique(f"{module}/{kinds.get(Role(str(role)), node.op_type)}")
        output = node.outputs[0]
        biased = role == Role.COMPUTE and any(
            use.node.metadata_props.get(MODULE_KEY) == module and use.node.metadata_props.get(ROLE_KEY) == Role.BIAS
            for use in output.uses()
        )
        suffix = {Role.QUERY_KEY: "scores", Role.SOFTMAX: "probability"}.get(Role(str(role)), "output")
        if output.name not in names:
            output.name = unique(f"{module}/{'product' if biased else suffix}")


@contextmanager
def _quiet() -> Any:
    """The exporter reports progress on stdout and notes about optional packages; none of it concerns the user."""
    sink = io.StringIO()
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
        if sink.getvalue():
            logger.debug("exporter: %s", sink.getvalue().strip())
