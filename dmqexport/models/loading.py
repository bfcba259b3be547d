"""One call from what the user wrote to a model that can be sampled, quantized and exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.assemble import assemble
from dmqexport.models.family import Family, family_of
from dmqexport.models.layout import Layout, read_layout
from dmqexport.models.locate import Located, locate
from dmqexport.models.presets import Preset, emoji_prompts, text_prompts
from dmqexport.models.quiet import quiet
from dmqexport.models.weight_files import digest

_CLIP_TOKENS: Final = 77
_TEXT_STEPS: Final = 50
_TEXT_GUIDANCE: Final = 7.5
_DDIM_STEPS: Final = 100


@dataclass(frozen=True)
class LoadedModel:
    """A float model, ready to sample.

    source: what the user wrote. denoiser: float32, eval, without gradients. tokens: length of encoder_hidden_states,
    None without text. fingerprint: sha256 of the configurations and weights, wherever they lie, and of the scheduler's
    class, which may be swapped. random_embeddings: there is no text encoder and seeded noise stands in for prompts.
    """

    name: str
    source: str
    folder: Path
    family: Family
    denoiser: nn.Module
    pipeline: Any
    tokens: int | None
    num_train_timesteps: int
    fingerprint: str
    default_prompts: tuple[str, ...]
    default_guidance: float
    default_steps: int
    preset: Preset | None
    random_embeddings: bool = False

    def example_inputs(self, batch: int = 2) -> dict[str, Tensor]:
        """Seeded random inputs of the denoiser, the first dimension `batch`; raises ModelError if unsupported."""
        return self.family.example_inputs(self.denoiser, batch, self.tokens)


def load_model(
    model: str,
    *,
    scheduler: str | None = None,
    revision: str | None = None,
    embeddings: Literal["random"] | None = None,
) -> LoadedModel:
    """Load `model`: a preset, a hub id `org/name`, a diffusers folder, or the folder of a bare UNet.

    scheduler: short name that replaces the model's own. revision: of a hub model. embeddings="random": let a
    conditional UNet without text encoder be driven by seeded unit-normal vectors. Only hub models use the network.

    Raises ModelError for a model that cannot be found, read or handled, ResourceError for disk, memory and
    permissions, BackendMissingError for a missing library. Writes nothing to the terminal.
    """
    if embeddings not in (None, "random"):
        raise ModelError(f"embeddings={embeddings!r} is not known", hint='use embeddings="random" or leave it out')
    located = locate(model, revision)
    layout = read_layout(located.folder)
    family = family_of(layout.components["unet"].class_name)
    conditional = "encoder_hidden_states" in family.input_names
    if conditional and layout.pipeline is None and embeddings is None:
        raise _no_text_encoder(layout)
    swap = scheduler or (located.preset.scheduler if located.preset is not None else None)
    with quiet():
        pipeline = assemble(layout, swap)
    pipeline.set_progress_bar_config(disable=True)
    random_embeddings = conditional and layout.pipeline is None
    steps, guidance = _defaults(located, pipeline, text=conditional and not random_embeddings)
    loaded = LoadedModel(
        name=located.name,
        source=model,
        folder=located.folder,
        family=family,
        denoiser=pipeline.unet,
        pipeline=pipeline,
        tokens=_tokens(pipeline) if conditional else None,
        num_train_timesteps=int(pipeline.scheduler.config.num_train_timesteps),
        # The scheduler decides what calibration sees, so that another one makes another model.
        fingerprint=digest(layout.files(), type(pipeline.scheduler).__name__),
        default_prompts=_prompts(located) if conditional and not random_embeddings else (),
        default_guidance=guidance,
        default_steps=steps,
        preset=located.preset,
        random_embeddings=random_embeddings,
    )
    loaded.example_inputs(1)  # an unsupported variant is refused here, not after an hour of calibration
    return loaded


def pipeline_from_folder(folder: Path, replacements: Mapping[str, Any]) -> Any:
    """The diffusers pipeline in `folder`, with `replacements` (component name → object) in place of stored components.

    A replaced component needs no weights on disk; this is how a bundle becomes a pipeline. No network. Raises
    ModelError when the folder is no supported pipeline, ResourceError and BackendMissingError as `load_model` does.
    """
    layout = read_layout(folder, frozenset(replacements))
    with quiet():
        pipeline = assemble(layout, None, replacements)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _no_text_encoder(layout: Layout) -> ModelError:
    parent = layout.folder.resolve().parent
    whole = f"give the pipeline's folder {layout.folder.parent}; " if (parent / "model_index.json").is_file() else ""
    return ModelError(
        f"{layout.folder} is a conditional denoiser without a text encoder, so it cannot be prompted",
        hint=f'{whole}give a whole pipeline folder (model_index.json), or pass embeddings="random" to sample with '
        "seeded random vectors, which calibrates worse than real prompts",
    )


def _tokens(pipeline: Any) -> int:
    """Length of encoder_hidden_states; a bare denoiser does not know it and gets CLIP's."""
    if pipeline.text_encoder is None:
        return _CLIP_TOKENS
    # Some tokenizers state an absurd maximum (1e30) when it was never set.
    return int(min(pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings))


def _prompts(located: Located) -> tuple[str, ...]:
    return emoji_prompts() if located.preset is not None and located.preset.name == "emoji" else text_prompts()


def _defaults(located: Located, pipeline: Any, *, text: bool) -> tuple[int, float]:
    """(steps, guidance), never more steps than the scheduler has."""
    most = int(pipeline.scheduler.config.num_train_timesteps)
    if located.preset is not None:
        return min(located.preset.steps, most), located.preset.guidance
    if text:
        return min(_TEXT_STEPS, most), _TEXT_GUIDANCE
    # The ancestral sampler needs every training step; the others were made to need fewer.
    ancestral = type(pipeline.scheduler).__name__ == "DDPMScheduler"
    return (most if ancestral else min(_DDIM_STEPS, most)), 1.0
