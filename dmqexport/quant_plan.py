"""QuantPlan, the contract between calibration and everything after it, and the integer weights beside it.

`quant_plan.json` is for people and diffs, `quant_plan.safetensors` holds the arrays; no pickle anywhere. The weight
codes are a separate artifact (`quant_weights.safetensors`): a plan stays small and codes are read layer by layer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dmqexport.errors import BundleError
from dmqexport.quant_types import (
    ActivationQuant,
    FloatArray,
    IntArray,
    WeightQuant,
    check_channel_factor,
    frozen_array,
    remainder_of,
)

SCHEMA_VERSION = 1
PLAN_JSON = "quant_plan.json"
PLAN_ARRAYS = "quant_plan.safetensors"


class LayerOp(StrEnum):
    """The operator of a quantized layer."""

    CONV = "conv"
    LINEAR = "linear"


@dataclass(frozen=True)
class Segment:
    """One slice [start, stop) of a layer's input channels with its own quantizers.

    A plain layer has one segment; a layer that reads a concat has one a half (their ranges differ). `activation` is
    None for weight-only quantization. With `remainder`, what rounding the activation leaves over is quantized too
    (`quant_types.remainder_of`) and multiplied with the same weight: two int8 products that together see 16 bits.
    """

    start: int
    stop: int
    weight: WeightQuant
    activation: ActivationQuant | None
    remainder: bool = False


@dataclass(frozen=True)
class LayerQuant:
    """A quantized Conv or Linear, named by its torch fully qualified name.

    bias: float32 [out_channels] trained together with the codes; None leaves the model's own. rotation: the codes are
    for inputs whose consecutive blocks of so many channels are multiplied with `rotation_matrix`; None: for the inputs
    as they are.
    """

    name: str
    op: LayerOp
    segments: tuple[Segment, ...]
    parameters: int
    reason: str = ""
    bias: FloatArray | None = field(default=None, compare=False)
    rotation: int | None = None

    def __post_init__(self) -> None:
        if self.bias is not None:
            object.__setattr__(self, "bias", frozen_array(self.bias, np.float32))
            channels = len(self.segments[0].weight.scale) if self.segments else 0
            if self.bias.shape != (channels,) or not bool(np.all(np.isfinite(self.bias))):
                raise ValueError(f"{self.name}: the bias must be {channels} finite values, got {self.bias.shape}")
        if not self.segments or self.segments[0].start != 0:
            raise ValueError(f"{self.name}: segments must start at channel 0")
        size = self.rotation
        able = size is None or (size > 0 and not size & (size - 1) and not self.segments[-1].stop % size)
        if not able or (size is not None and self.op is not LayerOp.LINEAR):
            raise ValueError(f"{self.name}: blocks of {self.rotation} channels cannot be rotated in its inputs")
        for left, right in zip(self.segments, self.segments[1:], strict=False):
            if left.weight.bits != right.weight.bits:
                raise ValueError(f"{self.name}: segments must share their weight bits")
            if left.stop != right.start:
                raise ValueError(f"{self.name}: segments leave a gap at channel {left.stop}")
        for segment in self.segments:
            if segment.remainder:
                if segment.activation is None:
                    raise ValueError(f"{self.name}: float activations leave no remainder")
                remainder_of(segment.activation)  # raises for codes that have none
            factor = None if segment.activation is None else segment.activation.channel_factor
            if factor is not None and len(factor) != segment.stop - segment.start:
                raise ValueError(
                    f"{self.name}: {len(factor)} channel factors for {segment.stop - segment.start} input channels"
                )

    @property
    def weight_bits(self) -> int:
        """Nominal weight bits (segments share them)."""
        return self.segments[0].weight.bits

    @property
    def activation_bits(self) -> int | None:
        """Nominal activation bits (of the widest row), None for float."""
        activation = self.segments[0].activation
        return None if activation is None else activation.bits

    @property
    def mean_activation_bits(self) -> float | None:
        """Nominal activation bits, the mean over rows where these differ, a remainder's added; None for float."""
        activation = self.segments[0].activation
        return None if activation is None else float(activation.widths.mean()) * (2 if self.has_remainder else 1)

    @property
    def has_remainder(self) -> bool:
        """Whether the remainders of its activations are quantized too."""
        return any(segment.remainder for segment in self.segments)


