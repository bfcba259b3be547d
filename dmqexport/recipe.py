"""The recipe: every choice of a build, typed, frozen, and written beside the result as YAML."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dmqexport.errors import RecipeError
from dmqexport.quant_types import BitWidths
from dmqexport.target import Target

SCHEMA_VERSION = 1


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingRecipe(_Section):
    """How trajectories and pictures are drawn; null means the model's own default."""

    scheduler: str | None = Field(default=None, description="short scheduler name, e.g. ddim; null keeps the model's")
    steps: int | None = Field(default=None, ge=1, le=1000, description="denoising steps")
    guidance: float | None = Field(default=None, ge=0, description="classifier-free guidance scale")


class CalibrationRecipe(_Section):
    """What the activation ranges are measured on."""

    prompts: str | None = Field(default=None, description="text file, one prompt a line; null: the model's own")
    size: int = Field(default=64, ge=1, description="float trajectories")
    rows: int = Field(default=10, ge=1, description="rows of the timestep table")
    row_assignment: Literal["equal-groups", "per-step"] = "equal-groups"
    samples_per_row: int = Field(default=8192, ge=64, description="activation values kept per tensor and row")
    batch_size: int = Field(default=32, ge=1)
    embeddings: Literal["random"] | None = Field(default=None, description="for a UNet without text encoder")


class QuantizationRecipe(_Section):
    """Which layers get how many bits. Patterns are shell globs over fully qualified module names."""

    boundary: tuple[str, ...] | None = Field(default=None, description="layers at 8 bit; null takes the family's list")
    overrides: dict[str, str] = Field(default_factory=dict, description="pattern → wNaM; the last match wins")
    keep_float: tuple[str, ...] = ()
    attention_bits: int | None = Field(default=None, ge=2, le=8, description="null leaves attention matmuls in float")
    split_concat: bool = True

    @field_validator("overrides")
    @classmethod
    def _widths(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            BitWidths.parse(text)
        return value


class GatesRecipe(_Section):
    """Thresholds; the build ends with exit code 3 (accuracy) or 4 (performance) when one fails. null: not gated."""

    eps_sqnr_db: float | None = Field(default=6.0, description="least SQNR of the predicted noise against float")
    image_psnr_db: float | None = None
    image_ssim: float | None = None
    retrieval_drop: float | None = Field(default=None, ge=0, le=1, description="largest loss of retrieval accuracy")
    latency_ratio: float | None = Field(default=None, gt=0, description="largest quantized / float32 latency")


class ValidationRecipe(_Section):
    """How the deployed graph is judged."""

    images: int = Field(default=16, ge=1, description="pictures compared with the float model's, same seeds")
    retrieval: int = Field(default=200, ge=0, le=1355, description="captions of the retrieval metric (bundled model)")
    entries: int = Field(default=400, ge=1, description="trajectory points whose predicted noise is compared")
    layer_entries: int = Field(default=40, ge=1, description="trajectory points whose layer outputs are compared")
    batch_size: int = Field(default=16, ge=1)
    latency_batch: int = Field(default=8, ge=1)
    latency_runs: int = Field(default=20, ge=3)
    gates: GatesRecipe = GatesRecipe()


class LoweringRecipe(_Section):
    """Choices of the target graphs."""

    cpu_isa: Literal["auto", "portable", "vnni"] = Field(
        default="auto", description="auto: signed weights if this CPU has VNNI; portable: exact on every x86 CPU"
    )
    max_batch: int = Field(default=8, ge=1, description="largest batch of TensorRT profiles")


class Recipe(_Section):
    """A build, fully resolved."""

    schema_version: Literal[1] = 1
    model: str
    revision: str | None = None
    bits: str = "w8a8"
    target: Target = Target.ORT_CPU
    seed: int = Field(default=0, ge=0, lt=2**31)
    sampling: SamplingRecipe = SamplingRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    quantization: QuantizationRecipe = QuantizationRecipe()
    validation: ValidationRecipe = ValidationRecipe()
    lowering: LoweringRecipe = LoweringRecipe()

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: str) -> str:
        return str(BitWidths.parse(value))

    @property
    def widths(self) -> BitWidths:
        """The parsed `bits`."""
        return BitWidths.parse(self.bits)

    def to_yaml(self) -> str:
        """The recipe as YAML, every key present."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: Path | None, options: Mapping[str, Any], assignments: Sequence[str]) -> Recipe:
    """Merge a recipe file, command-line options (dotted key → value, None means not given) and `--set a.b=v`.

    Later wins. Raises RecipeError for a file that cannot be read, a value of the wrong type, and an unknown key, naming
    the nearest one.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"recipe {path} cannot be read: {error}") from error
        if not isinstance(loaded, dict):
            raise RecipeError(f"recipe {path} must be a mapping of keys, got {type(loaded).__name__}")
        document = loaded
    for key, value in options.items():
        if value is not None:
            _assign(document, key, value)
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {text!r} is not of the form key=value", hint="e.g. --set calibration.rows=20")
        try:
            _assign(document, key.strip(), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {text!r}: {error}") from error
    if "model" not in document:
        raise RecipeError("no model given", hint="use -m/--model, for example -m emoji")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from error


def _assign(document: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    target = document
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise RecipeError(f"recipe key {key!r}: {parent!r} is not a section")
    target[leaf] = value


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key a recipe may hold."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, _Section):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _explain(error: ValidationError) -> str:
    lines = []
    keys = known_keys()
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
            leaf = [name for name in keys if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
            nearest = near[0] if near else (leaf[0] if leaf else ", ".join(keys[:5]) + ", …")
            lines.append(f"unknown recipe key {key!r}; did you mean {nearest!r}?")
        else:
            lines.append(f"recipe key {key!r}: {item['msg']}, got {item.get('input')!r}")
    return "\n".join(lines)
