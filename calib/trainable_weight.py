"""One weight in training: the float weight behind its codes, its rounding, or a low-rank adapter."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from calib.fake_quantize import round_to_codes
from calib.optimizer import ParameterGroup
from dmqexport.quant_types import CodeArray, FloatArray, WeightQuant, code_range

WeightMode = Literal["none", "full", "rounding", "adapter"]

# AdaRound's rectified sigmoid (arXiv:2004.10568, Eq. 23): stretched, so that 0 and 1 are reached.
_STRETCH, _SHIFT = 1.2, 0.1
# In steps: how far from its code's centre a weight may start. Second-order rounding moves many weights away from their
# nearest code; started at the edge, Adam's first steps, all of one size, would undo it at random.
_EDGE = 0.3


class TrainableWeight(nn.Module):
    """codes → weight, with a gradient into what the mode trains. All modes start at the plan's codes exactly.

    full: the float weight in steps of its scale, near its code where second-order rounding chose another code than
    the nearest; rounding: floor plus a variable in [0, 1]; adapter: codes * scale + B A (EfficientDM, Eq. 6).
    """

    scale: Tensor
    zero_point: Tensor
    base: Tensor
    hard: bool

    def __init__(self, original: Tensor, codes: CodeArray, plan: WeightQuant, mode: WeightMode, rank: int) -> None:
        super().__init__()
        self.plan, self.mode = plan, mode
        self.levels = 2**plan.bits - 1
        self.hard = False
        self.held: Tensor | None = None
        self.shape = original.shape
        spread = (-1, *([1] * (original.ndim - 1)))
        self.register_buffer("scale", torch.from_numpy(plan.scale.copy()).reshape(spread), persistent=False)
        self.register_buffer(
            "zero_point", torch.from_numpy(plan.zero_point.copy()).float().reshape(spread), persistent=False
        )
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        start = torch.from_numpy(codes.copy()).float()
        if mode == "rounding":
            self._start_rounding(original, start)
        elif mode == "adapter":
            out, width = original.shape[0], original[0].numel()
            self.register_buffer("base", start)
            self.up = nn.Parameter(torch.zeros(out, rank))
            self.down = nn.Parameter(torch.randn(rank, width, generator=torch.Generator().manual_seed(out * width)))
            self.down.data.mul_(width**-0.5)
        else:
            steps = original / self.scale
            steps = torch.maximum(torch.minimum(steps, start + _EDGE), start - _EDGE)
            # A matrix [out, k], as optimizers of matrices want it.
            self.latent = nn.Parameter(steps.flatten(1), requires_grad=mode == "full")

    def _start_rounding(self, original: Tensor, start: Tensor) -> None:
        steps = original / self.scale
        # The pair of codes that holds the float value, or the pair at the plan's code when that lies elsewhere.
        floor = steps.floor()
        floor = torch.maximum(torch.minimum(floor, start), start - 1)
        self.register_buffer("base", floor)
        share = (steps - floor).clamp(0.02, 0.98)
        up = start > floor
        share = torch.where(up, share.clamp_min(0.51), share.clamp_max(0.49))
        self.variable = nn.Parameter(-torch.log(_STRETCH / (share + _SHIFT) - 1))

    def groups(self, weights: float, rounding: float, adapter: float) -> list[ParameterGroup]:
        """What the mode trains, with learning rates in units of a 4-bit scale over its range (EfficientDM)."""
        unit = self.levels / 15
        if self.mode == "full":
            return [ParameterGroup([self.latent], weights * unit, matrices=True)]
        if self.mode == "rounding":
            return [ParameterGroup([self.variable], rounding)]
        if self.mode == "adapter":
            return [ParameterGroup([self.up, self.down], adapter * unit * float(self.scale.mean()))]
        return []

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what an earlier training of this mode left, when this weight's plan is what that one froze.

        state: as `state_dict` gave. Its log_scale is in the plan's scale already and starts anew; an adapter keeps what
        it means in steps of that scale. Codes and scales are those of the plan.
        """
        own = {**state, "log_scale": torch.zeros_like(self.log_scale)}
        if self.mode == "adapter":
            own["up"] = state["up"] * state["log_scale"].exp().reshape(-1, 1)
        self.load_state_dict(own)

    def forward(self) -> Tensor:
        """The fake-quantized weight, float32, shape of the original; `held` in its place where that is set."""
        return self.quantized() if self.held is None else self.held

    def quantized(self) -> Tensor:
        """The fake-quantized weight, made anew."""
        scale = self.scale * self.log_scale.exp()
        if self.mode == "rounding":
            soft = self._soft()
            codes = self.base + (soft if not self.hard else (soft >= 0.5).float())
            return codes.clamp(-self.zero_point, self.levels - self.zero_point) * scale
        return round_to_codes(self._steps(), -self.zero_point, self.levels - self.zero_point) * scale

    def _steps(self) -> Tensor:
        if self.mode == "adapter":
            return self.base + (self.up @ self.down).reshape(self.base.shape) / self.scale
        return self.latent.reshape(self.shape)

    def _soft(self) -> Tensor:
        return (torch.sigmoid(self.variable) * _STRETCH - _SHIFT).clamp(0, 1)

    def harden(self) -> None:
        """Fix the rounding."""
        if self.mode == "rounding":
            self.hard = True

    def soften(self) -> None:
        """Let the rounding move again."""
        self.hard = False

    def regularizer(self, progress: float) -> Tensor:
        """Σ 1 − |2h − 1|^β, β from 20 to 2 as `progress` goes from 0 to 1; 0 for other modes."""
        if self.mode != "rounding" or self.hard:
            return torch.zeros(())
        beta = 2 + 18 * max(0.0, 1 - progress)
        return (1 - (2 * self._soft() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def freeze(self) -> tuple[WeightQuant, CodeArray]:
        """qparams and signed codes, as the plan stores them."""
        scale32 = (self.scale * self.log_scale.exp()).flatten()
        scale: FloatArray = scale32.numpy().astype(np.float32)
        qparams = WeightQuant(self.plan.bits, scale, self.plan.zero_point)
        low, high = code_range(self.plan.bits, self.plan.zero_point)
        shape = self.zero_point.shape
        if self.mode == "rounding":
            codes = (self.base + (self._soft() >= 0.5).float()).numpy()
        else:
            codes = torch.round(self._steps()).numpy()
        clipped: CodeArray = np.clip(codes, low.reshape(shape), high.reshape(shape)).astype(np.int8)
        return qparams, clipped
