"""`UNet2DModel` with the same number of attention heads at every level, as CompVis' LSUN churches model has."""

from diffusers import ModelMixin, UNet2DModel  # noqa: F401  # diffusers looks for ModelMixin here to load the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention


class FixedHeadsUNet2DModel(UNet2DModel):  # type: ignore[misc]  # diffusers comes without types
    """diffusers' `UNet2DModel` fixes the width of a head; this fixes their number, and is else the same.

    Inputs and output as `UNet2DModel`: sample [N, C, H, W], timestep [N] → [N, C, H, W].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        down_block_types: tuple[str, ...],
        up_block_types: tuple[str, ...],
        layers_per_block: int,
        num_attention_heads: int,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        resnet_time_scale_shift: str = "default",
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
    ) -> None:
        """The options are those of `UNet2DModel`; raises ValueError when a width does not divide by the heads."""
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            attention_head_dim=None,
        )
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                if module.inner_dim % num_attention_heads:
                    raise ValueError(f"{name}: {module.inner_dim} channels do not divide into {num_attention_heads}")
                module.heads = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
