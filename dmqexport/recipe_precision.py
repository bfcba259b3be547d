"""What `--precision` can honestly give, said before anything is calibrated."""

from dmqexport.errors import RecipeError
from dmqexport.quant_types import BitWidths
from dmqexport.recipe_sections import LoweringRecipe
from dmqexport.target import Target

#: Widest codes that are all E4M3 numbers: integers up to 16.
_FP8_BITS = 4
_DEFAULT = LoweringRecipe()
#: Keys that only TensorRT's builders know.
_TENSORRT = ("precision", "compute_type", "opt_batch", "timing_cache", "hardware", "version_compatible", "refit")


def check_precision(lowering: LoweringRecipe, widths: BitWidths, target: Target, mixed: bool) -> None:
    """Raise RecipeError for a precision that the target does not have, or that would compute other codes than planned.

    widths: of the plan, averages where it is `mixed`.
    """
    if lowering.tune != _DEFAULT.tune and target is not Target.ORT_CPU:
        raise RecipeError(
            f"lowering.tune {lowering.tune!r} chooses kernels of ONNX Runtime, the target is {target.value}",
            hint=f"--target {Target.ORT_CPU.value}, or leave it out",
        )
    if target not in (Target.TRT, Target.TRT_RTX):
        other = [key for key in _TENSORRT if getattr(lowering, key) != getattr(_DEFAULT, key)]
        if other:
            option = "--precision" if other[0] == "precision" else f"lowering.{other[0]}"
            raise RecipeError(
                f"{option} {getattr(lowering, other[0])!r} is TensorRT's, the target is {target.value}",
                hint=f"--target {Target.TRT_RTX.value} or {Target.TRT.value}, or leave it out",
            )
        return
    if lowering.max_batch < lowering.opt_batch != _DEFAULT.opt_batch:
        raise RecipeError(
            f"lowering.opt_batch {lowering.opt_batch} is above lowering.max_batch {lowering.max_batch}",
            hint="an engine is tuned for a batch that it accepts",
        )
    activation = widths.activation
    if lowering.precision == "nvfp4":
        raise RecipeError(
            "--precision nvfp4: its numbers are 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a scale a block of 16; a plan's "
            "4-bit codes (5 and 7 among them) cannot be told in them, so the engine would not be what was calibrated",
            hint="--precision int8 or fp8 computes 4-bit codes as they are, int4-weight-only stores them",
        )
    if lowering.precision == "int4-weight-only" and (activation is not None or widths.weight > _FP8_BITS):
        raise RecipeError(
            f"--precision int4-weight-only: the plan is {widths}, whose layers are products of integers",
            hint="--bits w4a16 plans weights alone, and layers of 4 bits are INT4 then",
        )
    wide = activation is None or activation > _FP8_BITS or widths.weight > _FP8_BITS
    if lowering.precision == "fp8" and wide and not mixed:
        raise RecipeError(
            f"--precision fp8: E4M3 has the integers up to 16 and few above, the plan is {widths}; rounding its codes "
            "a second time would compute something else than was calibrated",
            hint="--bits w4a4, whose codes FP8 holds exactly, or --precision int8",
        )
