"""`PixArtTransformer2DModel`: text-to-image transformers with cross-attention over masked T5 vectors (PixArt)."""

from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.family import Config, DiffusersFamily
from dmqexport.models.shapes import ExampleInputs, sample_shape

_TOKENS = 300  # what PixArt-Sigma pads its prompts to; PixArt-Alpha: 120


class PixArtFamily(DiffusersFamily):
    """PixArt of diffusers. Its prediction holds the noise and, behind it, a variance that samplers ignore."""

    class_name = "PixArtTransformer2DModel"
    component = "transformer"
    positional: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "timestep")
    embeddings: tuple[str, ...] = ("encoder_hidden_states",)
    input_names: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep")
    boundary: tuple[str, ...] = ("pos_embed.proj", "proj_out", "adaln_single.*", "caption_projection.linear_1")
    first_layers: tuple[str, ...] = ("pos_embed.proj",)

    def __init__(self, config: Config, size: tuple[int, int] | None = None) -> None:
        """Raises ModelError for micro-conditions on resolution and aspect ratio."""
        self._shape = sample_shape(config, size)
        flag = config.get("use_additional_conditions")
        if flag or (flag is None and config.get("sample_size") == 128):
            raise ModelError(
                "PixArt-Alpha's conditions on resolution and aspect ratio are not supported",
                hint="PixArt-Sigma, and PixArt-Alpha at 256 and 512 pixels, do without them",
            )
        self._width = int(config.get("caption_channels") or config["cross_attention_dim"])
        self.prediction_channels = self._shape[0]

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """hidden_states float32 [batch, C, H, W], encoder_hidden_states float32 [batch, tokens, D],
        encoder_attention_mask float32 [batch, tokens] of ones and zeros, timestep int64 [batch]."""
        draw, count = ExampleInputs(batch), tokens or _TOKENS
        mask = draw.full(1.0, count)
        mask[:, count - count // 4 :] = 0.0
        return {
            "hidden_states": draw.normal(*self._shape),
            "encoder_hidden_states": draw.normal(count, self._width),
            "encoder_attention_mask": mask,
            "timestep": draw.timesteps(),
        }

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (hidden_states, encoder_hidden_states, encoder_attention_mask, timestep) → out_sample."""
        return _Wrapped(denoiser)


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, timestep: Tensor
    ) -> Tensor:
        none: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        # All batches are one: without these the exporter keeps three symbols apart and cannot fold the heads.
        batch = hidden_states.shape[0]
        text = encoder_hidden_states.reshape(batch, *encoder_hidden_states.shape[1:])
        mask = encoder_attention_mask.reshape(batch, encoder_attention_mask.shape[1])
        output: Tensor = self.denoiser(
            hidden_states,
            text,
            timestep,
            added_cond_kwargs=none,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return output
