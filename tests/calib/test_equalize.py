"""Folding channel factors: exact in float, found where it is, refused where it would change the function."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from calib.equalize import FoldSite, apply_folds, fold_sites, folds_of
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


def transformer() -> tuple[Any, dict[str, Tensor]]:
    """adaLN-Zero blocks: the norms have no weights, the timestep's linear layer modulates them."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8
    ).eval()
    inputs = {
        "hidden_states": torch.randn(6, 4, 8, 8),
        "timestep": torch.arange(6) * 150,
        "class_labels": torch.arange(6),
    }
    return model, inputs


MODELS = pytest.mark.parametrize("make", [text_unet, pixel_unet, transformer], ids=["text", "pixel", "transformer"])


def random_factors(sites: list[FoldSite], spread: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        site.consumers[0]: np.exp(random.uniform(-spread, spread, site.channels)).astype(np.float32) for site in sites
    }


@MODELS
@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_folding_changes_nothing_in_float(make: Any, double: bool) -> None:
    """In double precision what is left would be a fold that is not exact; in single it is rounding, at most 1e-5."""
    model, inputs = make()
    if double:
        model.double()
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}

    def run() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(**inputs, return_dict=False)[0]
        return output

    before = run()
    sites = fold_sites(model)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    apply_folds(model, sites, folds_of(sites, random_factors(sites, 1.5)), run)
    assert float((run() - before).abs().max() / before.abs().max()) <= (1e-12 if double else 1e-5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, original[name])}
    assert {f"{name}.weight" for site in sites for name in (site.producer, *site.consumers)} <= changed


def test_every_kind_of_site_is_found() -> None:
    sites = {site.consumers: site.producer for site in fold_sites(text_unet()[0])}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert sites[tuple(f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))] == f"{block}.norm1"
    assert sites[f"{block}.attn2.to_q",] == f"{block}.norm2"
    assert sites[f"{block}.ff.net.0.proj",] == f"{block}.norm3"
    assert sites[f"{block}.ff.net.2",] == f"{block}.ff.net.0.proj"
    assert sites[f"{block}.attn2.to_out.0",] == f"{block}.attn2.to_v"
    assert sites["down_blocks.0.attentions.0.proj_in",] == "down_blocks.0.attentions.0.norm"


def test_both_modulations_of_an_adaln_layer_are_found() -> None:
    sites = {site.consumers: site for site in fold_sites(transformer()[0])}
    block = "transformer_blocks.1"
    attention = sites[tuple(f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))]
    assert (attention.producer, attention.modulation) == (f"{block}.norm1.linear", (0, 1))
    assert sites[f"{block}.ff.net.0.proj",].modulation == (3, 4)
    assert (f"{block}.ff.net.2",) not in sites, "GELU is not linear: no factor passes"


def test_only_sites_with_a_factor_are_folded() -> None:
    model, inputs = text_unet()
    sites = fold_sites(model)
    chosen = sites[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply_folds(
        model, sites, folds_of(sites, {chosen.consumers[0]: np.full(chosen.channels, 2.0, np.float32)}),
        lambda: model(**inputs, return_dict=False)[0].detach(),
    )  # fmt: skip
    changed = {
        name.rpartition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {chosen.producer, *chosen.consumers}


def test_a_fold_that_changes_the_function_is_refused() -> None:
    unet, inputs = text_unet()

    def run() -> Tensor:
        with torch.no_grad():
            output: Tensor = unet(**inputs, return_dict=False)[0]
        return output

    # A GroupNorm followed by SiLU is not linear: a factor does not pass.
    site = FoldSite("down_blocks.0.resnets.0.norm1", ("down_blocks.0.resnets.0.conv1",), 8)
    wrong = ChannelFold(site.producer, site.consumers, np.full(8, 3.0, np.float32))
    with pytest.raises(CalibrationError, match="changed the float output"):
        apply_folds(unet, [site], [wrong], run)
    with pytest.raises(CalibrationError, match=r"no place to fold 8 factors of down_blocks.0.resnets.0.conv1"):
        apply_folds(unet, fold_sites(unet), [wrong], run)


def test_a_layer_that_only_resembles_a_site_is_left_out() -> None:
    """Without a bias an adaLN layer has nowhere to keep its part of 1 + scale."""
    model, _ = transformer()
    for block in model.transformer_blocks:
        assert isinstance(block.norm1.linear, nn.Linear)
        block.norm1.linear.bias = None
    assert all(site.modulation is None for site in fold_sites(model))
