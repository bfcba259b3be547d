"""Make intermediate results visible: layer outputs as graph outputs, for comparing graphs layer by layer."""

from collections.abc import Iterable

import onnx_ir as ir

from dmqexport.errors import LoweringError
from passes.bind import graph_layers
from passes.lower.group_by_row import add_results, layer_graph, looping


def layer_outputs(model: ir.Model) -> dict[str, str]:
    """Name of the value that is each weighted layer's result (after its bias), by module. Same names in every graph."""
    result: dict[str, str] = {}
    for name, nodes in graph_layers(model.graph).items():
        result[name] = str(nodes.result.outputs[0].name)
    return result


class TapOutputs(ir.passes.InPlacePass):
    """Add the named values to the graph's outputs; nothing else changes."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = list(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raise LoweringError for a name the graph does not have."""
        outer = {output.name: output for node in model.graph for output in node.outputs}
        values = {output.name: output for node in layer_graph(model) for output in node.outputs} | outer
        missing = [name for name in self._names if name not in values]
        if missing:
            raise LoweringError(f"tap: the graph has no value {missing[:5]}")
        wanted = [values[name] for name in dict.fromkeys(self._names) if not values[name].is_graph_output()]
        for value in wanted:
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.FLOAT)
        loop = looping(model)
        if loop is not None:
            inner = [value for value in wanted if value.name not in outer]
            wanted = [value for value in wanted if value.name in outer] + add_results(loop, inner)
        model.graph.outputs.extend(wanted)
        return ir.passes.PassResult(model, bool(wanted))
