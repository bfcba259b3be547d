"""Rotating hidden channels: the same float function, the way back, and flatter tensors for the quantizer."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from calib.equalize import fold_sites
from calib.range_search import search_activation
from calib.rotation import BLOCK, Rotation, original_weights, rotate_feed_forward, rotated_layers, unrotated
from dmqexport.errors import CalibrationError
from dmqexport.rotation_matrix import rotation_matrix
from tests.calib.test_equalize import text_unet, transformer


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs, return_dict=False)[0]
    return output


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128])
def test_the_matrix_is_orthogonal_and_spreads_a_mean(size: int) -> None:
    matrix = rotation_matrix(size).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-6)
    # A Hadamard matrix without signs would put size**0.5 into one column.
    most = np.abs(matrix.sum(axis=0)).max()
    assert most <= (1.0 if size in (1, 4, 16, 64) else 2**0.5) + 1e-6


@pytest.mark.parametrize("size", [0, 3, 12])
def test_other_sizes_have_no_matrix(size: int) -> None:
    with pytest.raises(ValueError, match="blocks of a power of two channels"):
        rotation_matrix(size)


@pytest.mark.parametrize("make", [text_unet, transformer], ids=["GEGLU", "GELU"])
def test_rotating_changes_nothing_in_float(make: Any) -> None:
    """In double precision but for the matrix, whose entries are float32."""
    model, inputs = make()
    before = run(model, inputs)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert rotated_layers(model) == {}
    rotate_feed_forward(model)
    rotated = rotated_layers(model)
    assert set(rotated) == {name for name, _ in model.named_modules() if name.endswith("ff.net.2")} != set()
    assert float((run(model, inputs) - before).abs().max() / before.abs().max()) <= 1e-5
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == {f"{name}.weight" for name in rotated}


def test_a_second_rotation_finds_nothing_left() -> None:
    model, _ = text_unet()
    rotate_feed_forward(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rotate_feed_forward(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_way_back_and_forth() -> None:
    model, inputs = text_unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = run(model, inputs)
    rotate_feed_forward(model)
    rotated = {name: value.clone() for name, value in model.state_dict().items()}
    find = original_weights(model, model.get_parameter)
    for name, value in before.items():
        torch.testing.assert_close(find(name), value, rtol=0, atol=1e-6)
    with unrotated(model):
        assert not any(isinstance(module, Rotation) for module in model.modules())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, rotated[name]) for name, value in model.state_dict().items())
    assert rotated_layers(model)


def test_it_comes_back_when_the_block_fails() -> None:
    model, _ = text_unet()
    rotate_feed_forward(model)
    rotated = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="on the way"), unrotated(model):
        raise RuntimeError("on the way")
    assert all(torch.equal(value, rotated[name]) for name, value in model.state_dict().items())


def test_no_factor_folds_across_a_rotation() -> None:
    model, _ = text_unet()
    before = {site.consumers for site in fold_sites(model)}
    rotate_feed_forward(model)
    after = {site.consumers for site in fold_sites(model)}
    assert before - after == {(name,) for name in rotated_layers(model)} != set()


class Feeding(nn.Module):
    def __init__(self, dim: int, inner: int, **options: Any) -> None:
        super().__init__()
        self.ff = FeedForward(dim, inner_dim=inner, **options)


def test_what_has_no_blocks_or_another_structure_is_left_alone() -> None:
    odd = Feeding(4, 15)
    other = Feeding(4, 16)
    other.ff.net[1] = nn.Identity()
    final = Feeding(4, 96, final_dropout=True)
    model = nn.ModuleDict({"odd": odd, "other": other, "final": final})
    rotate_feed_forward(model)
    assert rotated_layers(model) == {"final.ff.net.2": 32}
    assert isinstance(final.ff.net[3], nn.Dropout)


class Twice(nn.Module):
    """What looks like diffusers' and uses its dropout twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(4, 16), nn.Dropout(0.0), nn.Linear(16, 4)])

    def forward(self, tensor: Tensor) -> Tensor:
        output: Tensor = self.net[2](self.net[1](self.net[1](self.net[0](tensor)).relu()))
        return output


def test_what_only_looks_like_it_is_refused() -> None:
    Twice.__name__ = "FeedForward"
    with pytest.raises(CalibrationError, match="a FeedForward answers otherwise"):
        rotate_feed_forward(nn.ModuleDict({"ff": Twice()}))


def test_blocks_are_as_large_as_the_channels_allow() -> None:
    model = nn.ModuleDict({str(inner): Feeding(4, inner) for inner in (2, 24, 64, 320)})
    rotate_feed_forward(model)
    sizes = {int(name.split(".")[0]): size for name, size in rotated_layers(model).items()}
    assert sizes == {2: 2, 24: 8, 64: BLOCK, 320: BLOCK}


def test_a_feed_forward_with_few_large_values_is_quantized_better() -> None:
    """Products of normal values, as a GEGLU makes them, some channels larger than others."""
    generator = torch.Generator().manual_seed(0)
    value, gate = torch.randn(2, 4096, 256, generator=generator)
    hidden = value * torch.nn.functional.gelu(gate) * torch.rand(256, generator=generator)

    def noise(tensor: Tensor) -> float:
        row = tensor.reshape(1, -1)
        found = search_activation(row, torch.ones_like(row), row.amin(dim=1), row.amax(dim=1), 4)
        return float(found.error) / float(row.square().mean())

    assert noise(Rotation(BLOCK)(hidden)) < 0.4 * noise(hidden)
