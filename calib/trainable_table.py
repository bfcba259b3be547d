"""Activation tables in training, and the quantizers that read them.

A sampler's batch is of one timestep, so that one row serves every sample: all quantizers then take scalars, which the
vectorized kernels of `fake_quantize` are made for. Their values are gathered once a call, for all of them together:
one by one, the dozen operations on a handful of numbers took as long as the quantizing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.fake_quantize import Ends, fake_quantize, straight_through_round
from calib.quantizer import RowContext
from dmqexport.errors import CalibrationError
from dmqexport.quant_types import CENTERED_ZERO_POINT, MAX_BITS, REMAINDER_STEPS, ActivationQuant


@dataclass(frozen=True)
class QuantizerValues:
    """scale, integer zero_point and 2**bits - 1 of one quantizer, each a scalar or [batch]; ends: of scalars, the
    lowest and the highest code."""

    scale: Tensor
    zero_point: Tensor
    levels: Tensor
    ends: Ends | None


@dataclass(frozen=True)
class _PlanValues:
    """What the plan holds of several tables, [rows, n] or [n]; centered: bool, whose zero_point stays where it is."""

    scale: Tensor
    zero_point: Tensor
    levels: Tensor
    centered: list[bool]

    @staticmethod
    def of(plans: Sequence[ActivationQuant]) -> "_PlanValues":
        """Of tables with equally many rows; those of a single row as vectors."""

        def stacked(columns: list[Any]) -> Tensor:
            found = torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
            return found[0] if len(found) == 1 else found

        levels = stacked([2.0**plan.widths - 1 for plan in plans])
        scale, zero_point = stacked([plan.scale for plan in plans]), stacked([plan.zero_point for plan in plans])
        return _PlanValues(scale, zero_point, levels, [_centered(plan) for plan in plans])

    def at(self, rows: Tensor) -> "_PlanValues":
        """These rows of them."""
        return _PlanValues(self.scale[rows], self.zero_point[rows], self.levels[rows], self.centered)

    def moved(self, theta: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """scale, zero_point and levels after training."""
        shifted = torch.minimum((self.zero_point + offset).clamp_min(0), self.levels)
        return self.scale * theta.exp(), straight_through_round(shifted), self.levels


class Tables(nn.Module):
    """All activation tables: per-row columns in one embedding, tensors that ignore the timestep in one vector.

    θ of the scales and offsets of the zero_points, float32; [rows, n] and [m].
    """

    def __init__(self, rows: int, context: RowContext) -> None:
        super().__init__()
        self.context = context
        self.row_count = rows
        self._plans: list[ActivationQuant] = []
        self._columns: list[tuple[bool, int]] = []
        self._counts = {True: 0, False: 0}
        self._plan_of: dict[bool, _PlanValues] = {}
        self._gathered: dict[bool, list[QuantizerValues]] = {}

    def add(self, qparams: ActivationQuant) -> int:
        """Register a table; returns its index."""
        varies = qparams.rows > 1
        self._plans.append(qparams)
        self._columns.append((varies, self._counts[varies]))
        self._counts[varies] += 1
        return len(self._plans) - 1

    def build(self, train: bool) -> None:
        """Allocate the parameters once every table is registered."""
        varying, constant = self._counts[True], self._counts[False]
        for kind in ("scale", "zero_point"):
            rows = nn.Parameter(torch.zeros(self.row_count, varying), requires_grad=train and varying > 0)
            single = nn.Parameter(torch.zeros(constant), requires_grad=train and constant > 0)
            self.register_parameter(f"{kind}_rows", rows)
            self.register_parameter(f"{kind}_single", single)
        for varies in (True, False):
            plans = [plan for plan, (own, _) in zip(self._plans, self._columns, strict=True) if own == varies]
            if plans:
                self._plan_of[varies] = _PlanValues.of(plans)

    def forget(self) -> None:
        """Drop the gathered rows: a new batch, or new parameters."""
        self._gathered.clear()

    def values(self, index: int) -> QuantizerValues:
        """What table `index` says for the running batch; all tables are gathered at once, when the first is read."""
        varies, position = self._columns[index]
        if varies not in self._gathered:
            self._gathered[varies] = self._gather(varies)
        return self._gathered[varies][position]

    def _gather(self, varies: bool) -> list[QuantizerValues]:
        plan, rows = self._plan_of[varies], self.context.rows
        if not varies:
            moved = plan.moved(self.get_parameter("scale_single"), self.get_parameter("zero_point_single"))
            return _scalars(*moved, plan.centered)
        if bool((rows == rows[0]).all()):  # one row serves the batch, as in every call of a sampler
            rows = rows[:1]
        theta, offset = (
            F.embedding(rows, self.get_parameter(f"{kind}_rows"), sparse=True) for kind in ("scale", "zero_point")
        )
        scale, zero_point, levels = plan.at(rows).moved(theta, offset)
        if len(rows) > 1:
            return _split(scale.unbind(1), zero_point.unbind(1), levels.unbind(1), plan.centered)
        return _scalars(scale[0], zero_point[0], levels[0], plan.centered)

    def rows_of(self, index: int, kind: str) -> Tensor:
        """θ or offset of table `index`, all rows: [rows] or [1]."""
        varies, position = self._columns[index]
        if varies:
            return self.get_parameter(f"{kind}_rows").detach()[:, position]
        return self.get_parameter(f"{kind}_single").detach()[position : position + 1]

    def set_rows(self, index: int, kind: str, values: Tensor) -> None:
        """Write back what `rows_of` gave."""
        varies, position = self._columns[index]
        with torch.no_grad():
            if varies:
                self.get_parameter(f"{kind}_rows")[:, position] = values
            else:
                self.get_parameter(f"{kind}_single")[position] = values[0]

    def frozen(self, index: int) -> ActivationQuant:
        """Table `index` as the plan stores it."""
        plan = self._plans[index]
        scale = torch.from_numpy(plan.scale.copy()) * self.rows_of(index, "scale").exp()
        zero_point = torch.from_numpy(plan.zero_point.copy())
        if not _centered(plan):
            moved = (zero_point + self.rows_of(index, "zero_point")).round()
            zero_point = torch.minimum(moved.clamp_min(0), 2 ** torch.from_numpy(plan.widths.copy()) - 1).to(
                torch.int64
            )
        found = ActivationQuant.from_rows(plan.widths, scale.numpy(), zero_point.numpy(), gain=plan.gain)
        return replace(found, channel_factor=plan.channel_factor)


def _split(
    scale: Sequence[Tensor], zero_point: Sequence[Tensor], levels: Sequence[Tensor], centered: Sequence[bool]
) -> list[QuantizerValues]:
    """One for each quantizer, of [batch] each."""
    found = zip(scale, zero_point, levels, centered, strict=True)
    return [QuantizerValues(own, at.detach() if fixed else at, top, None) for own, at, top, fixed in found]


def _scalars(scale: Tensor, zero_point: Tensor, levels: Tensor, centered: Sequence[bool]) -> list[QuantizerValues]:
    """One for each element of the vectors, with its ends."""
    split = _split(scale.unbind(), zero_point.unbind(), levels.unbind(), centered)
    ends = zip((-zero_point).tolist(), (levels - zero_point).tolist(), strict=True)
    return [replace(values, ends=own) for values, own in zip(split, ends, strict=True)]


def _centered(plan: ActivationQuant) -> bool:
    return plan.bits == MAX_BITS and bool(np.all(plan.zero_point == CENTERED_ZERO_POINT))


class TrainableActivation:
    """Fake-quantizes one tensor, and its `remainder`, with rows gathered per sample; its readers share it."""

    def __init__(self, name: str, plan: ActivationQuant, tables: Tables, remainder: bool = False) -> None:
        self.name, self.plan, self.tables, self.remainder = name, plan, tables, remainder
        self.index = tables.add(plan)
        self._factor = None if plan.channel_factor is None else torch.from_numpy(plan.channel_factor.copy())
        self._gain = None if plan.gain is None else torch.from_numpy(plan.gain.copy())
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Quantized and dequantized, same shape; the very same tensor is quantized once."""
        if self._last is not None and self._last[0] is tensor:
            return self._last[1]
        factor, found = self._factor, self.tables.values(self.index)
        if factor is not None and tensor.ndim == 4:
            factor = factor.reshape(-1, 1, 1)
        parts = (found.scale, found.zero_point, found.levels)
        if self.plan.rows > 1:
            rows = self.tables.context.rows
            if rows.shape[0] != tensor.shape[0]:
                raise CalibrationError(f"{self.name}: batch {tensor.shape[0]} but {rows.shape[0]} timesteps")
            if found.ends is None:
                shape = (-1, *([1] * (tensor.ndim - 1)))
                parts = (parts[0].reshape(shape), parts[1].reshape(shape), parts[2].reshape(shape))
        result = fake_quantize(tensor, *parts, factor, found.ends)
        if self.remainder:
            rest = (tensor if factor is None else tensor / factor) - result
            result = result + fake_quantize(rest, parts[0] / REMAINDER_STEPS, *parts[1:], None, found.ends)
        if self._gain is not None:
            result = result * self._gain_of(result)
        self._last = (tensor, result)
        return result

    def _gain_of(self, tensor: Tensor) -> Tensor | float:
        """The gain of every sample's row; a number where they have one: it stays what the plan says."""
        assert self._gain is not None
        rows = self.tables.context.rows
        if bool((rows == rows[0]).all()):
            return float(self._gain[rows[0]])
        return self._gain[rows].reshape(-1, *([1] * (tensor.ndim - 1)))

    def forget(self) -> None:
        """Drop the memory of the last tensor."""
        self._last = None
