"""Split a convolution over a concat into one convolution a half plus an Add, so that each half has its own range."""

import numpy as np
import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import QuantPlan
from passes.base import Builder, Role, constant_array, dims, redirect, tag, take_name
from passes.bind import bind


class SplitConcat(ir.passes.InPlacePass):
    """For every planned layer with several segments, Conv(Concat(a, b), W) becomes Conv(a, Wa) + Conv(b, Wb) + bias.

    Two different scales meeting in a Concat drop TensorRT to half precision. Layers with one segment are not touched.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; raises LoweringError when a planned split does not fit the graph."""
        bindings = bind(model, self._plan)
        builder = Builder(model.graph)
        modified = False
        for layer in self._plan.layers:
            nodes = bindings.layers[layer.name]
            if len(layer.segments) == 1 or len(nodes.compute) > 1:
                continue
            node = nodes.compute[0]
            concat = node.inputs[0].producer() if node.inputs[0] is not None else None
            weight = node.inputs[1]
            if (
                concat is None
                or concat.op_type != "Concat"
                or weight is None
                or weight.const_value is None
                or len(concat.inputs) != len(layer.segments)
            ):
                raise LoweringError(
                    f"split_concat: {layer.name} is planned in {len(layer.segments)} segments, "
                    "but its input is not a Concat of as many tensors in the graph"
                )
            for index, (part, segment) in enumerate(zip(concat.inputs, layer.segments, strict=True)):
                channels = part.shape[1] if part is not None and part.shape is not None else None
                if isinstance(channels, int) and channels != segment.stop - segment.start:
                    raise LoweringError(
                        f"split_concat: segment {index} of {layer.name} has {segment.stop - segment.start} channels, "
                        f"the Concat's input {index} has {channels}"
                    )
            output = node.outputs[0]
            attributes = {name: node.attributes[name].value for name in node.attributes}
            total: ir.Value | None = None
            for index, segment in enumerate(layer.segments):
                part = _slice(builder, weight.const_value, segment.start, segment.stop, f"{layer.name}/weight{index}")
                conv = builder.node(
                    "Conv",
                    [concat.inputs[index], part],
                    f"{layer.name}/Conv{index}",
                    before=node,
                    attributes=attributes,
                    like=output,
                )
                tag(conv, layer.name, Role.COMPUTE, index)
                if total is None:
                    total = conv.outputs[0]
                else:
                    add = builder.node(
                        "Add", [total, conv.outputs[0]], f"{layer.name}/sum{index}", before=node, like=output
                    )
                    tag(add, layer.name, Role.SUM)
                    total = add.outputs[0]
            assert total is not None
            bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
            if bias is not None:
                shaped = builder.constant(bias.reshape(-1, 1, 1), f"{layer.name}/bias")
                add = builder.node("Add", [total, shaped], f"{layer.name}/Add", before=node, like=output)
                tag(add, layer.name, Role.BIAS)
                total = add.outputs[0]
            take_name(output, total, f"{layer.name}/unsplit")
            redirect(output, total, [])
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _slice(builder: Builder, weight: ir.TensorProtocol, start: int, stop: int, name: str) -> ir.Value:
    """Input channels [start, stop) of a convolution's weight, read when they are written, if they ever are."""
    outputs, _, *kernel = dims(weight)
    shape = [outputs, stop - start, *kernel]
    return builder.lazy(lambda: np.ascontiguousarray(weight.numpy()[:, start:stop]), weight.dtype, shape, name)
