"""What can be refused as soon as the model is known, before hours of calibration."""

from fnmatch import fnmatchcase

from torch import nn

from calib.timestep_table import PER_STEP
from dmqexport.errors import RecipeError
from dmqexport.models.loading import LoadedModel
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
    if recipe.calibration.prompts is not None and not model.default_prompts:
        raise RecipeError(
            f"--calib-prompts (calibration.prompts) is given, but {model.name} has no text encoder",
            hint="leave the prompts out",
        )
