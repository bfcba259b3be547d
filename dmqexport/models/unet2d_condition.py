"""`UNet2DConditionModel`: UNets with cross-attention (Stable Diffusion 1.x, 2.x, XL, the bundled model)."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.family import Config, DiffusersFamily
from dmqexport.models.shapes import CLIP_TOKENS, ExampleInputs, sample_shape

_TIME_IDS = 6  # original height and width, crop top and left, target height and width


class UNet2DConditionFamily(DiffusersFamily):
    """Cross-attention UNet of diffusers, with SDXL's added conditions where its config has them."""

    class_name = "UNet2DConditionModel"
    component = "unet"
    positional: tuple[str, ...] = ("sample", "timestep", "encoder_hidden_states")
    nested: Mapping[str, str]
    boundary: tuple[str, ...]
    time_projections: tuple[str, ...] = ("time_embedding.linear_2", "*.time_emb_proj")
    first_layers: tuple[str, ...] = ("conv_in",)

    def __init__(self, config: Config, size: tuple[int, int] | None = None) -> None:
        """Raises ModelError for conditions other than one text and SDXL's added pair."""
        self._shape = sample_shape(config, size)
        added, width = config.get("addition_embed_type"), config.get("cross_attention_dim")
        if added not in (None, "text_time") or config.get("class_embed_type") is not None:
            kind = added if added not in (None, "text_time") else config.get("class_embed_type")
            raise ModelError(f"{self.class_name} with added conditions ({kind}) is not supported")
        if config.get("encoder_hid_dim_type") is not None or not isinstance(width, int):
            raise ModelError(
                f"{self.class_name} with a projected or per-block conditioning width is not supported "
                f"(encoder_hid_dim_type {config.get('encoder_hid_dim_type')}, cross_attention_dim {width})"
            )
        self._width, self._added = width, added is not None
        self._pooled = 0
        if self._added:
            self._pooled = int(config["projection_class_embeddings_input_dim"]) - _TIME_IDS * int(
                config["addition_time_embed_dim"]
            )
        names = ("text_embeds", "time_ids") if self._added else ()
        self.nested = MappingProxyType(dict.fromkeys(names, "added_cond_kwargs"))
        self.input_names: tuple[str, ...] = ("sample", "timestep", "encoder_hidden_states", *names)
        self.embeddings: tuple[str, ...] = ("encoder_hidden_states", *names[:1])
        self.prediction_channels = self._shape[0]
        added_layers = ("add_embedding.*",) if self._added else ()
        self.boundary = ("conv_in", "conv_out", "time_embedding.*", *added_layers, "*.time_emb_proj")

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """sample float32 [batch, C, H, W], timestep int64 [batch], encoder_hidden_states float32 [batch, tokens, D].

        SDXL: also text_embeds float32 [batch, P] and time_ids float32 [batch, 6], sizes in pixels.
        """
        draw = ExampleInputs(batch)
        inputs = {
            "sample": draw.normal(*self._shape),
            "timestep": draw.timesteps(),
            "encoder_hidden_states": draw.normal(tokens or CLIP_TOKENS, self._width),
        }
        if self._added:
            ids = draw.full(0.0, _TIME_IDS)
            for index, side in ((0, 1), (1, 2), (4, 1), (5, 2)):
                ids[:, index] = 8.0 * self._shape[side]
            inputs.update(text_embeds=draw.normal(self._pooled), time_ids=ids)
        return inputs

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (sample, timestep, encoder_hidden_states[, text_embeds, time_ids]) → out_sample."""
        return _WrappedXL(denoiser) if self._added else _Wrapped(denoiser)


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.denoiser(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


class _WrappedXL(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        output: Tensor = self.denoiser(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]
        return output
