"""`UNet2DModel`: unconditional pixel- or latent-space UNets (DDPM, DDIM, LDM)."""

from typing import Any

import torch
from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.shapes import sample_shape


class UNet2DFamily:
    """Unconditional UNet of diffusers."""

    class_name = "UNet2DModel"
    component = "unet"
    input_names: tuple[str, ...] = ("sample", "timestep")
    boundary: tuple[str, ...] = ("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj")

    def example_inputs(self, denoiser: nn.Module, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """sample float32 [batch, C, H, W], timestep int64 [batch]; no text, so `tokens` means nothing here."""
        config: Any = denoiser.config
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise ModelError("class-conditional UNet2DModel is not supported yet: it needs class_labels")
        generator = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn((batch, *sample_shape(denoiser)), generator=generator),
            "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        }

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (sample, timestep) → out_sample."""
        return _Wrapped(denoiser)


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.denoiser(sample, timestep, return_dict=False)[0]
        return output
