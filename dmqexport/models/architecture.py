"""What a model is made of, read from its configuration alone: weights are neither downloaded nor read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmqexport.errors import ModelError
from dmqexport.models import emoji
from dmqexport.models.adapter_loading import is_reference
from dmqexport.models.family import family_of
from dmqexport.models.footprint import Footprint, count_macs, measure_footprint
from dmqexport.models.layout import Layout, read_layout
from dmqexport.models.presets import PRESETS
from dmqexport.models.quiet import quiet
from dmqexport.models.random_weights import CONFIG, architectures, build_denoiser, locate_architecture
from dmqexport.models.weight_files import read_json

_STEPS, _GUIDED = 50, 7.5
_POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Architecture:
    """steps, guidance: the model's defaults. companions: bytes of the other components' weights, in float32.

    feature_macs: multiply-accumulates that a picture's features take; 0 where there is no such metric.
    """

    footprint: Footprint
    steps: int
    guidance: float
    companions: int
    feature_macs: int = 0


def find_architecture(model: str, *, random: bool, size: tuple[int, int] | None) -> Architecture:
    """Count the denoiser that `model` names: a preset, or a folder. random: it is alone, without its pipeline.

    Raises ModelError for what has no configuration on this machine: hub models that no preset names, adapters.
    """
    preset = PRESETS.get(model)
    companions, tokens = 0, None
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
        companions, tokens = (0, None) if random else (_companions(layout), _text_length(layout))
    family = family_of(str(config.get("_class_name")), config, size)
    with quiet():
        footprint = measure_footprint(build_denoiser(config, "meta"), family, tokens)
    guided = bool(family.embeddings) or family.null_class is not None
    steps, guidance = (_STEPS, _GUIDED if guided else 1.0) if preset is None else (preset.steps, preset.guidance)
    features = _feature_macs() if preset is not None and preset.name == "emoji" else 0
    return Architecture(footprint, steps, guidance, companions, features)


def _feature_macs() -> int:
    """Of the bundled model's pictures (`picture_features`)."""
    from diffusers import AutoencoderTiny

    with torch.device("meta"), quiet():
        config = read_json(emoji.pipeline_folder() / "vae" / CONFIG)
        autoencoder: Any = AutoencoderTiny.from_config(config)
        return count_macs(autoencoder.encoder.layers[:-1], torch.empty(1, 3, 64, 64))


def _text_length(layout: Layout) -> int | None:
    """Tokens of a text, as `PipelineKind.text_length` says of the loaded pipeline; None where the family knows best."""
    if (
        layout.kind is None
        or layout.kind.tokens is not None
        or not {"tokenizer", "text_encoder"} <= {*layout.components}
    ):
        return None if layout.kind is None else layout.kind.tokens
    places = (("tokenizer", "tokenizer_config.json", "model_max_length"), ("text_encoder", CONFIG, _POSITIONS))
    found = [layout.components[part].folder / name for part, name, _ in places]
    given = [read_json(path).get(key) for path, (_, _, key) in zip(found, places, strict=True) if path.is_file()]
    return min((int(value) for value in given if isinstance(value, (int, float)) and value >= 1), default=None)


def _companions(layout: Layout) -> int:
    """Bytes of the text encoders and autoencoders in float32, from the size of their files."""
    total = 0
    for name, component in layout.components.items():
        if name != layout.denoiser and component.weights is not None:
            half = component.weights.variant in ("fp16", "bf16")
            total += sum(path.stat().st_size for path in component.weights.files) * (2 if half else 1)
    return total
