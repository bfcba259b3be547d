"""The kernels of a built TensorRT engine, and the proof that its quantized layers run in their types. Standard library.

Travels into bundles inside `finish_on_gpu.py` (see `engines.trt.write_finish_script`), so it imports nothing of ours.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html ("Layers:" listing and
engine inspector).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operand:
    """One tensor an engine layer reads or writes; `dims` has -1 where the extent is dynamic."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def is_matrix(self) -> bool:
        """Whether it spans two dimensions or more: a weight does, a bias or a scale does not."""
        return sum(d != 1 for d in self.dims) >= 2

    @property
    def volume(self) -> int:
        """Element count, a dynamic extent counted as 1."""
        total = 1
        for extent in self.dims:
            total *= max(extent, 1)
        return total


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of a built engine and the ONNX nodes it came from."""

    name: str
    type: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    onnx_nodes: tuple[str, ...]
    weight_dtype: str | None = None
    tactic: str = ""

    @property
    def is_matrix_op(self) -> bool:
        """Whether the kernel convolves or multiplies matrices, as opposed to reshaping, moving or scaling."""
        kind = self.type.lower()
        if any(word in kind for word in ("correlation", "conv", "gemm", "matrix", "mha", "attention", "einsum")):
            return True
        # Generated kernels are called after their operations: __myl_FcAdd_..., __myl_MulMinMaxRounCast_...
        return kind in ("kgen", "runtime_fusion", "fusion") and bool(re.search(r"(Fc|Dot|Gemm|Corr|Mma)", self.name))

    @property
    def activation_dtype(self) -> str:
        return self.inputs[0].dtype if self.inputs else "none"

    @property
    def multiplied_dtype(self) -> str:
        """Type of the second factor: the weight, or of a product of two activations the second input."""
        if self.weight_dtype is not None:
            return self.weight_dtype
        weights = [c for c in self.constants if c.is_matrix]
        if not weights and len(self.inputs) > 1:
            return self.inputs[1].dtype  # attention products, and weights that an earlier kernel unpacks
        candidates = weights or list(self.constants)  # a 1x1 depthwise weight is as thin as a bias; it comes first
        return max(candidates, key=lambda c: c.volume).dtype if candidates else "none"

    @property
    def output_dtype(self) -> str:
        return self.outputs[0].dtype if self.outputs else "none"


_DTYPES = (  # in this order: "Float" is also in "BFloat16", "Int8" also in "UInt8"
    ("BFloat16", r"BFloat16|BF16"),
    ("UInt8", r"UInt8"),
    ("FP8", r"FP8|Float8"),
    ("FP4", r"FP4|Float4"),
    ("Half", r"Half|FP16|Float16"),
    ("Float", r"Float|FP32"),
    ("Int8", r"Int8"),
    ("Int4", r"Int4"),
    ("Int32", r"Int32"),
    ("Int64", r"Int64"),
    ("Bool", r"Bool"),
)


def dtype_name(text: str) -> str:
    """Return the element type named in a vendor's format description ("Row major linear FP16 format" -> "Half")."""
    for name, pattern in _DTYPES:
        if re.search(pattern, text, re.IGNORECASE):
            return name
    return text.strip() or "unknown"


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """Return the ONNX node names of a layer's Metadata, "[ONNX Layer: a][ONNX Layer: b]", separators and all."""
    return tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=\s*(?:[\x1e\x1f]|\[ONNX Layer: |$))", metadata))


_OPERAND = re.compile(r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[-\d, ]*)\](?P<rest>.*?)\}")
_LIST = r"\[\]|\[ \{.*?\}\]"
_LAYER = re.compile(
    rf"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<inputs>{_LIST}), "
    rf"(?:Constants: (?P<constants>{_LIST}), )?Outputs: (?P<outputs>{_LIST}), (?P<rest>.*)$"
)


def _operands(text: str | None) -> tuple[Operand, ...]:
    found = []
    for match in _OPERAND.finditer(text or ""):
        dims = tuple(int(d) for d in match["dims"].split(",") if d.strip())
        kind = re.search(r"Datatype: ([^,}]*)", match["rest"])
        found.append(Operand(match["name"], dims, dtype_name(kind[1] if kind else "")))
    return tuple(found)


