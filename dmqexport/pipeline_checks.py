"""What can be refused as soon as the model is known, before hours of calibration."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from calib.bit_allocation import named_widths
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
    eight = _maybe_8_bits(recipe, names, model.family.boundary)
    for pattern in quantization.remainder or ():
        if not any(fnmatchcase(name, pattern) for name in eight):
            raise no_remainder(pattern)
    if recipe.calibration.prompts is not None and not model.default_prompts:
        raise RecipeError(
            f"--calib-prompts (calibration.prompts) is given, but {model.name} has no text encoder",
            hint="leave the prompts out",
        )


def _maybe_8_bits(recipe: Recipe, names: Sequence[str], boundary: Sequence[str]) -> list[str]:
    """Layers whose activations may get 8 bits, as far as the recipe alone can tell."""
    quantization, allocation = recipe.quantization, recipe.allocation
    boundary = boundary if quantization.boundary is None else quantization.boundary
    overrides = {pattern: BitWidths.parse(text) for pattern, text in quantization.overrides.items()}
    chosen = named_widths(names, recipe.widths, boundary, overrides, quantization.keep_float)
    free = allocation.allocates and MAX_BITS in allocation.activation_bits
    return [
        name
        for name, item in chosen.items()
        if item.widths is not None
        and item.widths.activation is not None
        and (item.widths.activation == MAX_BITS or (free and not item.reason))
    ]


def no_remainder(pattern: str) -> RecipeError:
    """The refusal of a pattern of quantization.remainder that means nothing."""
    return RecipeError(
        f"quantization.remainder: {pattern!r} matches no layer with 8-bit activations",
        hint="quantization.overrides gives layers 8 bits, for example {conv_in: w4a8}",
    )
