"""Check that the finished graph quantizes exactly what the plan says."""

import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import QuantPlan
from passes.base import module_of
from passes.bind import bind


class VerifyQDQ(ir.passes.InPlacePass):
    """Refuse a graph in which a planned operand does not come from a DequantizeLinear, or an unplanned one does.

    Changes nothing. This is what stands between a typing error in a pattern and a layer that silently stays in float.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raise LoweringError listing every operand that differs from the plan."""
        bindings = bind(model, self._plan)
        problems: list[str] = []
        expected = 0
        for layer in self._plan.layers:
            nodes = bindings.layers[layer.name]
            if len(nodes.compute) != len(layer.segments):
                problems.append(f"{layer.name}: {len(nodes.compute)} operators for {len(layer.segments)} segments")
                continue
            for node, segment in zip(nodes.compute, layer.segments, strict=True):
                expected += 1
                if not _dequantized(node, 1):
                    problems.append(f"{layer.name}: weight in float")
                if _dequantized(node, 0) != (segment.activation is not None):
                    problems.append(f"{layer.name}: activation {'in float' if segment.activation else 'quantized'}")
        for attention in self._plan.attentions:
            pair = bindings.attentions[attention.name]
            for node in (pair.query_key, pair.probability_value):
                if not (_dequantized(node, 0) and _dequantized(node, 1)):
                    problems.append(f"{attention.name}: attention operand in float")
        planned = set(bindings.layers) | set(bindings.attentions)
        for node in model.graph:
            if module_of(node) in planned or node.op_type not in ("Conv", "MatMul", "Gemm"):
                continue
            if _dequantized(node, 0) or _dequantized(node, 1):
                problems.append(f"{module_of(node) or node.name}: reads codes, but the plan leaves it in float")
        if problems or expected == 0:
            raise LoweringError("verify_qdq: " + ("; ".join(problems[:20]) or "the plan quantizes nothing"))
        return ir.passes.PassResult(model, False)


def _dequantized(node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
