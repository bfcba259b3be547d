"""What a model is made of, read from its configuration alone: weights are neither downloaded nor read."""

from dataclasses import dataclass
from pathlib import Path

from dmqexport.errors import ModelError
from dmqexport.models import emoji
from dmqexport.models.adapter_loading import is_reference
from dmqexport.models.family import family_of
from dmqexport.models.footprint import Footprint, measure_footprint
from dmqexport.models.layout import Layout, read_layout
from dmqexport.models.presets import PRESETS
from dmqexport.models.quiet import quiet
from dmqexport.models.random_weights import CONFIG, architectures, build_denoiser, locate_architecture
from dmqexport.models.weight_files import read_json

_STEPS, _GUIDED = 50, 7.5


@dataclass(frozen=True)
class Architecture:
    """steps, guidance: the model's defaults. companions: bytes of the other components' weights, in float32."""

    footprint: Footprint
    steps: int
    guidance: float
    companions: int


def find_architecture(model: str, *, random: bool, size: tuple[int, int] | None) -> Architecture:
    """Count the denoiser that `model` names: a preset, or a folder. random: it is alone, without its pipeline.

    Raises ModelError for what has no configuration on this machine: hub models that no preset names, adapters.
    """
    preset = PRESETS.get(model)
    companions = 0
    if preset is not None and model in architectures():
        config = read_json(locate_architecture(model).folder / CONFIG)
    elif is_reference(model):
        raise ModelError(f"{model} is made by its own code: what it costs is known once it is loaded")
    else:
        folder = emoji.pipeline_folder() if preset is not None else Path(model).expanduser()
        if not folder.is_dir():
            raise ModelError(f"{model} is not on this machine yet: what it costs is known once it is downloaded")
        layout = read_layout(folder, frozenset({"weights"}) if random else frozenset())
        config = read_json(layout.components[layout.denoiser].folder / CONFIG)
        companions = 0 if random else _companions(layout)
    family = family_of(str(config.get("_class_name")), config, size)
    with quiet():
        footprint = measure_footprint(build_denoiser(config, "meta"), family)
    guided = bool(family.embeddings) or family.null_class is not None
    steps, guidance = (_STEPS, _GUIDED if guided else 1.0) if preset is None else (preset.steps, preset.guidance)
    return Architecture(footprint, steps, guidance, companions)


def _companions(layout: Layout) -> int:
    """Bytes of the text encoders and autoencoders in float32, from the size of their files."""
    total = 0
    for name, component in layout.components.items():
        if name != layout.denoiser and component.weights is not None:
            half = component.weights.variant in ("fp16", "bf16")
            total += sum(path.stat().st_size for path in component.weights.files) * (2 if half else 1)
    return total
