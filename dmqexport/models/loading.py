"""One call from what the user wrote to a model that can be sampled, quantized and exported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.adapter_family import AdapterFamily
from dmqexport.models.adapter_loading import (
    AdapterPipeline,
    adapter_config,
    adapter_digest,
    is_reference,
    make_adapter,
)
from dmqexport.models.assemble import assemble
from dmqexport.models.family import Family, family_of
from dmqexport.models.layout import Layout, read_layout
from dmqexport.models.locate import Located, locate
from dmqexport.models.lora import Lora, fuse_loras
from dmqexport.models.pipeline_kinds import PipelineKind, class_count, kind_of
from dmqexport.models.presets import Preset, emoji_prompts, text_prompts
from dmqexport.models.quiet import quiet
from dmqexport.models.random_weights import (
    VERSION,
    absent_denoiser,
    drawn_weight,
    locate_architecture,
    random_denoiser,
)
from dmqexport.models.weight_files import digest, read_json

_TEXT_STEPS: Final = 50
_TEXT_GUIDANCE: Final = 7.5
_DDIM_STEPS: Final = 100
_CLASS_PROMPTS: Final = 256
_STRIDE: Final = 389  # a prime, so that neighbouring prompts are far apart


@dataclass(frozen=True)
class LoadedModel:
    """A float model, ready to sample.

    source: what the user wrote. denoiser: float32, eval, without gradients. tokens: length of encoder_hidden_states,
    None without text. fingerprint: sha256 of the configurations and weights, wherever they lie, and of the scheduler's
    class, which may be swapped. random_embeddings: there is no text encoder and seeded noise stands in for prompts.
    size: (height, width) of the latents where it was chosen. loras: what was fused into the weights; part of the
    fingerprint. random_weights: the architecture is the model's, its weights are drawn; large ones may then be absent
    (on the meta device), and `weight` makes them.
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
    size: tuple[int, int] | None = None
    loras: tuple[Lora, ...] = ()
    random_weights: bool = False
    config: Mapping[str, Any] | None = None

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """What the bundle says of the denoiser: its diffusers config without its origin, or the adapter's."""
        config: Any = self.denoiser.config if self.config is None else self.config
        return {key: value for key, value in dict(config).items() if key != "_name_or_path"}

    @property
    def kind(self) -> PipelineKind | None:
        """What the pipeline is called with; None for a denoiser alone."""
        return kind_of(type(self.pipeline).__name__)

    @property
    def num_timesteps(self) -> int:
        """Length of a timestep table: the training timesteps, and the end point of continuous time."""
        if self.family.returns_tensor:
            return self.num_train_timesteps  # an adapter counts its keys itself
        return self.num_train_timesteps + int(self.family.float_timestep)

    def weight(self, name: str) -> Tensor:
        """Parameter `name` of the denoiser, float32; drawn anew where it is absent."""
        parameter = self.denoiser.get_parameter(name).detach()
        return drawn_weight(self.denoiser, name) if parameter.is_meta else parameter

    def example_inputs(self, batch: int = 2) -> dict[str, Tensor]:
        """Seeded random inputs of the denoiser, the first dimension `batch`."""
        return self.family.example_inputs(batch, self.tokens)


