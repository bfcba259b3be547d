"""The sections of a recipe, one class each: every key with its type, default and one line of manual."""

from typing import Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from dmqexport.byte_size import parse_bytes
from dmqexport.errors import RecipeError
from dmqexport.quant_types import BitWidths

BITS_HINT = "for example w4a4, w8a8 or w4a16 (16: float activations)"


class BooleanError(ValueError):
    """(key, value) of a yes or no where something else belongs."""


class Section(BaseModel):
    """A group of keys: frozen, without unknown keys, NaN or infinity."""

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
            if value is None and isinstance(kind, type) and issubclass(kind, Section):
                continue
            named = any(option is value for option in get_args(kind))
            if isinstance(value, bool) and not named and kind not in (bool, None):  # None: an unknown key, told as such
                raise BooleanError(name, value)
            kept[name] = value
        return kept


def size_named(key: str) -> AfterValidator:
    """Accepts sizes as people write them, such as 2GiB, and null; a RecipeError names `key`."""

    def check(value: str | None) -> str | None:
        if value is not None:
            try:
                parse_bytes(value)
            except RecipeError as error:
                raise RecipeError(f"recipe key {key}: {error.message}", hint=error.hint) from error
        return value

    return AfterValidator(check)


class SamplingRecipe(Section):
    """How trajectories and pictures are drawn; null means the model's own default."""

    scheduler: str | None = Field(default=None, description="short scheduler name, e.g. ddim; null keeps the model's")
    steps: int | None = Field(default=None, ge=1, le=1000, description="denoising steps")
    guidance: float | None = Field(default=None, ge=0, description="classifier-free guidance scale")
    latent_size: tuple[int, int] | None = Field(
        default=None, description="height and width of the latents; null: what the model was trained on"
    )


class CalibrationRecipe(Section):
    """What the activation ranges are measured on."""

    statistics: Literal["measured", "drawn"] = Field(
        default="measured",
        description="drawn: from the seed, without running the model; proves size and structure, never accuracy",
    )
    prompts: str | None = Field(default=None, description="text file, one prompt a line; null: the model's own")
    size: int = Field(default=256, ge=1, description="float trajectories; of more than 64, only some calls are kept")
    rows: int = Field(default=10, ge=1, description="rows of the timestep table")
    row_assignment: Literal["equal-groups", "per-step", "cluster"] = Field(
        default="equal-groups", description="cluster: steps whose activation ranges are alike, at most `rows` of them"
    )
    samples_per_row: int = Field(default=8192, ge=64, description="activation values kept per tensor and row")
    batch_size: int = Field(default=32, ge=1)
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="where the float model runs: auto (a CUDA device if there is one), cpu, cuda or cuda:N",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="what trajectories are computed in, by autocast; all that decides integers stays float32",
    )
    embeddings: Literal["random"] | None = Field(default=None, description="for a UNet without text encoder")


class QuantizationRecipe(Section):
    """Which layers get how many bits. Patterns are shell globs over fully qualified module names."""

    boundary: tuple[str, ...] | None = Field(default=None, description="layers at 8 bit; null takes the family's list")
    overrides: dict[str, str] = Field(default_factory=dict, description="pattern → wNaM; the last match wins")
    keep_float: tuple[str, ...] = ()
    attention_bits: int | None = Field(default=None, ge=2, le=8, description="null leaves attention matmuls in float")
    split_concat: bool = True
    remainder: tuple[str, ...] | None = Field(
        default=None,
        description="layers whose 8-bit activations are followed by what their rounding leaves over, in 8 bits more: "
        "two int8 products instead of one, 16 bits of precision; null: those that read the sample",
    )
    remainder_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="w8a8: share of the multiply-accumulates that may be done twice, for remainders of the activations "
        "whose rounding costs the output most (measured as allocation.metric says)",
    )
    range: Literal["mse", "unbiased", "minmax"] = Field(
        default="unbiased",
        description="mse: ranges of least squared error; unbiased: somewhat wider, and activations of up to 7 bits get "
        "back the length that clipping and rounding take; minmax: all that was observed, as a baseline",
    )
    rounding: Literal["nearest", "second-order"] = Field(
        default="second-order", description="second-order: refit to quantized inputs, then compensate rounding (GPTQ)"
    )
    refine_on: Literal["calibration", "training"] = Field(
        default="calibration", description="trajectories that second-order rounding fits: the more captions, the better"
    )
    refine_entries: int = Field(default=2048, ge=1, description="how many of their points it sees")
    rotation: Literal["none", "feed-forward", "auto"] = Field(
        default="auto",
        description="feed-forward: hidden channels are multiplied with a Hadamard matrix before they are quantized; "
        "auto: where --bits asks for activations of fewer than 8 bits",
    )
    refit: Literal[True, False, "auto"] = Field(
        default="auto",
        description="move weights to what least squares says of the quantized inputs, before they are rounded: less "
        "error of single calls, but shorter answers at every step, which shows where trajectories end; auto: where "
        "--bits asks for activations of 8 bits, whose rounding shortens nothing",
    )
    row_bits: Literal["even", "measured"] = Field(
        default="even",
        description="measured: timestep rows whose error shows in the picture get more activation bits, others fewer",
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
                    hint=error.hint or BITS_HINT,
                ) from error
        return value


