"""The table of presets says of each model what the rest of the package relies on."""

import json

import diffusers
import pytest
import torch

from dmqexport.models import preset_table
from dmqexport.models.convert import ldm_unet
from dmqexport.models.originals import ORIGINALS, LdmOriginal
from dmqexport.models.own_classes import model_class
from dmqexport.models.preset_table import Preset
from dmqexport.models.presets import PRESETS
from dmqexport.models.random_weights import architectures, locate_architecture
from dmqexport.models.schedulers import SCHEDULERS
from dmqexport.models.weight_files import read_json

#: every model of the DMQ, EfficientDM and DilateQuant experiments, and the families beside them.
NAMES = [
    "emoji", "sd14", "sd15", "sd21", "sdxl", "sdxl-turbo", "sd3-medium", "sd35-medium", "flux-schnell", "flux-dev",
    "pixart-sigma", "dit-xl-2-256", "ddpm-cifar10", "ddpm-celebahq-256", "ddpm-bedroom-256", "ddpm-church-256",
    "ldm-celebahq-256", "ldm-imagenet", "ldm-bedroom", "ldm-church",
]  # fmt: skip
#: classes that diffusers does not have.
OWN = {"LdmClassPipeline", "FixedHeadsUNet2DModel"}


def test_every_model_has_its_row() -> None:
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("preset", preset_table.TABLE, ids=lambda preset: preset.name)
def test_rows_are_complete(preset: Preset) -> None:
    assert preset.licence
    assert preset.note
    assert preset.steps > 0
    assert preset.scheduler in SCHEDULERS
    assert hasattr(diffusers, SCHEDULERS[preset.scheduler])
    for name in (preset.pipeline, preset.denoiser):
        assert name in OWN or hasattr(diffusers, name)
    if preset.name != "emoji":
        assert preset.hub_id or preset.checkpoint
    assert preset.conditions == "text" or preset.guidance <= 1 or preset.conditions == "class"
    assert preset.picture[0] % preset.latent[1] == 0


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals_agree_with_their_presets(name: str) -> None:
    preset, original = PRESETS[name], ORIGINALS[name]
    assert preset.checkpoint is not None
    channels = original.first_stage.latent_channels if isinstance(original, LdmOriginal) else 3
    assert preset.latent == (channels, original.size, original.size)
    classes = original.classes if isinstance(original, LdmOriginal) else None
    assert (preset.conditions == "class") == (classes is not None)
    factor = 2 ** (len(original.first_stage.multipliers) - 1) if isinstance(original, LdmOriginal) else 1
    assert preset.picture == (original.size * factor, original.size * factor)


def test_only_presets_with_checkpoints_convert() -> None:
    assert {name for name, preset in PRESETS.items() if preset.checkpoint is not None} == set(ORIGINALS)


@pytest.mark.parametrize("name", architectures())
def test_architectures_that_ship_agree_with_their_presets(name: str) -> None:
    config, preset = read_json(locate_architecture(name).folder / "config.json"), PRESETS[name]
    assert config["_class_name"] == preset.denoiser
    if preset.denoiser != "FluxTransformer2DModel":  # which takes latents packed two by two
        assert (config["in_channels"], config["sample_size"]) == preset.latent[:2]
    original = ORIGINALS.get(name)
    if isinstance(original, LdmOriginal):
        kind, converted, _ = ldm_unet(original)
        with torch.device("meta"):
            expected, shipped = kind(**converted), model_class(preset.denoiser).from_config(config)
        ours = {key: value for key, value in expected.config.items() if not key.startswith("_")}
        theirs = {key: shipped.config.get(key) for key in ours}
        assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
