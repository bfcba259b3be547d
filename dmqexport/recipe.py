"""The recipe: every choice of a build, typed, frozen, and written beside the result as YAML."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from dmqexport import recipes
from dmqexport.byte_size import parse_bytes
from dmqexport.errors import RecipeError
from dmqexport.quant_types import MAX_BITS, BitWidths
from dmqexport.recipe_allocation import AllocationRecipe
from dmqexport.recipe_precision import check_precision
from dmqexport.recipe_sections import (
    BITS_HINT,
    BooleanError,
    CalibrationRecipe,
    GatesRecipe,
    LoweringRecipe,
    QuantizationRecipe,
    SamplingRecipe,
    ScalingRecipe,
    Section,
    ValidationRecipe,
    size_named,
)
from dmqexport.recipe_training import TrainingRecipe
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
    "string_pattern_mismatch": "expected auto, cpu, cuda or cuda:N",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list, such as [conv_in, conv_out]",
    "dict_type": "expected keys and values, such as {conv_in: w8a8}",
    "model_type": "expected a section of keys",
}


#: Options that are shorthands of recipe keys; errors name what the user typed.
OPTIONS = {
    "model": "--model",
    "revision": "--revision",
    "variant": "--variant",
    "lora": "--lora",
    "weights": "--weights",
    "bits": "--bits",
    "target": "--target",
    "seed": "--seed",
    "sampling.steps": "--steps",
    "sampling.scheduler": "--scheduler",
    "calibration.prompts": "--calib-prompts",
    "calibration.size": "--calib-size",
    "calibration.statistics": "--random-statistics",
    "calibration.device": "--device",
    "calibration.dtype": "--dtype",
    "max_ram": "--max-ram",
    "max_disk": "--max-disk",
    "calibration.rows": "--rows",
    "quantization.attention_bits": "--attention-bits",
    "allocation.mixed": "--mixed",
    "allocation.budget": "--budget",
    "allocation.pareto": "--pareto",
    "lowering.precision": "--precision",
}


class Recipe(Section):
    """A build, fully resolved."""

    schema_version: Literal[1] = 1
    model: str
    revision: str | None = None
    variant: Literal["fp16", "bf16"] | None = Field(default=None, description="precision of the weights to download")
    lora: tuple[str, ...] = Field(default=(), description="adapters to fuse before quantization, FILE[:scale] each")
    weights: Literal["stored", "random"] = Field(
        default="stored", description="random: the architecture at full size with seeded random weights"
    )
    bits: str = "w8a8"
    target: Target = Target.ORT_CPU
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_ram: Annotated[str | None, size_named("'max_ram' (--max-ram)")] = Field(
        default=None, description="resident memory, e.g. 14GiB; a build keeps to it, or does not start"
    )
    max_disk: Annotated[str | None, size_named("'max_disk' (--max-disk)")] = Field(
        default=None, description="of work folder and bundle; a build that would need more does not start"
    )
    sampling: SamplingRecipe = SamplingRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    quantization: QuantizationRecipe = QuantizationRecipe()
    scaling: ScalingRecipe = ScalingRecipe()
    allocation: AllocationRecipe = AllocationRecipe()
    training: TrainingRecipe = TrainingRecipe()
    validation: ValidationRecipe = ValidationRecipe()
    lowering: LoweringRecipe = LoweringRecipe()

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: str) -> str:
        try:
            return str(BitWidths.parse(value))
        except RecipeError as error:
            where = "" if repr(value) in error.message else f"bits {value!r}: "
            raise RecipeError(where + error.message, hint=error.hint or BITS_HINT) from error

    @property
    def max_ram_bytes(self) -> int | None:
        """`max_ram` in bytes."""
        return None if self.max_ram is None else parse_bytes(self.max_ram)

    @property
    def max_disk_bytes(self) -> int | None:
        """`max_disk` in bytes."""
        return None if self.max_disk is None else parse_bytes(self.max_disk)

    @property
    def widths(self) -> BitWidths:
        """The parsed `bits`."""
        return BitWidths.parse(self.bits)

    @property
    def rotates(self) -> bool:
        """Whether hidden channels of feed-forwards are rotated."""
        chosen = self.quantization.rotation
        return chosen == "feed-forward" or (chosen == "auto" and self._narrow)

    @property
    def refits(self) -> bool:
        """Whether weights are moved to what least squares says of the quantized inputs before they are rounded."""
        chosen = self.quantization.refit
        return not self._narrow if chosen == "auto" else chosen

    @property
    def trains_on_calls(self) -> bool:
        """Whether weights are fitted to, or trained on, single calls along trajectories beside calibration's."""
        training, quantization = self.training, self.quantization
        fitted = quantization.rounding == "second-order" and quantization.refine_on == "training"
        return fitted or training.blocks.iterations > 0 or training.network.iterations > 0

    @property
    def keeps_calls(self) -> bool:
        """Whether those calls are kept of trajectories that are drawn, in float32, for where they end."""
        ends = self.allocation.allocates and self.allocation.trajectories > 0
        return self.trains_on_calls and ends and self.calibration.dtype == "float32"

    @property
    def _narrow(self) -> bool:
        """Whether `bits` asks for activations of fewer than 8 bits."""
        activation = self.widths.activation
        return activation is not None and activation < MAX_BITS

    @property
    def drawn(self) -> bool:
        """Whether statistics are drawn instead of measured."""
        return self.calibration.statistics == "drawn"

    def to_yaml(self) -> str:
        """The recipe as YAML, every key present."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(source: str | Path | None, options: Mapping[str, Any], assignments: Sequence[str]) -> Recipe:
    """Merge a recipe, command-line options (dotted key → value, None means not given) and `--set a.b=v`.

    source: a file, or the name of a recipe that ships with dmqexport. Later wins. Raises RecipeError for a name that
    is not shipped, for a file that cannot be read, a value of the wrong type, and an unknown key, naming
    the nearest one.
    """
    path = None if source is None else recipes.find(source)
    document = {} if path is None else read_mapping(path)
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
        recipe = without_measurements(Recipe.model_validate(document))
        check_precision(recipe.lowering, recipe.widths, recipe.target, recipe.allocation.mixed)
        return recipe
    except ValidationError as error:
        problems = _explain(error, given)
        where = "" if path is None or given or assignments else f"{path}: "
        raise RecipeError(
            where + "\n".join(problems), hint="--dry-run prints every key of a recipe that can be read"
        ) from error


def without_measurements(recipe: Recipe) -> Recipe:
    """The recipe itself, or where statistics are drawn, without what would have to be measured.

    Raises RecipeError for choices that mean nothing then, such as training or an allocation of bits.
    """
    if not recipe.drawn:
        return recipe
    gates = recipe.validation.gates
    for key, asked in (
        ("training", recipe.training.trains),
        ("allocation", recipe.allocation.allocates or recipe.allocation.pareto),
        ("calibration.row_assignment: cluster", recipe.calibration.row_assignment == "cluster"),
        ("validation.gates", gates not in (GatesRecipe(), GatesRecipe(eps_sqnr_db=None))),
    ):
        if asked:
            raise RecipeError(
                f"{key} needs the float model's own activations, and --random-statistics never runs it",
                hint="leave one of the two out; --recipe fast trains and allocates nothing",
            )
    return recipe.model_copy(
        update={
            "scaling": recipe.scaling.model_copy(update={"method": "none"}),
            "quantization": recipe.quantization.model_copy(
                update={
                    "range": "minmax",
                    "rounding": "nearest",
                    "row_bits": "even",
                    "refine_on": "calibration",
                    "remainder_share": 0.0,
                }
            ),
            "validation": recipe.validation.model_copy(update={"gates": GatesRecipe(eps_sqnr_db=None)}),
            "lowering": recipe.lowering.model_copy(update={"tune": "off"} if recipe.lowering.tune == "host" else {}),
        }
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file; RecipeError where there is none."""
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
        if isinstance(kind, type) and issubclass(kind, Section):
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
        if isinstance(cause, BooleanError):
            name, value = cause.args
            path.append(name)
        key = ".".join(path)
        if item["type"] in ("extra_forbidden", "invalid_key"):
            lines.append(f"unknown recipe key {key!r}; {_nearest(key)}")
            continue
        where = f"{OPTIONS[key]} (recipe key {key!r})" if key in given and key in OPTIONS else f"recipe key {key!r}"
        message = _WORDS.get(item["type"], item["msg"].replace("Input should be", "expected"))
        if isinstance(cause, BooleanError):
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
