"""The shape of report.json, for good: what every script that reads a report may rely on.

Extra keys are welcome and kept. A value that could not be measured is null, never a made-up figure; `notes` may say
why, keyed by the dotted name of the field (`{"latency": "the target is not on this machine"}`).
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from dmqexport.errors import DmqExportError

SCHEMA_VERSION = 1

CAP_DB = 200.0
"""Decibels are clipped to ±200: an exact match has no finite ratio, and JSON has no infinity."""

_SHOWN_PROBLEMS = 8

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]

Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], Field(strict=False)]
"""Items in order: a tuple once validated, and a list is welcome; the items themselves stay strict."""


class ReportError(DmqExportError):
    """A report document or picture set that does not have the promised shape."""


class _Part(BaseModel):
    """One object of the document: typed keys, extra keys kept, misspelt keys refused."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, validate_by_name=True, validate_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_misspelt_keys(cls, data: Any) -> Any:
        # Extra keys are allowed, so "latancy" would pass unseen and the report would say "not measured".
        if not isinstance(data, Mapping):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        absent = known - data.keys()
        for key in data.keys() - known:
            nearest = difflib.get_close_matches(str(key), absent, n=1, cutoff=0.85)
            if nearest:
                raise ValueError(f"unknown key {key!r}; did you mean {nearest[0]!r}?")
        return data


class Model(_Part):
    """What was quantized."""

    name: str
    family: str
    parameters: Count | None = None
    source: str | None = None


class TimestepError(_Part):
    """Error of the predicted noise at one timestep value."""

    timestep: int
    row: int
    eps_sqnr_db: float | None
    samples: Count


class Metrics(_Part):
    """Quality of the deployed graph against the float model on the same seeds."""

    eps_sqnr_db: float | None
    image_psnr_db: float | None
    image_psnr_pooled_db: float | None = None
    image_ssim: Annotated[float, Field(ge=-1, le=1)] | None
    retrieval_accuracy: Fraction | None = None
    retrieval_accuracy_fp: Fraction | None = None
    retrieval_count: Count | None = None
    frechet_train: NonNegative | None = None
    frechet_train_fp: NonNegative | None = None
    frechet_train_ratio: NonNegative | None = None
    frechet_float: NonNegative | None = None
    frechet_extractor: str | None = None
    frechet_features: Count | None = None
    frechet_count: Count | None = None
    canonical_max_rel_error: NonNegative | None = None
    by_timestep: Many[TimestepError] = ()


class Bits(_Part):
    """Width of weights and activations (the mean over timestep rows where they differ); null is not quantized."""

    weight: Count | None
    activation: Annotated[float, Field(ge=0)] | None


class Layer(_Part):
    """One layer: nominal bits the plan asks for, storage bits the file holds, the type the kernel multiplies."""

    name: str
    op: str
    nominal_bits: Bits
    storage_bits: Bits
    compute: str
    sqnr_db: float | None
    sqnr_by_row: Many[float | None]
    parameters: Count | None
    macs: Count | None = None
    reason: str | None = None

    @property
    def in_float(self) -> bool:
        """Whether the kernel of this layer multiplies floating-point numbers; FP8 ones are the plan's codes."""
        kind = self.compute.lower()
        return kind.startswith(("float", "bfloat", "fp", "bf")) and not kind.startswith("fp8")


class Row(_Part):
    """One row of the timestep tables and the timesteps that select it."""

    row: int
    timestep_min: int
    timestep_max: int


class SizeBytes(_Part):
    """Bytes of the weights: in float, at nominal bits, and as the file stores them."""

    float_: Count | None = Field(alias="float")
    nominal: Count | None
    storage: Count | None