def parse_layers(log: str) -> list[EngineLayer]:
    """Return the layers of the last "Layers:" listing in a verbose build log (DETAILED profiling verbosity).

    Empty where there is none. The listing is one line a layer and ends at the first other line.
    """
    layers: list[EngineLayer] = []
    listing = False
    for line in log.split("\n"):  # splitlines would also break at \x1e, which separates the nodes of a Metadata
        if re.fullmatch(r"(\[[^\]]*\] ?)*Layers: ?", line):
            layers, listing = [], True
            continue
        match = _LAYER.match(line) if listing else None
        if match is None:
            listing = listing and line.startswith("Name: ")  # a line we cannot read proves nothing, but ends nothing
            continue
        rest = match["rest"]
        weight = re.search(r'Weights: \{"Type": "(\w+)"', rest)
        tactic = re.search(r"TacticName: ([^,]*)", rest)
        metadata = rest.partition("Metadata: ")[2]
        layers.append(
            EngineLayer(
                match["name"],
                match["type"],
                _operands(match["inputs"]),
                _operands(match["constants"]),
                _operands(match["outputs"]),
                onnx_nodes(metadata) or _nodes_of_name(match["name"]),
                dtype_name(weight[1]) if weight else None,
                tactic[1] if tactic else "",
            )
        )
    return layers


def parse_inspector(text: str) -> list[EngineLayer]:
    """Return the layers of `EngineInspector.get_engine_information(JSON)`; names without details are left out."""

    def operands(items: Any) -> tuple[Operand, ...]:
        return tuple(
            Operand(
                str(item.get("Name", "")),
                tuple(int(d) for d in item.get("Dimensions", ())),
                dtype_name(str(item.get("Datatype") or item.get("Format/Datatype") or "")),
            )
            for item in items or ()
            if isinstance(item, dict)
        )

    layers = []
    for item in json.loads(text).get("Layers", []):
        if not isinstance(item, dict):
            continue
        name = str(item.get("Name", ""))
        weights = item.get("Weights")
        layers.append(
            EngineLayer(
                name,
                str(item.get("LayerType", "")),
                operands(item.get("Inputs")),
                operands(item.get("Constants")),
                operands(item.get("Outputs")),
                onnx_nodes(str(item.get("Metadata", ""))) or _nodes_of_name(name),
                dtype_name(str(weights["Type"])) if isinstance(weights, dict) and "Type" in weights else None,
                str(item.get("TacticName", "")),
            )
        )
    return layers


def _nodes_of_name(name: str) -> tuple[str, ...]:
    """Read a fused layer's name, "a+b_myl0_9" or "a + b", where it carries no Metadata."""
    return tuple(part.strip() for part in re.sub(r"_myl\d+_\d+$", "", name).split("+") if part.strip())


# --- the proof --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerProof:
    """One node of a quantized layer and what the engine multiplies for it; `problem` is empty when as planned."""

    layer: str
    node: str
    engine_layer: str
    activation: str
    weight: str
    output: str
    problem: str = ""


#: Before the type of a weight whose layer has float activations: "weight Int4".
WEIGHT = "weight "


def examine_int8(layers: Sequence[EngineLayer], expected: Mapping[str, Sequence[str]]) -> list[LayerProof]:
    """`examine` where every layer's products must take Int8 x Int8."""
    return examine(layers, {name: ("Int8", nodes) for name, nodes in expected.items()})