@dataclass(frozen=True)
class AttentionQuant:
    """The two matmuls of a scaled-dot-product attention: query·keyᵀ and probabilities·value.

    `probability` is unsigned (zero_point 0); at 8 bits it uses the shifted form. query, key and value use the centered
    range at 8 bits, since a shift there would need a correction by the other operand's sum on both sides. None has
    channel factors (there is no weight to multiply them into) or gains (the fused kernels know of none).
    """

    name: str
    query: ActivationQuant
    key: ActivationQuant
    probability: ActivationQuant
    value: ActivationQuant

    def __post_init__(self) -> None:
        for operand in ("query", "key", "probability", "value"):
            if getattr(self, operand).channel_factor is not None or getattr(self, operand).gain is not None:
                raise ValueError(f"{self.name}#{operand}: an attention operand cannot have channel factors or a gain")


@dataclass(frozen=True, eq=False)
class ChannelFold:
    """A per-channel factor folded offline: `producer`'s output channels divided, its `consumers`' columns multiplied.

    factor: float32 [channels] > 0. The float function is unchanged; the graph holds the folded weights. One producer
    may feed several folds (the two modulations of an adaLN layer); a consumer has one input and is in one fold only.
    """

    producer: str
    consumers: tuple[str, ...]
    factor: FloatArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", frozen_array(self.factor, np.float32))
        if not self.consumers:
            raise ValueError(f"{self.producer}: a fold needs a consumer")
        check_channel_factor(self.factor)


