"""Check on the graph itself that its first and last layers kept 8 bits."""

import onnx_ir as ir

from dmqexport.errors import LoweringError
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import MAX_BITS
from passes.base import Role, module_of, role_of

#: names of the input that is denoised, by family.
SAMPLES = ("sample", "hidden_states")


class KeepBoundary8Bit(ir.passes.InPlacePass):
    """Refuse a plan whose layers nearest to `sample` and to the output have fewer than 8 bits; changes nothing.

    Calibration picks the boundary by name; this finds it by walking the graph, so that a pattern that matched the wrong
    layer (a time embedding for conv_in, say) cannot pass. Layers left in float, or allowed by name, are accepted.
    """

    def __init__(self, plan: QuantPlan, allowed: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._plan = plan
        self._allowed = allowed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raise LoweringError when the boundary is too narrow."""
        bits = {layer.name: layer.weight_bits for layer in self._plan.layers}
        for place, name in self.boundary(model.graph):
            if name in bits and bits[name] < MAX_BITS and name not in self._allowed:
                raise LoweringError(
                    f"keep_boundary_8bit: {name} is the {place} layer of the graph but has {bits[name]} weight bits",
                    hint="add it to quantization.boundary, or list it in quantization.overrides to insist",
                )
        return ir.passes.PassResult(model, False)

    @staticmethod
    def boundary(graph: ir.Graph) -> list[tuple[str, str]]:
        """Return ("first" | "last", module) pairs."""
        found: list[tuple[str, str]] = []
        sample = next((value for value in graph.inputs if value.name in SAMPLES), None)
        if sample is not None:
            found += [("first", name) for name in _nearest([use.node for use in sample.uses()], forward=True)]
        producers = [node for value in graph.outputs if (node := value.producer()) is not None]
        found += [("last", name) for name in _nearest(producers, forward=False)]
        return found


def _nearest(frontier: list[ir.Node], *, forward: bool) -> list[str]:
    """Layers met first when walking from `frontier`, not looking past one."""
    seen: set[ir.Node] = set()
    names: list[str] = []
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        module = module_of(node)
        if module is not None and role_of(node) in (Role.COMPUTE, Role.BIAS):
            if module not in names:
                names.append(module)
            continue
        if forward:
            frontier += [use.node for output in node.outputs for use in output.uses()]
        else:
            frontier += [p for value in node.inputs if value is not None and (p := value.producer()) is not None]
    return names
