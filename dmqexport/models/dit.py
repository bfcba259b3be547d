"""`DiTTransformer2DModel`: class-conditional transformers over latent patches (DiT)."""

from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.family import Config, DiffusersFamily
from dmqexport.models.shapes import ExampleInputs, sample_shape


class DiTFamily(DiffusersFamily):
    """DiT of diffusers. Its prediction holds the noise and, behind it, a learned variance."""

    class_name = "DiTTransformer2DModel"
    component = "transformer"
    input_names: tuple[str, ...] = ("hidden_states", "timestep", "class_labels")
    positional: tuple[str, ...] = ("hidden_states", "timestep", "class_labels")
    boundary: tuple[str, ...] = ("pos_embed.proj", "proj_out_2", "*.norm1.emb.*")
    first_layers: tuple[str, ...] = ("pos_embed.proj",)

    def __init__(self, config: Config, size: tuple[int, int] | None = None) -> None:
        """Raises ModelError for the other transformers that were published under the same class name."""
        if config.get("norm_type") != "ada_norm_zero" or config.get("patch_size") is None:
            raise ModelError(
                f"a Transformer2DModel with norm_type {config.get('norm_type')!r} is not supported: only DiT "
                "(ada_norm_zero) and PixArt (ada_norm_single) are"
            )
        self._shape = sample_shape(config, size)
        if self._shape[1] != self._shape[2]:
            raise ModelError(f"DiT takes square latents only, got {self._shape[1]} x {self._shape[2]}")
        self._classes = int(config.get("num_embeds_ada_norm") or 1000)
        self.prediction_channels = self._shape[0]
        self.null_class = self._classes

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """hidden_states float32 [batch, C, H, W], timestep int64 [batch], class_labels int64 [batch]."""
        draw = ExampleInputs(batch)
        return {
            "hidden_states": draw.normal(*self._shape),
            "timestep": draw.timesteps(),
            "class_labels": draw.integers(self._classes),
        }

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (hidden_states, timestep, class_labels) → out_sample."""
        return _Wrapped(denoiser)


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        output: Tensor = self.denoiser(hidden_states, timestep, class_labels, return_dict=False)[0]
        return output