def load_model(
    model: str,
    *,
    scheduler: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    embeddings: Literal["random"] | None = None,
    size: tuple[int, int] | None = None,
    loras: Sequence[str] = (),
    weights: Literal["stored", "random"] = "stored",
    absent: bool = False,
) -> LoadedModel:
    """Load `model`: a preset, a hub id `org/name`, a diffusers folder, the folder of a bare denoiser, or an adapter's
    factory `package.module:factory`, whose code is run.

    scheduler: short name that replaces the model's own. revision: of a hub model. variant: "fp16" or "bf16" where its
    weights come in several precisions; everything is computed in float32. embeddings="random": let a
    conditional denoiser without text encoder be driven by seeded unit-normal vectors. size: (height, width) of the
    latents, None for the model's own. loras: "FILE[:scale]" each, fused in order. weights="random": draw the denoiser's
    weights instead of reading them; `model` is then a preset or the folder of a denoiser's config, conditions are
    seeded vectors, and nothing else is needed. absent: leave large ones of those out of memory; such a model is
    exported and quantized, not run. Only hub models use the network.

    Raises RecipeError for the scale of an adapter, ModelError for a model or adapter that cannot be found, read or
    handled, ResourceError for disk, memory and permissions, BackendMissingError for a missing library. Writes nothing
    to the terminal.
    """
    if is_reference(model):
        return _adapted(model, size)
    if embeddings not in (None, "random"):
        raise ModelError(f"embeddings={embeddings!r} is not known", hint='use embeddings="random" or leave it out')
    random = weights == "random"
    located = locate_architecture(model) if random else locate(model, revision, variant)
    layout = read_layout(located.folder, frozenset({"weights"}) if random else frozenset(), variant)
    component = layout.components[layout.denoiser]
    config = read_json(component.folder / "config.json")
    family = family_of(component.class_name, config, size)
    random_embeddings = bool(family.embeddings) and layout.kind is None
    if random_embeddings and embeddings is None and not random:
        raise _no_text_encoder(layout)
    swap = scheduler or (located.preset.scheduler if located.preset is not None else None)
    with quiet():
        drawn = {layout.denoiser: (absent_denoiser if absent else random_denoiser)(config)} if random else None
        pipeline = assemble(layout, swap, drawn, size=size)
        fused = fuse_loras(pipeline, loras)
    words = [VERSION] if random else []
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, layout.denoiser)
    steps, guidance = _defaults(located, pipeline, text=layout.kind is not None and layout.kind.conditions == "text")
    return LoadedModel(
        name=located.name,
        source=model,
        folder=located.folder,
        family=family,
        denoiser=denoiser,
        pipeline=pipeline,
        tokens=_tokens(layout, pipeline, family),
        num_train_timesteps=int(pipeline.scheduler.config.num_train_timesteps),
        # The scheduler decides what calibration sees, so that another one makes another model.
        fingerprint=digest(layout.files(), type(pipeline.scheduler).__name__, *words, *(lora.word for lora in fused)),
        default_prompts=_prompts(located, layout, pipeline, family),
        default_guidance=guidance,
        default_steps=steps,
        preset=located.preset,
        random_embeddings=random_embeddings,
        size=size,
        loras=fused,
        random_weights=random,
    )


def _adapted(reference: str, size: tuple[int, int] | None) -> LoadedModel:
    """The model of an adapter; sampler, prompts and weights are its own affair."""
    adapter = make_adapter(reference)
    config = adapter_config(adapter)
    family = AdapterFamily(config, size)
    denoiser = adapter.module.float().eval().requires_grad_(requires_grad=False)
    return LoadedModel(
        name=reference.rpartition(":")[2],
        source=reference,
        folder=Path.cwd(),
        family=family,
        denoiser=denoiser,
        pipeline=AdapterPipeline(adapter, family),
        tokens=None,
        num_train_timesteps=adapter.num_timesteps,
        fingerprint=adapter_digest(adapter),
        default_prompts=(),
        default_guidance=adapter.guidance,
        default_steps=adapter.steps,
        preset=None,
        config=config,
    )


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


def _tokens(layout: Layout, pipeline: Any, family: Family) -> int | None:
    """Length of encoder_hidden_states; a bare denoiser does not know it and gets what its family usually has."""
    if layout.kind is not None:
        return layout.kind.text_length(pipeline)
    if "encoder_hidden_states" not in family.input_names:
        return None
    return int(family.example_inputs(1)["encoder_hidden_states"].shape[1])


def _prompts(located: Located, layout: Layout, pipeline: Any, family: Family) -> tuple[str, ...]:
    """Texts, or class numbers in words, spread over all classes; nothing where nothing can be asked for."""
    count = family.null_class
    if "class_embedder" in layout.components:
        count = class_count(pipeline)
    if count is not None:
        return tuple(str(index * _STRIDE % count) for index in range(min(count, _CLASS_PROMPTS)))
    if layout.kind is None or layout.kind.conditions != "text":
        return ()
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
