"""The table of presets says of each model what the rest of the package relies on."""

import diffusers
import pytest

from dmqexport.models import preset_table
from dmqexport.models.originals import ORIGINALS, LdmOriginal
from dmqexport.models.preset_table import Preset
from dmqexport.models.presets import PRESETS
from dmqexport.models.schedulers import SCHEDULERS

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