@dataclass(frozen=True)
class Allocation:
    """How the bits were chosen. `method` is `uniform` unless a budget was given, and then nothing else is known.

    multipliers: λ of every budget, the distortion that one more unit of it would save (`lambda` in the JSON); rate:
    budget → {used, limit}; predicted_distortion: sum over layers; measured_distortion: all layers quantized at once;
    certified_gap: no choice within the budgets predicts less than (1 - gap) · predicted.
    """

    method: str
    budget: str
    average_weight_bits: float
    average_activation_bits: float | None
    multipliers: Mapping[str, float] = field(default_factory=dict)
    rate: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    predicted_distortion: float | None = None
    measured_distortion: float | None = None
    certified_gap: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class QuantPlan:
    """Everything the graph needs to know. row_map: int64 [keys], timestep → table row; the key of an integer timestep
    is itself, that of a float one is round(timestep · timestep_scale).

    scaling: for people, how the channel factors were chosen and what they did: `method`, and under `tensors` by
    `layer#segment` of a tensor's first reader the choice, where it was applied, and its effects.
    """

    model_fingerprint: str
    bits: str
    row_map: IntArray
    rows: int
    layers: tuple[LayerQuant, ...]
    attentions: tuple[AttentionQuant, ...] = ()
    float_layers: Mapping[str, str] = field(default_factory=dict)
    allocation: Allocation = field(default_factory=lambda: Allocation("uniform", "", 0.0, None))
    folds: tuple[ChannelFold, ...] = ()
    scaling: Mapping[str, Any] = field(default_factory=dict)
    timestep_scale: float = 1.0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_map", frozen_array(self.row_map, np.int64))
        if self.row_map.ndim != 1 or self.row_map.size == 0:
            raise ValueError("row_map must be a non-empty vector over timestep values")
        if int(self.row_map.min()) < 0 or int(self.row_map.max()) >= self.rows:
            raise ValueError(f"row_map names rows outside [0, {self.rows})")
        for name, activation in self.activations():
            if activation.rows not in (1, self.rows):
                raise ValueError(f"{name}: {activation.rows} rows, the table has {self.rows}")
        names = [layer.name for layer in self.layers] + [attention.name for attention in self.attentions]
        if len(set(names)) != len(names):
            raise ValueError("a layer is listed twice")

    def layer(self, name: str) -> LayerQuant:
        """Return the layer called `name`; KeyError otherwise."""
        for candidate in self.layers:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    def activations(self) -> list[tuple[str, ActivationQuant]]:
        """Every activation quantizer with a unique name `layer#operand`."""
        found = [
            (f"{layer.name}#{index}", segment.activation)
            for layer in self.layers
            for index, segment in enumerate(layer.segments)
            if segment.activation is not None
        ]
        for attention in self.attentions:
            for operand in ("query", "key", "probability", "value"):
                found.append((f"{attention.name}#{operand}", getattr(attention, operand)))
        return found

    def row_ranges(self) -> list[tuple[int, int, int]]:
        """Return (row, smallest timestep, largest timestep) for every row in use."""
        return [
            (row, int(np.flatnonzero(self.row_map == row)[0]), int(np.flatnonzero(self.row_map == row)[-1]))
            for row in range(self.rows)
            if bool(np.any(self.row_map == row))
        ]

    @property
    def fingerprint(self) -> str:
        """sha256 over the JSON and every array, hex."""
        document, arrays = _to_document(self)
        digest = hashlib.sha256(_dump(document).encode())
        for key in sorted(arrays):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(arrays[key]).tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `quant_plan.json` and `quant_plan.safetensors` into `folder`."""
        document, arrays = _to_document(self)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(arrays, str(folder / PLAN_ARRAYS))
        (folder / PLAN_JSON).write_text(_dump(document), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "QuantPlan":
        """Read a plan; raises BundleError when a file is missing, truncated or of another schema."""
        try:
            document = json.loads((folder / PLAN_JSON).read_text(encoding="utf-8"))
            arrays = load_file(str(folder / PLAN_ARRAYS))
            version = document.get("schema_version")
            if version != SCHEMA_VERSION:
                raise BundleError(
                    f"{folder / PLAN_JSON}: schema {version}, this version reads {SCHEMA_VERSION}",
                    hint="rebuild the bundle with this version",
                )
            return _from_document(document, arrays)
        except BundleError:
            raise
        except Exception as error:  # any parser's error means the same to the user
            raise BundleError(f"{folder}: the quantization plan cannot be read ({error})") from error


def _dump(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _to_document(plan: QuantPlan) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {"row_map": np.asarray(plan.row_map)}

    def activation_entry(key: str, activation: ActivationQuant) -> dict[str, Any]:
        arrays[f"{key}.scale"] = np.asarray(activation.scale)
        arrays[f"{key}.zero_point"] = np.asarray(activation.zero_point)
        entry: dict[str, Any] = {"bits": activation.bits, "rows": activation.rows, "scale_ref": activation.scale_ref}
        if activation.row_bits is not None:
            entry["row_bits"] = activation.row_bits.tolist()
        if activation.gain is not None:
            arrays[f"{key}.gain"] = np.asarray(activation.gain)
            entry["gains"] = len(activation.gain)
        if activation.channel_factor is not None:
            arrays[f"{key}.channel_factor"] = np.asarray(activation.channel_factor)
            entry["channel_factors"] = len(activation.channel_factor)
        return entry

    layers: list[dict[str, Any]] = []
    for layer in plan.layers:
        segments = []
        for index, segment in enumerate(layer.segments):
            key = f"{layer.name}#{index}"
            arrays[f"{key}.weight_scale"] = np.asarray(segment.weight.scale)
            arrays[f"{key}.weight_zero_point"] = np.asarray(segment.weight.zero_point)
            activation = None if segment.activation is None else activation_entry(key, segment.activation)
            rest = {"remainder": True} if segment.remainder else {}
            segments.append({"start": segment.start, "stop": segment.stop, "activation": activation, **rest})
        if layer.bias is not None:
            arrays[f"{layer.name}.bias"] = np.asarray(layer.bias)
        layers.append(
            {
                "name": layer.name,
                "op": layer.op.value,
                "parameters": layer.parameters,
                "weight_bits": layer.weight_bits,
                "activation_bits": layer.activation_bits,
                "mean_activation_bits": layer.mean_activation_bits,
                "reason": layer.reason,
                "bias_trained": layer.bias is not None,
                **({} if layer.rotation is None else {"rotation": layer.rotation}),
                "segments": segments,
            }
        )
    attentions = [
        {
            "name": attention.name,
            **{
                operand: activation_entry(f"{attention.name}#{operand}", getattr(attention, operand))
                for operand in ("query", "key", "probability", "value")
            },
        }
        for attention in plan.attentions
    ]
    folds = []
    for fold in plan.folds:
        arrays[f"{fold.consumers[0]}.fold"] = np.asarray(fold.factor)
        folds.append({"producer": fold.producer, "consumers": list(fold.consumers), "channels": len(fold.factor)})
    document = {
        "schema_version": plan.schema_version,
        "model_fingerprint": plan.model_fingerprint,
        "bits": plan.bits,
        "rows": plan.rows,
        "row_ranges": plan.row_ranges(),
        "layers": layers,
        "attentions": attentions,
        "folds": folds,
        "scaling": dict(plan.scaling),
        "timestep_scale": plan.timestep_scale,
        "float_layers": dict(plan.float_layers),
        "allocation": {
            **plan.allocation.details,
            "method": plan.allocation.method,
            "budget": plan.allocation.budget,
            "average_weight_bits": plan.allocation.average_weight_bits,
            "average_activation_bits": plan.allocation.average_activation_bits,
            "lambda": dict(plan.allocation.multipliers),
            "rate": {name: dict(values) for name, values in plan.allocation.rate.items()},
            "predicted_distortion": plan.allocation.predicted_distortion,
            "measured_distortion": plan.allocation.measured_distortion,
            "certified_gap": plan.allocation.certified_gap,
        },
    }
    return document, arrays


def _from_document(document: dict[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> QuantPlan:
    def activation(key: str, entry: Mapping[str, Any] | None) -> ActivationQuant | None:
        if entry is None:
            return None
        return ActivationQuant(
            int(entry["bits"]),
            arrays[f"{key}.scale"],
            arrays[f"{key}.zero_point"],
            float(entry["scale_ref"]),
            arrays[f"{key}.channel_factor"] if "channel_factors" in entry else None,
            np.asarray(entry["row_bits"], dtype=np.int64) if "row_bits" in entry else None,
            arrays[f"{key}.gain"] if "gains" in entry else None,
        )

    def required(key: str, entry: Mapping[str, Any]) -> ActivationQuant:
        found = activation(key, entry)
        assert found is not None
        return found

    layers = []
    for item in document["layers"]:
        segments = []
        for index, segment in enumerate(item["segments"]):
            key = f"{item['name']}#{index}"
            weight = WeightQuant(
                int(item["weight_bits"]), arrays[f"{key}.weight_scale"], arrays[f"{key}.weight_zero_point"]
            )
            span, found = (int(segment["start"]), int(segment["stop"])), activation(key, segment["activation"])
            segments.append(Segment(*span, weight, found, bool(segment.get("remainder", False))))
        bias = arrays[f"{item['name']}.bias"] if item.get("bias_trained") else None
        operator = LayerOp(item["op"])
        layers.append(
            LayerQuant(
                item["name"],
                operator,
                tuple(segments),
                int(item["parameters"]),
                item["reason"],
                bias,
                item.get("rotation"),
            )
        )
    attentions = tuple(
        AttentionQuant(
            item["name"],
            *(
                required(f"{item['name']}#{operand}", item[operand])
                for operand in ("query", "key", "probability", "value")
            ),
        )
        for item in document["attentions"]
    )
    allocation = dict(document["allocation"])
    known = {key: allocation.pop(key) for key in ("method", "budget", "average_weight_bits", "average_activation_bits")}
    known["multipliers"], known["rate"] = allocation.pop("lambda", {}), allocation.pop("rate", {})
    for key in ("predicted_distortion", "measured_distortion", "certified_gap"):
        known[key] = allocation.pop(key, None)
    return QuantPlan(
        model_fingerprint=document["model_fingerprint"],
        bits=document["bits"],
        row_map=np.asarray(arrays["row_map"], dtype=np.int64),
        rows=int(document["rows"]),
        layers=tuple(layers),
        attentions=attentions,
        float_layers=document["float_layers"],
        allocation=Allocation(**known, details=allocation),
        folds=tuple(
            ChannelFold(item["producer"], tuple(item["consumers"]), arrays[f"{item['consumers'][0]}.fold"])
            for item in document["folds"]
        ),
        scaling=document.get("scaling", {}),
        timestep_scale=float(document.get("timestep_scale", 1.0)),
    )
