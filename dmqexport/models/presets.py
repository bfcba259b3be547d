"""The models that have a name, and the prompts they are calibrated and judged with."""

from importlib.resources import files
from typing import Final

from dmqexport.models import emoji
from dmqexport.models.preset_table import TABLE
from dmqexport.models.preset_table import Preset as Preset

RETRIEVAL_CAPTIONS: Final = 200
"""How many captions of the bundled model are kept for judging it; calibration never sees them."""

PRESETS: Final[dict[str, Preset]] = {preset.name: preset for preset in TABLE}
"""By name, in the order in which they are listed."""


def text_prompts() -> tuple[str, ...]:
    """The 64 prompts for text-to-image models without their own; origin and licence are in the file's head."""
    lines = files("dmqexport.models").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def emoji_prompts() -> tuple[str, ...]:
    """The bundled model's captions without those the retrieval figure asks for, in the same fixed shuffled order."""
    captions = emoji.captions()
    order = emoji.retrieval_indices(emoji.IMAGE_COUNT)
    return tuple(captions[index] for index in order[RETRIEVAL_CAPTIONS:])
