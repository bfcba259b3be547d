"""Channel factors: exact in float, found where they fold, refused where they would change the function."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from calib.equalize import apply_folds, fold_sites, measure_folds
from calib.sampling import CalibrationSet
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import ChannelFold


def text_unet() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    inputs = {
        "sample": torch.randn(6, 4, 8, 8),
        "timestep": torch.arange(6) * 150,
        "encoder_hidden_states": torch.randn(6, 5, 12),
    }
    return unet, inputs


def pixel_unet() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return unet, {"sample": torch.randn(6, 3, 8, 8), "timestep": torch.arange(6) * 150}


@pytest.mark.parametrize("make", [text_unet, pixel_unet], ids=["cross-attention", "pixel"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_folding_changes_nothing_in_float(make: Any, strength: float) -> None:
    unet, inputs = make()
    # In double precision: what is left would be a fold that is not exact, not rounding.
    unet.double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    # Outlying channels, so that the factors are far from one.
    with torch.no_grad():
        for name, module in unet.named_modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or name.endswith(("to_v", "net.0.proj")):
                module.weight[::3] *= 20

    def run(batch: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = unet(**batch, return_dict=False)[0]
        return output

    before = run(inputs)
    sites = fold_sites(unet)
    entries = CalibrationSet(inputs, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    folds = measure_folds(unet, sites, entries, run, 3, strength)
    apply_folds(unet, folds, lambda: run(inputs))
    assert float((run(inputs) - before).abs().max() / before.abs().max()) <= 1e-10
    assert max(float(fold.factor.max() / fold.factor.min()) for fold in folds) > 1.5


def test_every_kind_of_site_is_found() -> None:
    sites = {site.producer: site.consumers for site in fold_sites(text_unet()[0])}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert sites[f"{block}.norm1"] == tuple(f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))
    assert sites[f"{block}.norm2"] == (f"{block}.attn2.to_q",)
    assert sites[f"{block}.norm3"] == (f"{block}.ff.net.0.proj",)
    assert sites[f"{block}.ff.net.0.proj"] == (f"{block}.ff.net.2",)
    assert sites[f"{block}.attn2.to_v"] == (f"{block}.attn2.to_out.0",)
    assert sites["down_blocks.0.attentions.0.norm"] == ("down_blocks.0.attentions.0.proj_in",)


def test_a_fold_that_changes_the_function_is_refused() -> None:
    unet, inputs = text_unet()

    def run() -> Tensor:
        with torch.no_grad():
            output: Tensor = unet(**inputs, return_dict=False)[0]
        return output

    # A GroupNorm followed by SiLU is not linear: a factor does not pass.
    wrong = ChannelFold(
        "down_blocks.0.resnets.0.norm1", ("down_blocks.0.resnets.0.conv1",), np.full(8, 3.0, np.float32)
    )
    with pytest.raises(CalibrationError, match="changed the float output"):
        apply_folds(unet, [wrong], run)
