"""The quantizer with gradients: what training sees of the codes that deployment computes."""

from typing import Any

import torch
from torch import Tensor


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor | int) -> Tensor:
        # Few passes over memory: training is bound by them, not by arithmetic.
        steps = values / scale
        codes = steps.round()
        torch.clamp(codes, -zero_point, levels - zero_point, out=codes)
        ctx.save_for_backward(steps, codes, scale, zero_point)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, codes, scale, zero_point = ctx.saved_tensors
        gradient = gradients[0]
        difference = codes - steps
        inside = difference.abs() <= 0.5  # what rounds to an end is inside
        passed = gradient * inside
        to_scale = to_zero = None
        if ctx.needs_input_grad[1]:
            to_scale = torch.where(inside, difference, codes).mul_(gradient).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            to_zero = (passed.sum_to_size(zero_point.shape) - gradient.sum_to_size(zero_point.shape)).mul_(scale)
        return passed if ctx.needs_input_grad[0] else None, to_scale, to_zero, None


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor | int) -> Tensor:
    """scale * clip(round_half_even(values / scale), -zero_point, levels - zero_point).

    values: float32, any shape; scale > 0 and zero_point (an integer, or an integer reached through
    `straight_through_round`) broadcast to it, as may levels = 2**bits - 1. Gradients: straight-through inside the
    range for values, LSQ's for the scale (arXiv:1902.08153, Eq. 3), LSQ+'s for the zero_point (arXiv:2004.09576,
    Eq. 4).
    """
    result: Tensor = _FakeQuantize.apply(values, scale, zero_point, levels)  # type: ignore[no-untyped-call]
    return result


class _RoundToCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        codes = steps.round()
        torch.clamp(codes, low, high, out=codes)
        ctx.save_for_backward(steps, codes)
        return codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, codes = ctx.saved_tensors
        return gradients[0] * ((codes - steps).abs_() <= 0.5), None, None


def round_to_codes(steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip(round_half_even(steps), low, high), straight-through inside; steps: values divided by their scale.

    codes * scale then has the exact derivative with respect to the scale, the codes. Where values are free to move
    with their scale, as weights are, that is better than LSQ's estimate, which holds the values still.
    """
    result: Tensor = _RoundToCodes.apply(steps, low, high)  # type: ignore[no-untyped-call]
    return result


def straight_through_round(values: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had happened."""
    return values + (values.round() - values).detach()
