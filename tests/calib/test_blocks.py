"""Every planned layer belongs to exactly one block, whatever the family, and blocks come in execution order."""

from collections.abc import Callable

import pytest
import torch
from block_models import FAMILIES, Denoiser, conditional, dit
from torch import Tensor, nn

from calib.blocks import Block, find_blocks
from dmqexport.errors import CalibrationError


def blocks_of(denoiser: Denoiser) -> tuple[Block, ...]:
    inputs = denoiser.data.select(torch.arange(2))
    return find_blocks(denoiser.model, lambda: denoiser.run(inputs), denoiser.layers())


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_layer_is_in_one_block_in_execution_order(make: Callable[[], Denoiser]) -> None:
    denoiser = make()
    blocks = blocks_of(denoiser)
    assert [layer for block in blocks for layer in block.layers] == denoiser.layers()
    names = [block.name for block in blocks]
    assert not any(other.startswith(f"{name}.") for name in names for other in names)


def test_blocks_of_a_unet() -> None:
    blocks = {block.name: block.layers for block in blocks_of(conditional())}
    lone = {name for name, layers in blocks.items() if layers == (name,)}
    attention = "down_blocks.0.attentions.0"
    assert {"conv_in", "conv_out", "time_embedding.linear_1", f"{attention}.proj_in", f"{attention}.proj_out"} <= lone
    assert {"down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"} <= lone
    assert f"{attention}.transformer_blocks.0.attn2.to_k" in blocks[f"{attention}.transformer_blocks.0"]
    assert blocks["mid_block.resnets.1"] == tuple(
        f"mid_block.resnets.1.{name}" for name in ("conv1", "time_emb_proj", "conv2")
    )


def test_attentions_between_residual_blocks_stand_alone() -> None:
    blocks = {block.name: block.layers for block in blocks_of(FAMILIES["unconditional"]())}
    assert len(blocks["down_blocks.1.attentions.0"]) == 4


def test_a_transformer_block_is_one_block() -> None:
    blocks = {block.name: block.layers for block in blocks_of(dit())}
    assert len([layer for layer in blocks["transformer_blocks.1"] if layer.endswith(("to_q", "linear_2"))]) >= 1
    assert "pos_embed.proj" in blocks


class Repeating(nn.Module):
    """A block that runs twice around a layer that runs twice, and a layer that never runs."""

    class InnerBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, values: Tensor) -> Tensor:
            result: Tensor = self.layer(values)
            return result

    def __init__(self) -> None:
        super().__init__()
        self.block = Repeating.InnerBlock()
        self.once = nn.Linear(2, 2)
        self.never = nn.Linear(2, 2)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.once(self.block(self.block(values)))
        return result


@pytest.mark.parametrize(
    ("layer", "message"),
    [("block.layer", "'block.layer' runs 2 times"), ("never", "'never' runs 0 times"), ("nowhere", "runs 0 times")],
)
def test_layers_that_no_block_owns_are_refused(layer: str, message: str) -> None:
    model = Repeating()
    assert [block.name for block in find_blocks(model, lambda: model(torch.zeros(1, 2)), ["once"])] == ["once"]
    with pytest.raises(CalibrationError, match=message):
        find_blocks(model, lambda: model(torch.zeros(1, 2)), ["once", layer])


def test_hooks_are_gone_afterwards() -> None:
    denoiser = conditional()
    blocks_of(denoiser)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.model.modules())
