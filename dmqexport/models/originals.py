"""Networks published as their authors' own checkpoints: the facts of their configurations that weights do not show.

Sources: configs/latent-diffusion/*.yaml of CompVis/latent-diffusion; configs/*.yaml of ermongroup/ddim and
`Diffusion.from_pretrained` of pesser/pytorch_diffusion.
"""

from dataclasses import dataclass
from typing import Final

PROVENANCE: Final = "conversion.json"
"""In a converted folder: the preset and the checkpoint it was made from; presets' defaults are taken from it."""


@dataclass(frozen=True)
class DdimOriginal:
    """A UNet of ermongroup/ddim and pesser/pytorch_diffusion, in pixels, betas linear from 1e-4 to 0.02.

    attention: levels with self-attention, 0 the finest. variance: which variance the ancestral sampler was used with.
    groups: channel groups of the norms.
    """

    size: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    variance: str
    channels: int = 128
    blocks: int = 2
    groups: int = 32


@dataclass(frozen=True)
class Autoencoder:
    """A first stage of CompVis/latent-diffusion; `codes` entries in the codebook, None for the KL kind."""

    multipliers: tuple[int, ...]
    latent_channels: int
    codes: int | None
    channels: int = 128
    blocks: int = 2
    groups: int = 32


@dataclass(frozen=True)
class LdmOriginal:
    """A UNet of CompVis/latent-diffusion with its first stage; betas linear in their square root.

    size: of the latents. heads or head_channels: how attention is divided, the other is None. resample_in_blocks:
    `resblock_updown` with `use_scale_shift_norm`. classes, context: of the class embedding, the last class meaning
    none; None without classes. scaled: latents are divided by the standard deviation that the checkpoint holds.
    """

    size: int
    channels: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    first_stage: Autoencoder
    heads: int | None = None
    head_channels: int | None = None
    beta_end: float = 0.0195
    beta_start: float = 0.0015
    resample_in_blocks: bool = False
    classes: int | None = None
    context: int | None = None
    scaled: bool = False
    blocks: int = 2
    groups: int = 32


_LARGE: Final = DdimOriginal(size=256, multipliers=(1, 1, 2, 2, 4, 4), attention=(4,), variance="fixed_small")
_VQ_F4: Final = Autoencoder(multipliers=(1, 2, 4), latent_channels=3, codes=8192)
_UNCONDITIONAL: Final = LdmOriginal(
    size=64, channels=224, multipliers=(1, 2, 3, 4), attention=(1, 2, 3), first_stage=_VQ_F4, head_channels=32
)

ORIGINALS: Final[dict[str, DdimOriginal | LdmOriginal]] = {
    "ddpm-cifar10": DdimOriginal(size=32, multipliers=(1, 2, 2, 2), attention=(1,), variance="fixed_large"),
    "ddpm-celebahq-256": _LARGE,
    "ddpm-bedroom-256": _LARGE,
    "ddpm-church-256": _LARGE,
    "ldm-celebahq-256": _UNCONDITIONAL,
    "ldm-bedroom": _UNCONDITIONAL,
    "ldm-church": LdmOriginal(
        size=32,
        channels=192,
        multipliers=(1, 2, 2, 4, 4),
        attention=(0, 1, 2, 3),
        first_stage=Autoencoder(multipliers=(1, 2, 4, 4), latent_channels=4, codes=None),
        heads=8,
        beta_end=0.0155,
        resample_in_blocks=True,
        scaled=True,
    ),
    "ldm-imagenet": LdmOriginal(
        size=64,
        channels=192,
        multipliers=(1, 2, 3, 5),
        attention=(1, 2, 3),
        first_stage=_VQ_F4,
        heads=1,
        classes=1001,
        context=512,
    ),
}
"""By preset name; the presets that `dmqexport convert` takes."""
