"""`UNet2DModel`: pixel- or latent-space UNets without text (DDPM, DDIM, LDM), unconditional or of classes."""

from torch import Tensor, nn

from dmqexport.errors import ModelError
from dmqexport.models.family import Config, DiffusersFamily
from dmqexport.models.shapes import ExampleInputs, sample_shape


class UNet2DFamily(DiffusersFamily):
    """UNet of diffusers without cross-attention."""

    class_name = "UNet2DModel"
    component = "unet"
    positional: tuple[str, ...] = ("sample", "timestep", "class_labels")
    time_projections: tuple[str, ...] = ("time_embedding.linear_2", "*.time_emb_proj")
    boundary: tuple[str, ...] = ("conv_in", "conv_out", "time_embedding.*", "*.time_emb_proj")
    first_layers: tuple[str, ...] = ("conv_in",)

    def __init__(self, config: Config, size: tuple[int, int] | None = None) -> None:
        """Raises ModelError for labels that are not numbers of classes."""
        self._shape = sample_shape(config, size)
        kind, self._classes = config.get("class_embed_type"), config.get("num_class_embeds")
        if kind is not None:
            raise ModelError(f"{self.class_name} with class_embed_type {kind!r} is not supported, only class numbers")
        self.prediction_channels = self._shape[0]
        # A model with room for one class more than it has keeps the last for "none", as classifier-free guidance does.
        self.null_class = None if self._classes is None else int(self._classes) - 1
        labels = () if self._classes is None else ("class_labels",)
        self.input_names: tuple[str, ...] = ("sample", "timestep", *labels)

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """sample float32 [batch, C, H, W], timestep int64 [batch], class_labels int64 [batch] where there are any."""
        draw = ExampleInputs(batch)
        inputs = {"sample": draw.normal(*self._shape), "timestep": draw.timesteps()}
        return inputs if self._classes is None else {**inputs, "class_labels": draw.integers(int(self._classes))}

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """Forward (sample, timestep[, class_labels]) → out_sample."""
        return _Wrapped(denoiser) if self._classes is None else _WrappedClasses(denoiser)


class FixedHeadsUNet2DFamily(UNet2DFamily):
    """The same with one number of attention heads at every level (CompVis' LSUN churches)."""

    class_name = "FixedHeadsUNet2DModel"


class _Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = self.denoiser(sample, timestep, return_dict=False)[0]
        return output


class _WrappedClasses(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        output: Tensor = self.denoiser(sample, timestep, class_labels, return_dict=False)[0]
        return output
