"""Check that the finished graph quantizes exactly what the plan says."""

import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import ActivationQuant
from passes.base import constant_array, is_remainder, left_over, module_of, segment_of
from passes.bind import bind
from passes.insert_qdq import CODES, DEQUANTIZED, LEFT_OVER, SCALED


class VerifyQDQ(ir.passes.InPlacePass):
    """Refuse a graph in which a planned operand does not come from a DequantizeLinear, or an unplanned one does, or
    in which a tensor with channel factors is not divided by them.

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
            operators = sum(1 + segment.remainder for segment in layer.segments)
            if len(nodes.compute) != operators:
                problems.append(f"{layer.name}: {len(nodes.compute)} operators for {operators} segments and remainders")
                continue
            operands = {segment_of(node): node.inputs[0] for node in nodes.compute if not is_remainder(node)}
            for node, segment in nodes.pairs(layer):
                expected += 1
                if is_remainder(node) and _read_by(node) is not operands[segment_of(node)]:
                    problems.append(f"{layer.name}: its second product does not read what the first one's codes leave")
                if not _dequantized(node, 1):
                    problems.append(f"{layer.name}: weight in float")
                if _dequantized(node, 0) != (segment.activation is not None):
                    problems.append(f"{layer.name}: activation {'in float' if segment.activation else 'quantized'}")
                elif segment.activation is not None and not _factors_as_planned(node, segment.activation):
                    problems.append(f"{layer.name}: channel factors differ from the plan's")
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


def _read_by(node: ir.Node) -> ir.Value | None:
    """The dequantized tensor that a remainder was left over by; None where there is no remainder."""
    rest = left_over(node)
    return None if rest is None else rest.inputs[1]


def _factors_as_planned(node: ir.Node, planned: ActivationQuant) -> bool:
    """Whether the quantizer above a dequantized operand multiplies each channel on its own, if and only if planned."""
    channels = 1 if planned.channel_factor is None else len(planned.channel_factor)
    value: ir.Value | None = node.inputs[0]
    owner = ""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "QuantizeLinear":
            owner = str(producer.name).removesuffix(CODES)
        elif producer.name == owner + LEFT_OVER:
            first = producer.inputs[1]
            maker = None if first is None else first.producer()
            owner = "" if maker is None else str(maker.name).removesuffix(DEQUANTIZED)  # what left it over
        elif producer.op_type != "DequantizeLinear" and not str(producer.name).startswith(f"{owner}/"):
            break  # above here lies the float graph, with products of its own
        elif producer.name == owner + SCALED:
            return _width(producer.inputs[1]) == channels
        value = producer.inputs[0]
    return channels == 1


def _width(value: ir.Value | None) -> int:
    """How many channels an operand has a value for, whether constant or gathered and reshaped."""
    array = constant_array(value)
    if array is not None:
        return array.size
    producer = None if value is None else value.producer()
    dims = constant_array(producer.inputs[1]) if producer is not None and producer.op_type == "Reshape" else None
    return 1 if dims is None or int(dims[0]) != -1 else max(1, *(int(dim) for dim in dims[1:]))


def _dequantized(node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
