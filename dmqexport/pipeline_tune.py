"""Choose the kernels of one model's layers by what this machine measures, each kind of layer once."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir

from dmqexport.errors import RecipeError
from dmqexport.onnx_export import save_model
from dmqexport.quant_plan import LayerOp, QuantPlan
from dmqexport.quant_weights import QuantWeights
from dmqexport.tuning import Kernel, Timings, cpu_model, load_cache, read_timings, store_cache
from engines import ort
from engines.ort_profile import by_layer, profile_nodes
from passes.bind import bind
from passes.pipelines import group_by_row, lower_ort_cpu

logger = logging.getLogger(__name__)

#: Values of `lowering.tune` that are no file.
OFF, HOST = "off", "host"
#: In a stage's folder: which kernels, and why.
KERNELS = "kernels.json"
_RUNS = 7


@dataclass(frozen=True)
class Machine:
    """What times are valid for. batch, threads: of the measured calls."""

    vnni: bool
    batch: int
    threads: int

    @property
    def circumstances(self) -> str:
        """What of it is no part of a file's name."""
        return f"batch {self.batch} threads {self.threads} {'signed' if self.vnni else 'portable'}"


def tune(
    mode: str,
    canonical: Path,
    plan: QuantPlan,
    weights: QuantWeights,
    inputs: Mapping[str, np.ndarray],
    machine: Machine,
) -> dict[str, Any]:
    """What to do about layers that the fused integer product does not suit best, and what says so.

    mode: HOST measures what is not known of this machine yet, and keeps it for the next build; else the path of a file
    of timings. Returns a document with `kernels`: layer or attention → kernel, signature and milliseconds of every one.

    Raises RecipeError for a file that holds no timings, or none of this plan's layers under these circumstances.
    """
    signatures = layer_signatures(ir.load(canonical), plan, machine.circumstances)
    if mode == HOST:
        timings = load_cache(cpu_model(), str(ort.version()))
        missing = {name: signature for name, signature in signatures.items() if signature not in timings.times}
        if missing:
            times = measure(canonical, plan, weights, missing, inputs, vnni=machine.vnni, threads=machine.threads)
            timings = timings.merged(times)
            store_cache(timings)
    else:
        timings = read_timings(Path(mode))
        _check_told(mode, timings, set(signatures.values()), machine)
    return _document(timings, signatures)


def _check_told(path: str, timings: Timings, wanted: set[str], machine: Machine) -> None:
    """A file that says nothing of this plan is an error; one of another machine, or of some layers alone, a warning."""
    unknown = wanted - timings.times.keys()
    if wanted and unknown == wanted:
        raise RecipeError(
            f"lowering.tune={path}: has times of {len(timings.times)} kinds of layers, none of them one of the "
            f"{len(wanted)} of this plan at {machine.circumstances}",
            hint="times are of the bits, shapes, batch (validation.latency_batch), threads and kind of integers that "
            "they were measured with; lowering.tune=host measures here",
        )
    if unknown:
        logger.warning("%s knows %d of %d kinds of layers: the others take the integer product", path,
                       len(wanted) - len(unknown), len(wanted))  # fmt: skip
    here = (cpu_model(), str(ort.version()))
    if (timings.cpu, timings.runtime) != here:
        logger.warning("%s is of %s, onnxruntime %s: what is fastest there may not be on %s, onnxruntime %s", path,
                       timings.cpu, timings.runtime, *here)  # fmt: skip


def _document(timings: Timings, signatures: Mapping[str, str]) -> dict[str, Any]:
    chosen = timings.choose(signatures)
    return {
        "cpu": timings.cpu,
        "runtime": timings.runtime,
        "kernels": {
            name: {
                "kernel": kernel.value,
                "signature": signatures[name],
                "ms": {each.value: ms for each, ms in timings.times[signatures[name]].items()},
            }
            for name, kernel in sorted(chosen.items())
        },
    }


def why(entry: Mapping[str, Any]) -> str:
    """One line about an entry of `kernels`."""
    times = ", ".join(f"{kernel} {ms:.3f} ms" for kernel, ms in entry["ms"].items())
    return f"fastest as {entry['kernel']} where it was measured: {times}"


def layer_signatures(canonical: ir.Model, plan: QuantPlan, circumstances: str) -> dict[str, str]:
    """What a layer's or an attention's time depends on, by name: operator, bits, shapes, attributes, `circumstances`.

    Only what has quantized activations; the batch is left open, since `circumstances` say it.
    """
    signatures, bindings = {}, bind(canonical, plan)
    for name, nodes in bindings.layers.items():
        layer = plan.layer(name)
        if any(segment.activation is None for segment in layer.segments):
            continue
        parts = []
        for node in nodes.compute:
            weight = node.inputs[1]
            attributes = ",".join(f"{key}={node.attributes[key].value}" for key in sorted(node.attributes))
            sizes = [] if weight is None or weight.shape is None else list(weight.shape)
            parts.append(f"in {_sizes(_behind_batch(node.inputs[0]))} weight {_sizes(sizes)} {attributes}".strip())
        kind = f"{layer.op.value} w{layer.weight_bits}a{layer.activation_bits}"
        signatures[name] = f"{kind} {circumstances} {' + '.join(parts)}"
    for attention in plan.attentions:
        products = bindings.attentions[attention.name]
        query, value = (
            _sizes(_behind_batch(node.inputs[operand]))
            for node, operand in ((products.query_key, 0), (products.probability_value, 1))
        )
        operands = (attention.query, attention.key, attention.probability, attention.value)
        kind = "".join(f"a{qparams.bits}" for qparams in operands)
        signatures[attention.name] = f"attention {kind} {circumstances} query {query} value {value}"
    return signatures


def measure(
    canonical: Path,
    plan: QuantPlan,
    weights: QuantWeights,
    signatures: Mapping[str, str],
    inputs: Mapping[str, np.ndarray],
    *,
    vnni: bool,
    threads: int,
) -> dict[str, dict[Kernel, float]]:
    """Milliseconds by signature and kernel: of every layer inside the whole graph, its quantizers and all; of both
    products of an attention, without what is between them.

    The graph runs once with each kernel everywhere; a signature's time is the median of its layers'.
    """
    found: dict[str, dict[Kernel, float]] = {}
    for kernel in Kernel:
        wanted = {n: s for n, s in signatures.items() if kernel is not Kernel.CONV_INTEGER or _convolution(plan, n)}
        if not wanted:
            continue
        model = ir.load(canonical)
        lower_ort_cpu(plan, weights, vnni=vnni, kernels=dict.fromkeys(wanted, kernel.value))(model)
        group_by_row()(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_model(model, path)
            names = [*(layer.name for layer in plan.layers), *(attention.name for attention in plan.attentions)]
            nodes = profile_nodes(path, inputs, runs=_RUNS, threads=threads)
            times = by_layer([node for node in nodes if node.op != "Softmax"], names)
        members: dict[str, list[float]] = {}
        for name, signature in wanted.items():
            if times[name] > 0:
                members.setdefault(signature, []).append(times[name])
        for signature, values in members.items():
            found.setdefault(signature, {})[kernel] = round(median(values), 6)
    return found


def _convolution(plan: QuantPlan, name: str) -> bool:
    return any(layer.name == name and layer.op is LayerOp.CONV for layer in plan.layers)


def _behind_batch(value: ir.Value | None) -> list[int | ir.SymbolicDim]:
    return [] if value is None or value.shape is None else list(value.shape)[1:]


def _sizes(shape: list[int | ir.SymbolicDim]) -> str:
    return "x".join(str(dim) if isinstance(dim, int) else "?" for dim in shape) or "?"
