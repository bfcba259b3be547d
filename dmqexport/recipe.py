"""The recipe: every choice of a build, typed, frozen, and written beside the result as YAML."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dmqexport.errors import RecipeError
from dmqexport.quant_types import BitWidths
from dmqexport.target import Target

SCHEMA_VERSION = 1
#: pydantic's kinds of error, in words; the others speak for themselves.
_WORDS = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list, such as [conv_in, conv_out]",
    "dict_type": "expected keys and values, such as {conv_in: w8a8}",
    "model_type": "expected a section of keys",
}
_BITS_HINT = "for example w4a4, w8a8 or w4a16 (16: float activations)"


#: Options that are shorthands of recipe keys; errors name what the user typed.
OPTIONS = {
    "model": "--model",
    "revision": "--revision",
    "bits": "--bits",
    "target": "--target",
    "seed": "--seed",
    "sampling.steps": "--steps",
    "sampling.scheduler": "--scheduler",
    "calibration.prompts": "--calib-prompts",
    "calibration.size": "--calib-size",
    "calibration.rows": "--rows",
    "quantization.attention_bits": "--attention-bits",
}


class _BooleanError(ValueError):
    """(key, value) of a yes or no where something else belongs."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, data: Any) -> Any:
        """A section without keys is an empty one, and YAML's yes and no are no numbers, whatever Python thinks."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            kind = cls.model_fields[name].annotation if name in cls.model_fields else None
            if value is None and isinstance(kind, type) and issubclass(kind, _Section):
                continue
            if isinstance(value, bool) and kind is not bool:
                raise _BooleanError(name, value)
            kept[name] = value
        return kept


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
    rounding: Literal["nearest", "second-order"] = Field(
        default="second-order", description="second-order: refit to quantized inputs, then compensate rounding (GPTQ)"
    )
    equalize: float | None = Field(
        default=0.5, ge=0, le=1, description="strength of channel factors folded where exact; null folds none"
    )

    @field_validator("overrides")
    @classmethod
    def _widths(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, text in value.items():
            try:
                BitWidths.parse(text)
            except RecipeError as error:
                where = "" if repr(text) in error.message else f"{text!r}, "
                raise RecipeError(
                    f"recipe key 'quantization.overrides', pattern {pattern!r}: {where}{error.message}",
                    hint=error.hint or _BITS_HINT,
                ) from error
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
        try:
            return str(BitWidths.parse(value))
        except RecipeError as error:
            where = "" if repr(value) in error.message else f"bits {value!r}: "
            raise RecipeError(where + error.message, hint=error.hint or _BITS_HINT) from error

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
    document = {} if path is None else _read(path)
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        _assign(document, key, value)
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"--set {text!r} is not of the form key=value", hint="e.g. --set calibration.rows=20")
        try:
            _assign(document, key.strip(), yaml.safe_load(value))
            given.pop(key.strip(), None)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"--set {text!r}: the value is not YAML: {_first_line(error)}",
                hint="quote it for the shell, e.g. --set 'quantization.overrides={conv_in: w8a8}'",
            ) from error
    if document.get("model") is None:
        raise RecipeError("no model given", hint="use -m/--model, for example -m emoji; `dmqexport models` lists more")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = _explain(error, given)
        source = "" if path is None or given or assignments else f"{path}: "
        raise RecipeError(
            source + "\n".join(problems), hint="--dry-run prints every key of a recipe that can be read"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML: {_first_line(error)}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys, got a {type(loaded).__name__}")
    return loaded


def _first_line(error: yaml.YAMLError) -> str:
    """What and where, without YAML's drawing of the place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem or error.context} in line {mark.line + 1}, column {mark.column + 1}"
    return str(error).splitlines()[0]


def _assign(document: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    target = document
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
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


def _explain(error: ValidationError, given: Collection[str]) -> list[str]:
    """One line a problem, in the words of recipes instead of pydantic's."""
    lines = []
    for item in error.errors():
        context: Mapping[str, Any] = item.get("ctx", {})
        path = [str(part) for part in item["loc"]]
        value = item.get("input")
        cause = context.get("error")
        if isinstance(cause, _BooleanError):
            name, value = cause.args
            path.append(name)
        key = ".".join(path)
        if item["type"] in ("extra_forbidden", "invalid_key"):
            lines.append(f"unknown recipe key {key!r}; {_nearest(key)}")
            continue
        where = f"{OPTIONS[key]} (recipe key {key!r})" if key in given and key in OPTIONS else f"recipe key {key!r}"
        message = _WORDS.get(item["type"], item["msg"].replace("Input should be", "expected"))
        if isinstance(cause, _BooleanError):
            message = "expected neither yes nor no"
        lines.append(f"{where}: {message}, got {value!r}")
    return lines


def _nearest(key: str) -> str:
    keys = known_keys()
    sections = sorted({name.rpartition(".")[0] for name in keys if "." in name})
    leaf = key.rpartition(".")[2]
    same = [name for name in keys if name.rpartition(".")[2] == leaf]
    near = same or difflib.get_close_matches(key, [*keys, *sections], n=1, cutoff=0.6)
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in keys}
        near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    if near:
        return f"did you mean {near[0]!r}?"
    return "known keys and sections: " + ", ".join([name for name in keys if "." not in name] + sections)
