"""The training sections of a recipe: nothing is trained unless a stage is given iterations."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dmqexport.byte_size import parse_bytes
from dmqexport.errors import RecipeError
from dmqexport.recipe_sections import Section, size_named


class RatesRecipe(Section):
    """Learning rates of Adam, which Muon's are made of, each with a cosine to zero; relative to what they move."""

    weights: float = Field(default=2.5e-3, ge=0, description="of float weights, times the layer's mean 4-bit scale")
    rounding: float = Field(default=1e-2, ge=0, description="of rounding variables")
    adapter: float = Field(default=5e-3, ge=0, description="of adapters, times the layer's mean 4-bit scale")
    weight_scales: float = Field(default=5e-4, ge=0, description="of weight scales, relative")
    scales: float = Field(default=2e-3, ge=0, description="of activation scales, relative")
    zero_points: float = Field(default=6e-3, ge=0, description="of activation zero_points, in codes")
    biases: float = Field(default=2e-4, ge=0, description="of biases")


class BlockTrainingRecipe(Section):
    """Block-wise distillation (DilateQuant): each block learns the float block's output behind quantized blocks."""

    iterations: int = Field(default=0, ge=0, description="a block; 0 leaves the stage out")
    batch_size: int = Field(default=32, ge=1)
    entries: int = Field(default=2048, ge=1, description="trajectory points that blocks are trained on")
    held_out: int = Field(default=256, ge=1, description="points that judge whether a block got better")
    mix_until: float = Field(default=0.5, ge=0, le=1, description="share of the iterations that mix in float inputs")
    weights: Literal["none", "full", "rounding", "adapter"] = Field(
        default="full", description="what moves in a weight"
    )
    rates: RatesRecipe = RatesRecipe()


class NetworkTrainingRecipe(Section):
    """The whole denoiser distilled along float trajectories (LSQ with full weights, EfficientDM with adapters)."""

    iterations: int = Field(default=0, ge=0, description="0 leaves the stage out")
    batch_size: int = Field(default=32, ge=1, description="trajectory points, guidance halves counted")
    weights: Literal["none", "full", "rounding", "adapter"] = Field(
        default="full", description="what moves in a weight"
    )
    rank: int = Field(default=32, ge=1, description="of adapters, those of blocks too")
    layers: tuple[str, ...] = Field(
        default=("*",),
        description="patterns of the layers whose weights and biases are trained; activation tables all are",
    )
    guided_share: float = Field(
        default=0.9, ge=0, le=1, description="how much the guided combination counts against its halves"
    )
    step_weights: Literal["equal", "measured"] = Field(
        default="measured",
        description="measured: each sampling step is drawn, and counts, by what its error does to the picture",
    )
    coherence: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how much errors that repeat over the steps of one picture count as their sum; above 0 steps are "
        "drawn alike and whole trajectories kept",
    )
    guidance_length: float = Field(
        default=10.0,
        ge=0,
        description="weight of a penalty that keeps conditional minus unconditional as long as the float model's, on "
        "average: least squares alone shortens it",
    )
    rates: RatesRecipe = RatesRecipe()


class SamplerTrainingRecipe(Section):
    """Training through the sampler: whole trajectories are drawn, and what counts is where they end."""

    iterations: int = Field(default=0, ge=0, description="0 leaves the stage out")
    batch_size: int = Field(default=4, ge=1, description="trajectories")
    held_out: int = Field(
        default=32,
        ge=1,
        description="trajectories that judge; that of nine states, the untrained one among them, which draws them "
        "best is kept",
    )
    weights: Literal["none", "full", "rounding", "adapter"] = Field(
        default="full", description="what moves in a weight"
    )
    rank: int = Field(default=32, ge=1, description="of adapters")
    optimizer: Literal["adam", "muon"] = Field(
        default="muon", description="of float weights; muon: every update of a weight matrix is orthogonalized"
    )
    recompute: bool = Field(
        default=False, description="keep one call's activations instead of all steps', for a third more time"
    )
    rates: RatesRecipe = RatesRecipe()


class TrainingRecipe(Section):
    """What is trained after calibration; everything trained comes out as codes, tables and biases."""

    trajectories: int = Field(
        default=256, ge=1, description="float trajectories to train on; of more than 512, only some calls are kept"
    )
    activations: bool = Field(default=True, description="train the activation tables")
    weight_scales: bool = True
    biases: bool = True
    max_ram: Annotated[str | None, size_named("'training.max_ram'")] = Field(
        default=None, description="of cached block inputs, e.g. 2GiB; the rest goes to disk"
    )
    blocks: BlockTrainingRecipe = BlockTrainingRecipe()
    network: NetworkTrainingRecipe = NetworkTrainingRecipe()
    sampler: SamplerTrainingRecipe = SamplerTrainingRecipe()

    @model_validator(mode="after")
    def _leaves_some_to_train_on(self) -> Self:
        if self.sampler.iterations and self.sampler.held_out >= self.trajectories:
            raise RecipeError(
                f"training.sampler.held_out {self.sampler.held_out} leaves nothing of training.trajectories "
                f"{self.trajectories} to train on",
                hint="raise training.trajectories, or lower training.sampler.held_out",
            )
        return self

    @property
    def max_ram_bytes(self) -> int | None:
        """`max_ram` in bytes."""
        return None if self.max_ram is None else parse_bytes(self.max_ram)

    @property
    def trains(self) -> bool:
        """Whether any stage has iterations."""
        return self.blocks.iterations > 0 or self.network.iterations > 0 or self.sampler.iterations > 0