class Latency(_Part):
    """Time of one denoiser call; ratio is quantized_ms / fp32_ms, so below one is faster than float."""

    fp32_ms: Positive | None
    quantized_ms: Positive | None
    ratio: Positive | None
    batch: Count | None = None
    threads: Count | None = None
    runs: Count | None = None

    @model_validator(mode="after")
    def _ratio_is_not_inverted(self) -> Self:
        if self.fp32_ms is None or self.quantized_ms is None or self.ratio is None:
            return self
        expected, given = math.log(self.quantized_ms / self.fp32_ms), math.log(self.ratio)
        # A median of ratios may differ from the ratio of medians; an inverted ratio differs in sign.
        if abs(expected) > 0.1 and abs(given + expected) < abs(given - expected):
            raise ValueError(f"ratio is {self.ratio:g}, but quantized_ms / fp32_ms is {math.exp(expected):.3g}")
        return self


class Gate(_Part):
    """One threshold and what was measured against it; `passed` is null when nothing could be measured."""

    name: str
    threshold: float
    measured: float | None
    passed: bool | None
    unit: str = ""
    direction: Literal["min", "max"] | None = None


class Engine(_Part):
    """What the target's own inspector says about the engine that was built."""

    target: str
    version: str | None = None
    seconds: NonNegative | None = None
    bytes: Count | None = None
    layers_proven: Count | None = None
    layers_planned: Count | None = None
    note: str | None = None


class PolygraphyResult(_Part):
    """Findings of Polygraphy's lint and output comparison."""

    lint: Many[JsonValue] = ()
    compared_outputs: Count | None = None
    passed: bool | None = None
    note: str | None = None


class Stage(_Part):
    """Cost of one stage of the build, of the run that finished it; cached: that was an earlier one.

    cpu_seconds: processor time, all threads and child processes. forward_seconds: what of `seconds` the float model's
    own evaluations took. peak_rss_bytes: with child processes. disk_bytes: what it left in the work folder.
    """

    name: str
    seconds: NonNegative | None = None
    cpu_seconds: NonNegative | None = None
    forward_seconds: NonNegative | None = None
    cached: bool = False
    peak_rss_bytes: Count | None = None
    disk_bytes: Count | None = None


class Environment(_Part):
    """Where the report was made."""

    python: str | None = None
    platform: str | None = None
    cpu: str | None = None
    packages: dict[str, str | None] = Field(default_factory=dict)


class Images(_Part):
    """What the pictures were sampled from."""

    prompts: Many[str] = ()
    seeds: Many[int] = ()
    note: str | None = None


class Spent(_Part):
    """What an allocation used of one budget."""

    used: float
    limit: float


class BitAllocation(_Part):
    """How the bits were chosen; figures are null where every layer got the same by name.

    lambda_: budget → distortion that one more unit of it would save; pareto: points of a sweep, where one was made.
    """

    method: str
    budget: str
    lambda_: dict[str, float] = Field(default_factory=dict, alias="lambda")
    rate: dict[str, Spent] = Field(default_factory=dict)
    predicted_distortion: float | None = None
    measured_distortion: float | None = None
    certified_gap: NonNegative | None = None
    pareto: Many[dict[str, JsonValue]] = ()


class ReportDocument(_Part):
    """The whole of report.json."""

    schema_version: Literal[1]
    dmqexport_version: str
    created: str | None = None
    model: Model
    bits: str
    target: str
    recipe: dict[str, JsonValue]
    metrics: Metrics
    layers: Many[Layer]
    rows: Many[Row]
    size_bytes: SizeBytes
    latency: Latency | None = None
    operators: dict[str, dict[str, Count]] = Field(default_factory=dict)
    gates: Many[Gate] = ()
    engine: Engine | None = None
    polygraphy: PolygraphyResult | None = None
    stages: Many[Stage] = ()
    environment: Environment = Field(default_factory=Environment)
    images: Images = Field(default_factory=Images)
    warnings: Many[str] = ()
    suggestions: Many[str] = ()
    notes: dict[str, str] = Field(default_factory=dict)
    allocation: BitAllocation | None = None

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.created is not None:
            datetime.fromisoformat(self.created)
        rows = [row.row for row in self.rows]
        if len(set(rows)) != len(rows):
            raise ValueError(f"rows: the row numbers {rows} repeat")
        for layer in self.layers:
            if len(layer.sqnr_by_row) != len(rows):
                raise ValueError(
                    f"layer {layer.name!r}: sqnr_by_row has {len(layer.sqnr_by_row)} values, expected one for each of "
                    f"the {len(rows)} rows (null where nothing was measured)"
                )
        for point in self.metrics.by_timestep:
            if point.row not in rows:
                raise ValueError(f"metrics.by_timestep: timestep {point.timestep} names row {point.row}, not in rows")
        fields = set(_dotted_names(type(self)))
        for name in self.notes:
            if name not in fields:
                nearest = difflib.get_close_matches(name, fields, n=1)
                raise ValueError(f"notes: {name!r} is no field{f'; did you mean {nearest[0]!r}?' if nearest else ''}")
        return self

    def as_json(self) -> dict[str, Any]:
        """Return the document as plain JSON values; every documented key is present."""
        return self.model_dump(mode="json", by_alias=True)


