"""The quantizer with gradients: what training sees of the codes that deployment computes.

Training is bound by passes over memory and by which kernels make them: an operand that is one number, and a mask that
is a float, are what the vectorized kernels take. A clamp between tensors, a mask of bools or a `where` costs several
times as much for the same values.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ends = tuple[float, float]
"""The lowest and the highest code, where one pair serves the whole tensor."""


@cache
def _just_outside(ends: Ends) -> Ends:
    """The nearest float32 steps beyond which values are clipped: those that round to an end are inside."""
    low, high = np.float32(ends[0] - 0.5), np.float32(ends[1] + 0.5)
    return float(np.nextafter(low, np.float32(-np.inf))), float(np.nextafter(high, np.float32(np.inf)))


def _codes(steps: Tensor, low: Tensor, high: Tensor, ends: Ends | None) -> Tensor:
    codes = steps.round()
    if ends is not None:
        return codes.clamp_(*ends)
    return torch.minimum(torch.maximum(codes, low, out=codes), high, out=codes)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        levels: Tensor | int,
        factor: Tensor | None,
        ends: Ends | None,
    ) -> Tensor:
        steps = values / scale if factor is None else (values / factor).div_(scale)
        low, high = (zero_point, zero_point) if ends is not None else (-zero_point, levels - zero_point)
        # Codes are made again for the gradient: that costs less than keeping them.
        ctx.save_for_backward(steps, scale, low, high, factor)
        ctx.ends = ends
        return _codes(steps, low, high, ends).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, scale, low, high, factor = ctx.saved_tensors
        gradient, ends = gradients[0], ctx.ends
        _, scaled, moved, *_ = ctx.needs_input_grad
        codes = _codes(steps, low, high, ends)
        difference = codes - steps
        if ends is None:
            passed = difference.abs().le_(0.5).mul_(gradient)  # what rounds to an end is inside
        else:
            passed = torch.ops.aten.hardtanh_backward(gradient, steps, *_just_outside(ends))
        to_scale = to_zero = None
        if moved:
            to_zero = (passed.sum_to_size(low.shape) - gradient.sum_to_size(low.shape)).mul_(scale)
        if scaled:
            to_scale = codes.mul_(gradient - passed).addcmul_(passed, difference).sum_to_size(scale.shape)
        if factor is not None:
            passed = passed.div_(factor)
        return passed if ctx.needs_input_grad[0] else None, to_scale, to_zero, None, None, None


def fake_quantize(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    levels: Tensor | int,
    factor: Tensor | None = None,
    ends: Ends | None = None,
) -> Tensor:
    """scale * clip(round_half_even(values / factor / scale), -zero_point, levels - zero_point).

    values: float32, any shape; scale > 0 and zero_point (an integer, or an integer reached through
    `straight_through_round`) broadcast to it, as may levels = 2**bits - 1 and a constant factor. ends: what the codes
    are clipped to, as numbers, where scale and zero_point have one element each. Gradients: straight-through inside
    the range for values, LSQ's for the scale (arXiv:1902.08153, Eq. 3), LSQ+'s for the zero_point (arXiv:2004.09576,
    Eq. 4).
    """
    result: Tensor = _FakeQuantize.apply(values, scale, zero_point, levels, factor, ends)  # type: ignore[no-untyped-call]
    return result


class _RoundToCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        codes = _codes(steps, low, high, None)
        ctx.save_for_backward(steps, codes)
        return codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, codes = ctx.saved_tensors
        return (codes - steps).abs_().le_(0.5).mul_(gradients[0]), None, None


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
