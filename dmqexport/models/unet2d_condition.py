"""`UNet2DConditionModel`: text-to-image UNets with cross-attention (Stable Diffusion 1.x, 2.x, the bundled model)."""

from typing import Any

import torch
from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.shapes import sample_shape

_DEFAULT_TOKENS = 77


class UNet2DConditionFamily:
    """Cross-attention UNet of diffusers."""

    class_name = "UNet2DConditionModel"
    component = "unet"
    input_names: tuple[str, ...] = ("sample", "timestep", "encoder_hidden_states")
    boundary: tuple[str, ...] = ("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj")

    def example_inputs(self, denoiser: nn.Module, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """sample float32 [batch, C, H, W], timestep int64 [batch], encoder_hidden_states float32 [batch, tokens, D]."""
        config: Any = denoiser.config
        if config.addition_embed_type is not None or config.class_embed_type is not None:
            raise ModelError(
                f"{self.class_name} with added conditions ({config.addition_embed_type or config.class_embed_type}) "
                "is not supported yet"
            )
        if config.encoder_hid_dim_type is not None or not isinstance(config.cross_attention_dim, int):
            raise ModelError(
                f"{self.class_name} with a projected or per-block conditioning width is not supported yet "
                f"(encoder_hid_dim_type {config.encoder_hid_dim_type}, "
                f"cross_attention_dim {config.cross_attention_dim})"
            )
        generator = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn((batch, *sample_shape(denoiser)), generator=generator),
            "timestep": torch.randint(0, 1000, (batch,), generator=generator),
            "encoder_hidden_states": torch.randn(
                (batch, tokens or _DEFAULT_TOKENS, config.cross_attention_dim), generator=generator
            ),
        }

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (sample, timestep, encoder_hidden_states) → out_sample."""
        return _Wrapped(denoiser)


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.denoiser(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output
