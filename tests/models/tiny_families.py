"""A random denoiser of a few kilobytes for every family, saved alone as diffusers saves it, beside its scheduler."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from dmqexport.models.fixed_heads_unet import FixedHeadsUNet2DModel


@dataclass(frozen=True)
class TinyFamily:
    """One family's variant. options: `--set` assignments that its build needs."""

    name: str
    make: Callable[[], Any]
    scheduler: Callable[[], Any]
    options: tuple[str, ...] = ()


def unet2d(**options: Any) -> UNet2DModel:
    """8 x 8 pixels, attention in the middle."""
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        **options,
    )


def fixed_heads() -> FixedHeadsUNet2DModel:
    """As `unet2d`, with a number of attention heads instead of their width."""
    return FixedHeadsUNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, num_attention_heads=2,
    )  # fmt: skip


def unet2d_condition(**options: Any) -> UNet2DConditionModel:
    """8 x 8 latents, cross-attention over vectors of 24."""
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2,
        **options,
    )


def sdxl() -> UNet2DConditionModel:
    """The added conditions of Stable Diffusion XL: pooled vectors of 20 and six sizes."""
    return unet2d_condition(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20,
        use_linear_projection=True,
    )  # fmt: skip


def dit() -> DiTTransformer2DModel:
    """8 x 8 latents in patches of 2, ten classes, learned variance."""
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def pixart() -> PixArtTransformer2DModel:
    """8 x 8 latents in patches of 2, captions of 24."""
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip


def sd3(**options: Any) -> SD3Transformer2DModel:
    """8 x 8 latents in patches of 2, joint attention over vectors of 24."""
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
        pos_embed_max_size=8, **options,
    )  # fmt: skip


def flux(guidance: bool) -> FluxTransformer2DModel:
    """Packed latents of 4 channels, one double and one single block."""
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance,
    )  # fmt: skip


def ddim(**options: Any) -> DDIMScheduler:
    """A hundred training timesteps are enough to tell rows apart."""
    return DDIMScheduler(num_train_timesteps=100, clip_sample=False, **options)


_RANDOM = ("calibration.embeddings=random",)
_SMALL_FLUX = (*_RANDOM, "sampling.latent_size=[8,8]")

TINY_FAMILIES = (
    TinyFamily("unet2d", unet2d, ddim),
    TinyFamily("fixed-heads", fixed_heads, ddim),
    TinyFamily("unet2d-classes", lambda: unet2d(num_class_embeds=10), ddim),
    TinyFamily("unet2d-v-prediction", unet2d, lambda: ddim(prediction_type="v_prediction")),
    TinyFamily("unet2d-x0-prediction", unet2d, lambda: ddim(prediction_type="sample")),
    TinyFamily("unet2d-condition", unet2d_condition, ddim, _RANDOM),
    TinyFamily("sdxl", sdxl, ddim, _RANDOM),
    TinyFamily("dit", dit, ddim),
    TinyFamily("pixart", pixart, ddim, _RANDOM),
    TinyFamily("sd3", sd3, FlowMatchEulerDiscreteScheduler, _RANDOM),
    TinyFamily(
        "sd35", lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)), FlowMatchEulerDiscreteScheduler, _RANDOM
    ),
    TinyFamily("flux-schnell", lambda: flux(guidance=False), FlowMatchEulerDiscreteScheduler, _SMALL_FLUX),
    TinyFamily(
        "flux-dev",
        lambda: flux(guidance=True),
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _SMALL_FLUX,
    ),
)


def save(family: TinyFamily, folder: Path) -> Path:
    """Save it with weights that matter: those that start at zero (adaLN, last layers) are drawn too."""
    torch.manual_seed(0)
    denoiser: nn.Module = family.make()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.05)
    denoiser.save_pretrained(folder)
    family.scheduler().save_pretrained(folder / "scheduler")
    return folder
