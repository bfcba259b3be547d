"""What can be refused as soon as the model is known, before hours of calibration."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from calib.timestep_table import PER_STEP
from dmqexport.errors import RecipeError
from dmqexport.models.loading import LoadedModel
from dmqexport.quant_types import MAX_BITS, BitWidths
from dmqexport.recipe import Recipe


def check_recipe(recipe: Recipe, model: LoadedModel) -> None:
    """Raise RecipeError for steps, rows and layer patterns that this model does not have."""
    total = model.num_train_timesteps
    grouped = recipe.calibration.row_assignment != PER_STEP
    for option, value in (
        ("--steps (sampling.steps)", recipe.sampling.steps),
        (
            "--rows (calibration.rows)",
            recipe.calibration.rows if grouped else None,
        ),
    ):
        if value is not None and value > total:
            raise RecipeError(f"{option} is {value}, expected 1 to {total}, the training timesteps of {model.name}")
    quantization = recipe.quantization
    names = [name for name, part in model.denoiser.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    for key, patterns in (
        ("boundary", quantization.boundary or ()),
        ("overrides", tuple(quantization.overrides)),
        ("keep_float", quantization.keep_float),
        ("remainder", quantization.remainder or ()),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise RecipeError(
                    f"quantization.{key}: {pattern!r} matches no layer of {model.name}",
                    hint=f"layers are named like {', '.join(names[:3])}; patterns are shell globs over whole names",
                )
    boundary = model.family.boundary if quantization.boundary is None else quantization.boundary
    eight = [name for name in names if _may_have_8_bits(recipe, boundary, name)]
    for pattern in quantization.remainder or ():
        if not any(fnmatchcase(name, pattern) for name in eight):
            raise no_remainder(pattern)
    if recipe.calibration.prompts is not None and not model.default_prompts:
        raise RecipeError(
            f"--calib-prompts (calibration.prompts) is given, but {model.name} has no text encoder",
            hint="leave the prompts out",
        )


def _may_have_8_bits(recipe: Recipe, boundary: Sequence[str], name: str) -> bool:
    """Whether a layer's activation may get 8 bits, as far as the recipe alone can tell."""
    allocation = recipe.allocation
    found = recipe.widths.activation == MAX_BITS or (allocation.allocates and MAX_BITS in allocation.activation_bits)
    found = recipe.widths.activation is not None and (found or any(fnmatchcase(name, pattern) for pattern in boundary))
    for pattern, text in recipe.quantization.overrides.items():
        if fnmatchcase(name, pattern):
            found = BitWidths.parse(text).activation == MAX_BITS
    return found


def no_remainder(pattern: str) -> RecipeError:
    """The refusal of a pattern of quantization.remainder that means nothing."""
    return RecipeError(
        f"quantization.remainder: {pattern!r} matches no layer with 8-bit activations",
        hint="quantization.overrides gives layers 8 bits, for example {conv_in: w4a8}",
    )