def examine(
    layers: Sequence[EngineLayer], expected: Mapping[str, tuple[str, Sequence[str | Sequence[str]]]]
) -> list[LayerProof]:
    """Say for every node of every quantized layer what the engine multiplies.

    `expected`: torch name of the layer -> (type, names of nodes in the ONNX graph). "Int8" and "FP8": its
    Conv/MatMul/Gemm nodes; one is proven when at least one matrix kernel of the engine claims it and all that do take
    that type twice. "weight Int4" and "weight Int8": for each product a list of the node that dequantizes its weight
    and of itself; they are proven when a kernel that claims one of them holds a constant matrix of the type. A node
    that none claims is a problem, as is a layer without nodes: silence proves nothing.
    """
    by_node: dict[str, list[EngineLayer]] = {}
    for engine_layer in layers:
        for node in set(engine_layer.onnx_nodes):
            by_node.setdefault(node, []).append(engine_layer)
    proofs = []
    for name, (kind, nodes) in expected.items():
        if not nodes:
            proofs.append(LayerProof(name, "", "", "none", "none", "none", "no compute node was named for this layer"))
        for each in nodes:
            names = [each] if isinstance(each, str) else list(each)
            claimants = [layer for node in names for layer in by_node.get(node, [])]
            proofs.append(_examine_node(name, names[0], claimants, len(layers), kind))
    return proofs


def _examine_node(name: str, node: str, claimants: Sequence[EngineLayer], total: int, kind: str) -> LayerProof:
    if kind.startswith(WEIGHT):
        wanted = kind[len(WEIGHT) :]
        for layer in claimants:
            if wanted in (layer.weight_dtype, *(c.dtype for c in layer.constants if c.is_matrix)):
                return LayerProof(name, node, layer.name, layer.output_dtype, wanted, layer.output_dtype)
        if claimants:
            held = sorted({c.dtype for layer in claimants for c in layer.constants})
            problem = f"its weights are held as {', '.join(held) or 'nothing'}, not {wanted}: the builder expanded them"
            return LayerProof(name, node, claimants[0].name, "none", "none", "none", problem)
    kernels = [layer for layer in claimants if layer.is_matrix_op]
    if not kernels:
        if claimants:
            where = ", ".join(sorted({f"{layer.name} ({layer.type})" for layer in claimants}))
            problem = f"no matrix kernel computes it, only {where}: it was dissolved into element-wise kernels"
        else:
            problem = (
                f"none of the {total} engine layers names it: folded away, renamed after the graph was exported, or "
                "the log lacks details"
            )
        return LayerProof(name, node, "", "none", "none", "none", problem)
    worst = next((k for k in kernels if (k.activation_dtype, k.multiplied_dtype) != (kind, kind)), kernels[0])
    activation, weight = worst.activation_dtype, worst.multiplied_dtype
    cause = _cause_of_float(activation, weight, kind)
    return LayerProof(name, node, worst.name, activation, weight, worst.output_dtype, cause)


def _cause_of_float(activation: str, weight: str, kind: str) -> str:
    if activation == weight == kind:
        return ""
    took = f"takes {activation} x {weight}"
    if activation == kind:
        return (
            f"{took}: its weight has no {kind} DequantizeLinear, or one the builder could not keep (axis, zero-point)"
        )
    if weight == kind:
        return f"{took}: only the weight is quantized, its input comes without QuantizeLinear/DequantizeLinear"
    return (
        f"{took}: not quantized at all, or the activation scale is not a rank-0 constant (a scale of shape [1] or one "
        "computed at run time builds, and falls back to float)"
    )


def describe(failed: Sequence[LayerProof], total: int, how: str = "in int8") -> str:
    """Return one line a layer that is not as planned, under a line that counts them."""
    lines = "\n".join(f"    {proof.layer} (node {proof.node!r}) {proof.problem}" for proof in failed)
    return f"{len(failed)} of {total} quantized operators do not run {how}:\n{lines}"


def layer_from_json(item: Mapping[str, Any]) -> EngineLayer:
    """Undo `dataclasses.asdict` after a trip through JSON."""

    def operands(key: str) -> tuple[Operand, ...]:
        return tuple(Operand(o["name"], tuple(o["dims"]), o["dtype"]) for o in item[key])

    return EngineLayer(
        item["name"],
        item["type"],
        operands("inputs"),
        operands("constants"),
        operands("outputs"),
        tuple(item["onnx_nodes"]),
        item["weight_dtype"],
        item["tactic"],
    )
