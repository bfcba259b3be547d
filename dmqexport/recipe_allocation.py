"""The recipe's section about bit allocation."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from dmqexport.byte_size import Budget
from dmqexport.errors import RecipeError
from dmqexport.quant_types import MAX_BITS, MIN_BITS, BitWidths
from dmqexport.recipe_sections import BITS_HINT, Section

Width = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
ALL_WIDTHS = tuple(range(MIN_BITS, MAX_BITS + 1))


class AllocationRecipe(Section):
    """Which layers get how many bits under a budget. Boundary layers and overrides keep theirs, and count."""

    mixed: bool = Field(default=False, description="allocate at all; `bits` are then the averages to keep")
    method: Literal["integer", "lagrangian", "mixdq", "uniform"] = Field(
        default="integer",
        description="lagrangian: DMQ's slopes; integer: the certified optimum; mixdq: integer program over weights and "
        "activations measured apart; uniform: every layer the same",
    )
    budget: str | None = Field(
        default=None,
        description="2.5MiB of stored weights, 4.5bits of weights and activations together, or 1.2ms; the activation "
        "bits of `bits` stay the activations' average beside bytes and ms; null: `bits` are two averages",
    )
    rate: Literal["auto", "nominal", "realisable"] = Field(
        default="auto",
        description="how weight bits count: nominal as in the papers, realisable in the target's containers of 4 "
        "and 8 bits; auto: averages nominal, bytes realisable",
    )
    sensitivity: Literal["sketch", "exact"] = Field(
        default="sketch", description="exact: every layer × width run through the model; sketch: a few backward passes"
    )
    metric: Literal["picture", "ssim+mse", "mse", "sqnr"] = Field(
        default="ssim+mse",
        description="distortion of the model's output; ssim+mse is (1 - SSIM) + MSE, as DMQ's; picture: squared error "
        "of the guided prediction, each step by what its error does to pictures (measured, which samples some)",
    )
    weight_bits: tuple[Width, ...] = Field(default=ALL_WIDTHS, min_length=1, description="candidate widths")
    activation_bits: tuple[Width, ...] = Field(default=ALL_WIDTHS, min_length=1, description="candidate widths")
    remainders: bool = Field(
        default=False,
        description="also offer 16 activation bits: 8 and as many for what their rounding leaves over, by two int8 "
        "products (see quantization.remainder); boundary layers may have them too; not for mixdq",
    )
    time_projections: bool = Field(
        default=False,
        description="also choose the bits of the projections of the time embedding (its last layer, and those in "
        "blocks), which otherwise have 8: all they ever read is one curve, so that second-order rounding leaves next "
        "to no error; not with a boundary of your own",
    )
    floors: dict[str, str] = Field(default_factory=dict, description="pattern → wNaM, the least; the last match wins")
    ceilings: dict[str, str] = Field(default_factory=dict, description="pattern → wNaM, the most; the last match wins")
    entries: int = Field(default=80, ge=1, description="trajectory points that distortion is averaged over")
    probes: int = Field(default=4, ge=1, description="random directions of the sketch for each of them")
    relinearize: int = Field(
        default=1, ge=0, description="rounds of rescaling curves at the solution; kept when better"
    )
    proposals: int = Field(
        default=16, ge=0, description="allocations for randomly bent curves, measured whole; the best one is kept"
    )
    trajectories: int = Field(
        default=0,
        ge=0,
        description="allocate again, by what rounding does to where so many trajectories end, with a gradient through "
        "the whole sampler: activations, each in every row (with quantization.row_bits=measured), then weights; 0: do "
        "not; not for mixdq",
    )
    pareto: bool = Field(default=False, description="also allocate at budgets around this one, for the curve")
    latency_table: str | None = Field(default=None, description="JSON, layer pattern → {w4a8: ms}, for a budget in ms")

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        if value is not None:
            Budget.parse(value)
        return value

    @field_validator("floors", "ceilings")
    @classmethod
    def _widths(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, text in value.items():
            try:
                BitWidths.parse(text)
            except RecipeError as error:
                raise RecipeError(
                    f"allocation floors and ceilings, pattern {pattern!r}: {error.message}",
                    hint=error.hint or BITS_HINT,
                ) from error
        return value

    @model_validator(mode="after")
    def _method_of_budget(self) -> Self:
        if not self.allocates and (self.budget is not None or self.pareto):
            asked = "pareto" if self.budget is None else f"budget {self.budget!r}"
            raise RecipeError(
                f"allocation.{asked} needs bits to be allocated, and the recipe asks for uniform widths",
                hint="add --mixed (allocation.mixed, with a method other than uniform), or leave it out",
            )
        return self

    @model_validator(mode="after")
    def _method_of_trajectories(self) -> Self:
        if self.trajectories and self.method == "mixdq":
            raise RecipeError(
                "allocation.trajectories: mixdq decides by errors of single calls",
                hint="use allocation.method=integer or lagrangian, or allocation.trajectories=0",
            )
        return self

    @property
    def allocates(self) -> bool:
        """Whether widths come from a budget."""
        return self.mixed and self.method != "uniform"
