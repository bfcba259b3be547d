"""The diffusers pipelines that are supported: their components, how they are made and what they are called with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from dmqexport.errors import ModelError, RecipeError
from dmqexport.models.own_classes import model_class

Conditions = Literal["text", "class", "none"]


@dataclass(frozen=True)
class PipelineKind:
    """One diffusers pipeline.

    components: what its folder must hold; optional: what it may hold. denoiser: the component that is quantized.
    tokens: how long the denoiser's text is, None where the tokenizer tells. empty: constructor arguments for parts
    that are left out (safety checkers, image encoders). call: arguments of every call.
    """

    class_name: str
    components: tuple[str, ...]
    denoiser: str
    conditions: Conditions
    optional: tuple[str, ...] = ()
    tokens: int | None = None
    sized: bool = False
    empty: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def build(self, parts: dict[str, Any], scheduler: Any) -> Any:
        """The pipeline object of these parts; optional ones that are missing are None."""
        absent = dict.fromkeys(name for name in self.optional if name not in parts)
        return model_class(self.class_name)(**parts, **absent, **self.empty, scheduler=scheduler)

    def text_length(self, pipeline: Any) -> int | None:
        """Length of encoder_hidden_states, None without text."""
        if self.conditions != "text":
            return self.tokens
        if self.class_name == "StableDiffusion3Pipeline":
            # Where T5 is left out the pipeline puts as many zeros as CLIP has tokens.
            clip = int(pipeline.tokenizer_max_length)
            return clip + (256 if pipeline.text_encoder_3 is not None else clip)
        if self.tokens is not None:
            return self.tokens
        encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
        # Some tokenizers state an absurd maximum (1e30) when it was never set.
        return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))

    def arguments(
        self, pipeline: Any, texts: Sequence[str], count: int, guidance: float, size: tuple[int, int] | None
    ) -> dict[str, Any]:
        """Keyword arguments for `count` pictures; size: (height, width) of the latents where they are chosen.

        Raises RecipeError for text that names no class of a class-conditional model.
        """
        if self.conditions == "none":
            return {"batch_size": count, **self.call}
        if self.conditions == "class":
            return {"class_labels": class_labels(pipeline, texts), "guidance_scale": guidance, **self.call}
        arguments = {"prompt": list(texts), "guidance_scale": guidance, **self.call}
        if self.sized and size is not None:
            factor = int(pipeline.vae_scale_factor)
            arguments.update(height=size[0] * factor, width=size[1] * factor)
        return arguments


def class_count(pipeline: Any) -> int | None:
    """How many classes a class-conditional pipeline can be asked for; None where it does not say."""
    if hasattr(pipeline, "class_embedder"):
        return int(pipeline.class_embedder.config.num_classes) - 1  # the last one means none
    count = getattr(getattr(pipeline, "transformer", None), "config", {}).get("num_embeds_ada_norm")
    return None if count is None else int(count)


def class_labels(pipeline: Any, texts: Sequence[str]) -> list[int]:
    """Class numbers from numbers or from the names that the pipeline knows; raises RecipeError for anything else."""
    count = class_count(pipeline)
    names = {name.lower(): int(index) for name, index in (getattr(pipeline, "labels", None) or {}).items()}
    labels = []
    for text in texts:
        word = text.strip()
        if word.isdecimal():
            if count is not None and int(word) >= count:
                raise RecipeError(f"there is no class {word}", hint=f"this model has the classes 0 to {count - 1}")
            labels.append(int(word))
        elif word.lower() in names:
            labels.append(names[word.lower()])
        else:
            raise RecipeError(f"{text!r} is no class of this model", hint="give the number of a class, such as 207")
    return labels


_NO_CHECKER: Final = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_CLIP_PAIR: Final = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

KINDS: Final[dict[str, PipelineKind]] = {
    kind.class_name: kind
    for kind in (
        PipelineKind(
            "StableDiffusionPipeline",
            ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
            "unet",
            "text",
            empty=_NO_CHECKER,
        ),
        PipelineKind(
            "StableDiffusionXLPipeline",
            ("unet", "vae", *_CLIP_PAIR, "scheduler"),
            "unet",
            "text",
            sized=True,
            empty={"add_watermarker": False},
        ),
        PipelineKind(
            "StableDiffusion3Pipeline",
            ("transformer", "vae", *_CLIP_PAIR, "scheduler"),
            "transformer",
            "text",
            optional=("text_encoder_3", "tokenizer_3"),
            sized=True,
        ),
        PipelineKind(
            "FluxPipeline",
            ("transformer", "vae", *_CLIP_PAIR, "scheduler"),
            "transformer",
            "text",
            tokens=512,
            sized=True,
            call={"max_sequence_length": 512},
        ),
        PipelineKind(
            "PixArtSigmaPipeline",
            ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
            "transformer",
            "text",
            tokens=300,
            sized=True,
            call={"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 300},
        ),
        PipelineKind("DiTPipeline", ("transformer", "vae", "scheduler"), "transformer", "class"),
        PipelineKind("LdmClassPipeline", ("unet", "vqvae", "class_embedder", "scheduler"), "unet", "class", tokens=1),
        PipelineKind("LDMPipeline", ("unet", "vqvae", "scheduler"), "unet", "none"),
        PipelineKind("DDPMPipeline", ("unet", "scheduler"), "unet", "none"),
        PipelineKind("DDIMPipeline", ("unet", "scheduler"), "unet", "none"),
    )
}


def kind_of(class_name: object) -> PipelineKind | None:
    """The kind of a diffusers pipeline class, None when it is not supported."""
    return KINDS.get(class_name) if isinstance(class_name, str) else None


def check_parts(parts: dict[str, Any], kind: PipelineKind) -> None:
    """Refuse text encoders and autoencoders that do not fit the denoiser; raises ModelError."""
    config, encoder, vae = parts[kind.denoiser].config, parts.get("text_encoder"), parts.get("vae")
    width = config.get("cross_attention_dim") if kind.class_name == "StableDiffusionPipeline" else None
    if encoder is not None and width is not None and encoder.config.hidden_size != width:
        raise ModelError(
            f"the text encoder gives vectors of {encoder.config.hidden_size}, "
            f"but the denoiser expects {width}: these parts do not belong together"
        )
    packed = 4 if kind.class_name == "FluxPipeline" else 1
    if vae is not None and vae.config.latent_channels * packed != config["in_channels"]:
        raise ModelError(
            f"the autoencoder has {vae.config.latent_channels} latent channels, but the denoiser takes "
            f"{config['in_channels']}",
            hint="inpainting and depth models, whose denoiser takes extra channels, are not supported",
        )
