"""`FluxTransformer2DModel`: rectified-flow transformers over packed latents with rotary positions (FLUX.1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.family import Config, DiffusersFamily
from dmqexport.models.shapes import ExampleInputs

_TOKENS = 512
_LATENTS = (128, 128)  # 1024 pixels; the config has no size
_GUIDANCE = 3.5


class FluxFamily(DiffusersFamily):
    """FLUX.1 of diffusers. Timesteps are floats from 0 to 1, as its pipeline passes them; positions are constants.

    Latents enter packed: 2 x 2 patches as channels, one token a patch. The size is that of the latents before packing.
    """

    class_name = "FluxTransformer2DModel"
    component = "transformer"
    positional: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    embeddings: tuple[str, ...] = ("encoder_hidden_states", "pooled_projections")
    implied: frozenset[str] = frozenset({"img_ids", "txt_ids"})
    float_timestep = True
    timestep_scale = 1000.0
    boundary: tuple[str, ...] = ("x_embedder", "proj_out", "time_text_embed.*", "context_embedder")
    first_layers: tuple[str, ...] = ("x_embedder",)

    def __init__(self, config: Config, size: tuple[int, int] | None = None) -> None:
        """Raises ModelError for latents that cannot be packed."""
        self._height, self._width = size or _LATENTS
        if self._height % 2 or self._width % 2:
            raise ModelError(f"FLUX packs latents two by two: {self._height} x {self._width} is not even")
        self._channels, self._text = int(config["in_channels"]), int(config["joint_attention_dim"])
        self._pooled = int(config["pooled_projection_dim"])
        guided = ("guidance",) if config.get("guidance_embeds") else ()
        self.input_names: tuple[str, ...] = (
            "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", *guided,
        )  # fmt: skip

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """hidden_states float32 [batch, H·W/4, C], encoder_hidden_states float32 [batch, tokens, D],
        pooled_projections float32 [batch, P], timestep float32 [batch] from 0 to 1, guidance float32 [batch]."""
        draw = ExampleInputs(batch)
        inputs = {
            "hidden_states": draw.normal(self._height * self._width // 4, self._channels),
            "encoder_hidden_states": draw.normal(tokens or _TOKENS, self._text),
            "pooled_projections": draw.normal(self._pooled),
            "timestep": draw.uniform(1.0),
        }
        return {**inputs, "guidance": draw.full(_GUIDANCE)} if "guidance" in self.input_names else inputs

    def planes(self, sample: Tensor) -> Tensor:
        """Unpacked: [n, H·W/4, 4·C] → [n, C, H, W]."""
        patches = sample.reshape(len(sample), self._height // 2, self._width // 2, self._channels // 4, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(sample), self._channels // 4, self._height, self._width)

    def implied_arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions: img_ids float32 [H·W/4, 3], txt_ids float32 [tokens, 3] of zeros."""
        return {"img_ids": self.image_positions(), "txt_ids": torch.zeros(inputs["encoder_hidden_states"].shape[1], 3)}

    def image_positions(self) -> Tensor:
        """float32 [H·W/4, 3]: 0, row and column of every packed token."""
        rows, columns = torch.meshgrid(torch.arange(self._height // 2), torch.arange(self._width // 2), indexing="ij")
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (hidden_states, encoder_hidden_states, pooled_projections, timestep[, guidance]) → out_sample."""
        kind = _WrappedGuided if "guidance" in self.input_names else _Wrapped
        return kind(denoiser, self.image_positions())


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        return self.run(hidden_states, encoder_hidden_states, pooled_projections, timestep, None)

    def run(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        """Call the transformer with the positions of a picture of the fixed size."""
        output: Tensor = self.denoiser(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=self.positions,
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return output


class _WrappedGuided(_Wrapped):
    def forward(  # type: ignore[override]  # the exporter reads the inputs from the signature
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        return self.run(hidden_states, encoder_hidden_states, pooled_projections, timestep, guidance)