def parse_document(document: Mapping[str, Any]) -> ReportDocument:
    """Validate a report document.

    Numpy scalars and arrays become numbers and lists, decibels are clipped to ±CAP_DB, and a NaN or infinity becomes
    null with a warning in the document, because a figure that cannot be written was not measured.
    """
    lost: list[str] = []
    plain = {str(key): _plain(value, str(key), lost) for key, value in document.items()}
    if lost and isinstance(plain.get("warnings", []), list):
        plain["warnings"] = [
            *plain.get("warnings", []),
            *(f"{name} was NaN or infinite; recorded as not measured" for name in lost),
        ]
    try:
        return ReportDocument.model_validate(plain)
    except ValidationError as error:
        raise ReportError(
            _explain(error),
            hint="the shape is dmqexport.report.document.ReportDocument; what was not measured is null",
        ) from error


def read_report(path: Path) -> ReportDocument:
    """Read a report.json that was written earlier."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read the report {path}: {error}", hint="validate the bundle again") from error
    if not isinstance(document, dict):
        raise ReportError(f"{path} holds a {type(document).__name__}, expected a report object")
    return parse_document(document)


def _plain(value: Any, name: str, lost: list[str], *, decibels: bool = False) -> Any:
    """Return `value` as JSON types only; names that turned into null for want of a finite number go to `lost`."""
    match value:
        case None | bool() | str():
            return value
        case np.bool_():
            return bool(value)
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return _finite(float(value), name, lost, decibels=decibels)
        case np.ndarray():
            return _plain(value.tolist(), name, lost, decibels=decibels)
        case PurePath():
            return str(value)
        case Mapping():
            ratios = ("measured", "threshold") if value.get("unit") == "dB" else ()
            return {
                str(key): _plain(
                    item, f"{name}.{key}", lost, decibels=str(key).endswith("_db") or key in ("sqnr_by_row", *ratios)
                )
                for key, item in value.items()
            }
        case Sequence():
            return [_plain(item, f"{name}.{index}", lost, decibels=decibels) for index, item in enumerate(value)]
        case _:
            raise ReportError(
                f"report document, {name}: a {type(value).__name__} has no JSON form",
                hint="give numbers, strings, lists, mappings, numpy arrays or None",
            )


def _finite(value: float, name: str, lost: list[str], *, decibels: bool) -> float | None:
    if decibels and not math.isnan(value):
        return min(max(value, -CAP_DB), CAP_DB)
    if math.isfinite(value):
        return value
    lost.append(name)
    return None


def _dotted_names(part: type[_Part], prefix: str = "") -> Iterator[str]:
    for name, field in part.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        yield dotted
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, _Part):
                yield from _dotted_names(kind, f"{dotted}.")


def _explain(error: ValidationError) -> str:
    problems = [
        f"  {'.'.join(str(part) for part in found['loc']) or 'document'}: {found['msg'].removeprefix('Value error, ')}"
        + ("" if found["type"] in ("missing", "value_error") else f" (got {_short(found['input'])})")
        for found in error.errors(include_url=False)
    ]
    left = len(problems) - _SHOWN_PROBLEMS
    more = [f"  and {left} more"] if left > 0 else []
    return "\n".join(["the report document does not have the promised shape:", *problems[:_SHOWN_PROBLEMS], *more])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
