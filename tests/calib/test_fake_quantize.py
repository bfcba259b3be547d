"""The differentiable quantizer gives the codes of the plain one, and the published gradients."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calib.fake_quantize import fake_quantize, straight_through_round
from dmqexport.quant_types import WeightQuant, dequantize_weight, quantize_weight


def gradients(values: Tensor, scale: float, zero_point: float, levels: int) -> tuple[Tensor, float, float]:
    leaves = values.clone().requires_grad_(), torch.tensor(scale).requires_grad_(), torch.tensor(zero_point)
    leaves[2].requires_grad_()
    fake_quantize(*leaves, levels).sum().backward()  # type: ignore[no-untyped-call]
    assert leaves[0].grad is not None
    return leaves[0].grad, float(leaves[1].grad), float(leaves[2].grad)  # type: ignore[arg-type]


@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_the_values_are_those_of_the_deployed_quantizer(bits: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(3, 50)).astype(np.float32)
    scale = generator.uniform(0.01, 0.5, size=3).astype(np.float32)
    zero_point = generator.integers(0, 2**bits, size=3)
    qparams = WeightQuant(bits, scale, zero_point)

    expected = dequantize_weight(quantize_weight(weight, qparams), qparams)

    column = torch.from_numpy(scale).reshape(-1, 1), torch.from_numpy(zero_point).float().reshape(-1, 1)
    actual = fake_quantize(torch.from_numpy(weight), *column, 2**bits - 1)
    assert np.array_equal(actual.numpy(), expected)


def test_gradients_inside_and_beyond_the_range() -> None:
    # codes -1, 0, 1, 2 of a 2-bit quantizer with zero_point 1 and scale 0.5
    values = torch.tensor([-3.0, -0.4, 0.1, 0.8, 1.2, 9.0])
    to_values, to_scale, to_zero = gradients(values, 0.5, 1.0, 3)
    assert to_values.tolist() == [0, 1, 1, 1, 1, 0]
    steps = [-0.8, 0.2, 1.6, 2.4]
    codes = [-1, 0, 2, 2]
    inside = sum(code - step for code, step in zip(codes, steps, strict=True))
    assert np.isclose(to_scale, -1 + 2 + inside, atol=1e-6)  # LSQ: the end codes beyond, code minus steps inside
    assert np.isclose(to_zero, -2 * 0.5)  # LSQ+: both clipped values follow the range down


def test_a_per_sample_scale_gets_its_own_samples_gradient() -> None:
    values = torch.tensor([[0.3, 5.0], [0.3, 5.0]])
    scale = torch.tensor([[0.5], [0.1]], requires_grad=True)
    fake_quantize(values, scale, torch.zeros(2, 1), 3).sum().backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    assert torch.allclose(scale.grad.flatten(), torch.tensor([1 - 0.6 + 3, 3 - 3 + 3]), atol=1e-5)


def test_rounding_passes_its_gradient_on() -> None:
    value = torch.tensor([0.5, 1.5, 2.4], requires_grad=True)
    rounded = straight_through_round(value)
    rounded.sum().backward()  # type: ignore[no-untyped-call]
    assert rounded.tolist() == [0, 2, 2]
    assert value.grad is not None
    assert value.grad.tolist() == [1, 1, 1]
