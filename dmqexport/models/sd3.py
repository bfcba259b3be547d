"""`SD3Transformer2DModel`: multimodal diffusion transformers with flow matching (Stable Diffusion 3 and 3.5)."""

from torch import Tensor, nn

from dmqexport.models.family import Config, DiffusersFamily
from dmqexport.models.shapes import ExampleInputs, sample_shape

_TOKENS = 333  # 77 of the two CLIP encoders and 256 of T5


class SD3Family(DiffusersFamily):
    """SD3 of diffusers. Timesteps are floats from 0 to 1000."""

    class_name = "SD3Transformer2DModel"
    component = "transformer"
    positional: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    input_names: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    embeddings: tuple[str, ...] = ("encoder_hidden_states", "pooled_projections")
    float_timestep = True
    boundary: tuple[str, ...] = ("pos_embed.proj", "proj_out", "time_text_embed.*", "context_embedder")
    first_layers: tuple[str, ...] = ("pos_embed.proj",)

    def __init__(self, config: Config, size: tuple[int, int] | None = None) -> None:
        self._shape = sample_shape(config, size)
        self._width, self._pooled = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
        self.prediction_channels = self._shape[0]

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """hidden_states float32 [batch, C, H, W], encoder_hidden_states float32 [batch, tokens, D],
        pooled_projections float32 [batch, P], timestep float32 [batch] from 0 to 1000."""
        draw = ExampleInputs(batch)
        return {
            "hidden_states": draw.normal(*self._shape),
            "encoder_hidden_states": draw.normal(tokens or _TOKENS, self._width),
            "pooled_projections": draw.normal(self._pooled),
            "timestep": draw.uniform(1000.0),
        }

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (hidden_states, encoder_hidden_states, pooled_projections, timestep) → out_sample."""
        return _Wrapped(denoiser)


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False
        )[0]
        return output
