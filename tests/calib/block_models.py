"""Small denoisers of several families, with calibration inputs and the call that runs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from models.tiny_pipelines import WIDTH, conditional_unet, unconditional_unet
from torch import Tensor, nn

from calib.sampling import CalibrationSet

TIMESTEPS = 40


@dataclass(frozen=True)
class Denoiser:
    """A model, what it was calibrated on, and how it is called with that."""

    model: nn.Module
    data: CalibrationSet

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One forward without gradients."""
        named = dict(inputs)
        if isinstance(self.model, (DiTTransformer2DModel, SD3Transformer2DModel)):
            named["hidden_states"] = named.pop("sample")
        with torch.no_grad():
            output: Tensor = self.model(**named, return_dict=False)[0]
        return output

    def layers(self) -> list[str]:
        """Names of every Conv2d and Linear that runs once: what a plan may hold, in execution order."""
        ran: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        self.run(self.data.select(torch.tensor([0])))
        for handle in handles:
            handle.remove()
        return [name for name in ran if ran.count(name) == 1]


def _data(entries: int, shape: tuple[int, ...], **extra: Tensor) -> CalibrationSet:
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn((entries, *shape), generator=generator)
    timestep = (torch.arange(entries) * 7) % TIMESTEPS
    trajectory = torch.arange(entries) % 5
    return CalibrationSet({"sample": sample, "timestep": timestep, **extra}, trajectory, torch.arange(entries) // 5)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def conditional(entries: int = 11) -> Denoiser:
    """UNet with skip connections and cross-attention."""
    data = _data(entries, (4, 8, 8), encoder_hidden_states=_normal(entries, 5, WIDTH))
    return Denoiser(conditional_unet().eval(), data)


def small(entries: int = 11) -> Denoiser:
    """UNet with one skip and two transformer blocks that read one prompt: few blocks, so that training is quick."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        transformer_layers_per_block=2,
    )
    data = _data(entries, (4, 4, 4), encoder_hidden_states=_normal(entries, 5, WIDTH))
    return Denoiser(model.eval(), data)


def unconditional(entries: int = 11) -> Denoiser:
    """UNet whose attentions stand alone between residual blocks."""
    return Denoiser(unconditional_unet().eval(), _data(entries, (3, 8, 8)))


def dit(entries: int = 11) -> Denoiser:
    """Transformer with class labels."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )
    return Denoiser(model.eval(), _data(entries, (4, 8, 8), class_labels=torch.arange(entries) % 10))


def joint(entries: int = 11) -> Denoiser:
    """Transformer whose blocks take and return two streams, the last one None for the second."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
    )
    text, pooled = _normal(entries, 5, 12), _normal(entries, 6)
    return Denoiser(model.eval(), _data(entries, (4, 8, 8), encoder_hidden_states=text, pooled_projections=pooled))


FAMILIES: dict[str, Callable[[], Denoiser]] = {
    "conditional": conditional,
    "unconditional": unconditional,
    "dit": dit,
    "joint": joint,
}
