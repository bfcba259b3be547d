"""The models that have a name: where they come from, under which licence, and how their authors sample them."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from dmqexport.models import emoji

RETRIEVAL_CAPTIONS: Final = 200
"""How many captions of the bundled model are kept for judging it; calibration never sees them."""


@dataclass(frozen=True)
class Preset:
    """One named model.

    hub_id: the model hub's `org/name`; None for a model inside this package, which needs no network.
    steps, guidance: what the model is commonly sampled with. scheduler: short name, None for the model's own.
    """

    name: str
    hub_id: str | None
    licence: str
    note: str
    steps: int
    guidance: float
    text: bool
    scheduler: str | None = None


_NO_CHECKER: Final = "The safety checker is not loaded: pictures are not filtered; the licence's use limits still bind."

_DDPM_NOTE: Final = "Unconditional. Sampled with DDIM; --scheduler ddpm gives the ancestral sampler (use 1000 steps)."


def _ddpm(name: str, hub_id: str) -> Preset:
    return Preset(name, hub_id, "Apache-2.0", _DDPM_NOTE, steps=100, guidance=1.0, text=False, scheduler="ddim")


PRESETS: Final[dict[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset(
            "emoji",
            None,
            "Apache-2.0",
            "Bundled: 64 x 64 text-to-image, trained from scratch on noto-emoji. No network, no safety checker.",
            steps=20,
            guidance=3.0,
            text=True,
        ),
        Preset("sd14", "CompVis/stable-diffusion-v1-4", "CreativeML OpenRAIL-M", _NO_CHECKER, 50, 7.5, text=True),
        Preset(
            "sd15",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "CreativeML OpenRAIL-M",
            _NO_CHECKER,
            steps=50,
            guidance=7.5,
            text=True,
        ),
        _ddpm("ddpm-cifar10", "google/ddpm-cifar10-32"),
        _ddpm("ddpm-celebahq-256", "google/ddpm-celebahq-256"),
        _ddpm("ddpm-bedroom-256", "google/ddpm-bedroom-256"),
        _ddpm("ddpm-church-256", "google/ddpm-church-256"),
    )
}


def text_prompts() -> tuple[str, ...]:
    """The 64 prompts for text-to-image models without their own; origin and licence are in the file's head."""
    lines = files("dmqexport.models").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def emoji_prompts() -> tuple[str, ...]:
    """The bundled model's captions without those the retrieval figure asks for, in the same fixed shuffled order."""
    captions = emoji.captions()
    order = emoji.retrieval_indices(emoji.IMAGE_COUNT)
    return tuple(captions[index] for index in order[RETRIEVAL_CAPTIONS:])