class ScalingRecipe(Section):
    """Per-channel factors between an activation and its weights: same float function, narrower activations."""

    method: Literal[
        "none",
        "dilation",
        "dilation-symmetric",
        "capped-dilation",
        "smoothquant",
        "awq",
        "omniquant",
        "dgq",
        "os+",
        "auto",
    ] = Field(default="auto", description="auto: the best of several for every tensor, by its readers' output error")
    merge: Literal["never", "when-better", "always"] = Field(
        default="when-better", description="factors that do not fold into the layer before enter the timestep table"
    )
    strength: float = Field(default=0.5, ge=0, le=1, description="smoothquant, awq: share of the activation's range")
    cap: float = Field(default=2.0, ge=1, le=64, description="capped-dilation: largest factor")


class GatesRecipe(Section):
    """Thresholds; the build ends with exit code 3 (accuracy) or 4 (performance) when one fails. null: not gated."""

    eps_sqnr_db: float | None = Field(default=6.0, description="least SQNR of the predicted noise against float")
    image_psnr_db: float | None = None
    image_ssim: float | None = None
    retrieval_drop: float | None = Field(default=None, ge=0, le=1, description="largest loss of retrieval accuracy")
    latency_ratio: float | None = Field(default=None, gt=0, description="largest quantized / float32 latency")


class ValidationRecipe(Section):
    """How the deployed graph is judged."""

    images: int | None = Field(
        default=None, ge=1, description="pictures compared with the float model's, same seeds; null: 16, or fewer"
    )
    retrieval: int = Field(default=200, ge=0, le=1355, description="captions of the retrieval metric (bundled model)")
    frechet: bool = Field(default=True, description="Fréchet distances, over the pictures of the retrieval metric")
    entries: int | None = Field(
        default=None, ge=1, description="trajectory points whose predicted noise is compared; null: 400, or fewer"
    )
    layer_entries: int | None = Field(
        default=None, ge=1, description="trajectory points whose layer outputs are compared; null: 40, or fewer"
    )
    batch_size: int = Field(default=16, ge=1, description="at most; large models take smaller ones")
    latency_batch: int = Field(default=8, ge=1)
    latency_runs: int = Field(default=20, ge=3)
    gates: GatesRecipe = GatesRecipe()


class LoweringRecipe(Section):
    """Choices of the target graphs."""

    cpu_isa: Literal["auto", "portable", "vnni"] = Field(
        default="auto", description="auto: signed weights if this CPU has VNNI; portable: exact on every x86 CPU"
    )
    tune: str = Field(
        default="off",
        description="ort-cpu, which kernel multiplies each layer. off: the integer product, the same on every machine; "
        "host: what is fastest here, float on the codes included, measured once; or a file of such timings",
    )
    weight_only: Literal["expanded", "packed"] = Field(
        default="expanded",
        description="ort-cpu, layers with float activations: weights expanded when the session is created, which is "
        "fastest, or kept packed in memory by MatMulNBits",
    )
    precision: Literal["int8", "int4-weight-only", "fp8", "nvfp4", "best"] = Field(
        default="int8",
        description="TensorRT, what multiplies quantized layers. int8: the plan's codes; weights of layers with float "
        "activations stay INT4. int4-weight-only: refuse plans with other layers. fp8: FP8 products where the codes "
        "are E4M3 numbers. best: int8, and half precision for the rest",
    )
    compute_type: Literal["fp32", "fp16", "bf16"] | None = Field(
        default=None, description="TensorRT, what the rest computes in; null: fp32, or fp16 with precision best"
    )
    max_batch: int = Field(default=8, ge=1, description="largest batch of TensorRT profiles, and of OpenVINO's proof")
    opt_batch: int = Field(default=2, ge=1, description="batch that TensorRT tunes for, at most max_batch")
    timing_cache: str | None = Field(default=None, description="TensorRT: file of measured kernels, read and written")
    hardware: Literal["none", "ampere-plus", "same-compute-capability"] = Field(
        default="none", description="TensorRT: other GPUs that the engine must run on"
    )
    version_compatible: bool = Field(default=False, description="TensorRT: the engine must run on later versions too")
    refit: bool = Field(default=False, description="TensorRT: the engine's weights can be replaced later")
    openvino_device: Literal["CPU", "GPU", "NPU"] = "CPU"

    @property
    def float_type(self) -> str:
        """What a TensorRT graph computes in where nothing is quantized."""
        return self.compute_type or ("fp16" if self.precision == "best" else "fp32")
