"""Match the plan's layers with the graph's nodes, one to one, and say loudly what does not match."""

from dataclasses import dataclass, replace

import onnx_ir as ir

from dmqexport.errors import BindingError
from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import remainder_of
from passes.base import Role, is_remainder, module_of, role_of, segment_of

_LOWERED = ("MatMulIntegerToFloat", "ConvInteger")
_OPS = {LayerOp.CONV: ("Conv", *_LOWERED), LayerOp.LINEAR: ("MatMul", "Gemm", "MatMulNBits", *_LOWERED)}


@dataclass(frozen=True, eq=False)
class LayerNodes:
    """The nodes of one layer: one compute node a segment, one more for its remainder, and the Add of its bias if that
    is a node of its own."""

    name: str
    compute: tuple[ir.Node, ...]
    bias: ir.Node | None
    total: ir.Node | None = None

    def pairs(self, plan: LayerQuant) -> list[tuple[ir.Node, Segment]]:
        """Every compute node with its segment; that of a remainder has the remainder's quantizer."""
        found = []
        for node in self.compute:
            segment = plan.segments[segment_of(node)]
            if is_remainder(node) and segment.activation is not None:
                segment = replace(segment, activation=remainder_of(segment.activation), remainder=False)
            found.append((node, segment))
        return found

    @property
    def result(self) -> ir.Node:
        """The node that makes the layer's output."""
        return self.bias or self.total or self.compute[-1]


@dataclass(frozen=True, eq=False)
class AttentionNodes:
    """The two matmuls of one attention."""

    name: str
    query_key: ir.Node
    probability_value: ir.Node


@dataclass(frozen=True, eq=False)
class Bindings:
    """Every planned layer and attention with its nodes."""

    layers: dict[str, LayerNodes]
    attentions: dict[str, AttentionNodes]


def graph_layers(graph: ir.Graph) -> dict[str, LayerNodes]:
    """Every layer of the graph that has a constant weight, by module name, in graph order."""
    compute: dict[str, list[ir.Node]] = {}
    bias: dict[str, ir.Node] = {}
    total: dict[str, ir.Node] = {}
    for node in graph:
        module, role = module_of(node), role_of(node)
        if module is None:
            continue
        if role is Role.COMPUTE:
            compute.setdefault(module, []).append(node)
        elif role is Role.BIAS:
            bias[module] = node
        elif role is Role.SUM:
            total[module] = node

    def order(node: ir.Node) -> tuple[int, bool]:
        return segment_of(node), is_remainder(node)

    return {
        name: LayerNodes(name, tuple(sorted(nodes, key=order)), bias.get(name), total.get(name))
        for name, nodes in compute.items()
    }


def graph_attentions(graph: ir.Graph) -> dict[str, AttentionNodes]:
    """Every decomposed attention of the graph, by module name."""
    found: dict[str, dict[Role, list[ir.Node]]] = {}
    for node in graph:
        module, role = module_of(node), role_of(node)
        if module is not None and role in (Role.QUERY_KEY, Role.PROBABILITY_VALUE):
            found.setdefault(module, {}).setdefault(role, []).append(node)
    # A module that attends twice has no pair to tell from another.
    return {
        name: AttentionNodes(name, nodes[Role.QUERY_KEY][0], nodes[Role.PROBABILITY_VALUE][0])
        for name, nodes in found.items()
        if len(nodes) == 2 and all(len(items) == 1 for items in nodes.values())
    }


def bind(model: ir.Model, plan: QuantPlan) -> Bindings:
    """Return the nodes of every planned layer.

    Raises BindingError, listing both sides, when a planned layer has no node (or several), when its operator differs,
    or when the graph has a weighted layer that the plan neither quantizes nor leaves in float by name.
    """
    layers, attentions = graph_layers(model.graph), graph_attentions(model.graph)
    problems: list[str] = []
    for layer in plan.layers:
        nodes = layers.get(layer.name)
        if nodes is None:
            problems.append(f"plan: {layer.name} has no node in the graph")
            continue
        own = sum(not is_remainder(node) for node in nodes.compute)
        if own not in (1, len(layer.segments)):
            problems.append(f"plan: {layer.name} has {own} nodes, expected 1 or {len(layer.segments)}")
        for node in nodes.compute:
            if node.op_type not in _OPS[layer.op]:
                problems.append(f"plan: {layer.name} is a {layer.op.value}, the graph has {node.op_type}")
    for attention in plan.attentions:
        if attention.name not in attentions:
            problems.append(f"plan: attention {attention.name} has no pair of matmuls in the graph")
    planned = {layer.name for layer in plan.layers} | set(plan.float_layers)
    problems += [f"graph: {name} is neither planned nor left in float" for name in layers if name not in planned]
    if problems:
        raise BindingError(
            f"{len(problems)} layers do not match between plan and graph:\n  " + "\n  ".join(problems[:20]),
            hint="calibrate and export the same model; a layer that silently stays in float is never accepted",
        )
    return Bindings(
        {layer.name: layers[layer.name] for layer in plan.layers},
        {attention.name: attentions[attention.name] for attention in plan.attentions},
    )
