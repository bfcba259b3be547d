"""Random pipelines of a few kilobytes, saved the way diffusers saves real ones."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from dmqexport.models import emoji

WIDTH = 16
TOKENS = 16


def unconditional_unet(channels: int = 3, **options: Any) -> UNet2DModel:
    """8 × 8, one block with attention."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        **options,
    )


def conditional_unet() -> UNet2DConditionModel:
    """4 × 8 × 8 latents, cross-attention over vectors of `WIDTH`."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )


def save_unconditional(folder: Path, channels: int = 3) -> Path:
    """A DDPMPipeline with 20 training timesteps."""
    unet, scheduler = unconditional_unet(channels), DDPMScheduler(num_train_timesteps=20)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


def save_text(folder: Path) -> Path:
    """A StableDiffusionPipeline that borrows the bundled model's tokenizer."""
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1408,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(str(emoji.pipeline_folder() / "tokenizer"), local_files_only=True),
        unet=conditional_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def copy(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target
