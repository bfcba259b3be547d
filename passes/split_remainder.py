"""A second product for what rounding leaves over of the first one's activation: 16 bits from int8 operators."""

import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import LayerQuant, QuantPlan
from passes.base import Builder, Role, constant_array, is_remainder, redirect, segment_of, tag, take_name
from passes.bind import LayerNodes, bind


class SplitRemainder(ir.passes.InPlacePass):
    """For every planned segment with a remainder, y = x·W + bias becomes (x·W + x·W) + bias, each product tagged.

    `InsertQDQ` then gives the first product the codes of x, and the second those of what they leave over. Layers
    without remainders are not touched.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; raises LoweringError for an operator whose products cannot be added."""
        bindings, builder = bind(model, self._plan), Builder(model.graph)
        modified = False
        for layer in self._plan.layers:
            nodes = bindings.layers[layer.name]
            if not layer.has_remainder or any(is_remainder(node) for node in nodes.compute):
                continue
            for node in nodes.compute:
                if layer.segments[segment_of(node)].remainder:
                    _split(builder, layer, nodes, node)
            modified = True
        return ir.passes.PassResult(model, modified)


def _split(builder: Builder, layer: LayerQuant, nodes: LayerNodes, node: ir.Node) -> None:
    output, name = node.outputs[0], str(node.name)
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if node.op_type not in ("Conv", "MatMul") or (bias is not None and node.op_type != "Conv"):
        raise LoweringError(f"split_remainder: {name} is a {node.op_type}; only products of Conv and MatMul are added")
    attributes = {key: node.attributes[key].value for key in node.attributes}
    second = builder.node(
        node.op_type, list(node.inputs[:2]), f"{name}/remainder", after=node, attributes=attributes, like=output
    )
    tag(second, layer.name, Role.COMPUTE, segment_of(node), remainder=True)
    total = builder.node("Add", [output, second.outputs[0]], f"{name}/with_remainder", after=second, like=output)
    tag(total, layer.name, Role.SUM)
    last = total
    if bias is not None:
        assert nodes.bias is None, f"{layer.name} has one bias"
        node.resize_inputs(2)
        shaped = builder.constant(bias.reshape(-1, 1, 1), f"{layer.name}/bias")
        last = builder.node("Add", [total.outputs[0], shaped], f"{name}/biased", after=total, like=output)
        tag(last, layer.name, Role.BIAS)
    take_name(output, last.outputs[0], f"{name}/first")
    redirect(output, last.outputs[0], [total])
