"""How the arguments or the result of a module's call look: the tensors that hold a row an entry, and the constants."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmqexport.errors import CalibrationError


@dataclass(frozen=True)
class Slot:
    """A tensor [batch, *shape] of one row an entry."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class CallLayout:
    """A nest of tuples, lists and dicts with a Slot for every tensor that follows the batch; the rest is constant."""

    template: Any
    slots: tuple[Slot, ...]

    def extract(self, value: Any, batch: int, where: str, check: bool = True) -> list[Tensor]:
        """The tensors of the slots in `value`, in order.

        Raises CalibrationError when `value` is not of this layout: another shape, or a constant that changed.
        """
        found: list[Tensor | None] = [None] * len(self.slots)
        for expected, got in _pairs(self.template, value, where):
            if isinstance(expected, Slot):
                if not isinstance(got, Tensor) or tuple(got.shape) != (batch, *expected.shape):
                    shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                    raise CalibrationError(f"block {where!r}: got {shape}, expected {(batch, *expected.shape)}")
                found[expected.index] = got
            elif check and not _same(expected, got):
                raise CalibrationError(
                    f"block {where!r} is called with something that varies but has no batch axis: {_short(got)},"
                    f" was {_short(expected)}",
                    hint="such a model cannot be trained block by block",
                )
        return [tensor for tensor in found if tensor is not None]

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The nest with `tensors` in its slots."""

        def visit(part: Any) -> Any:
            if isinstance(part, Slot):
                return tensors[part.index]
            return part if isinstance(part, Tensor) else _map(visit, part)

        return visit(self.template)

    def zeros(self, batch: int) -> list[Tensor]:
        """Tensors for `rebuild` that hold nothing but zeros."""
        return [torch.zeros((batch, *slot.shape), dtype=slot.dtype) for slot in self.slots]


def layout_of(first: tuple[Any, int], second: tuple[Any, int], where: str) -> CallLayout:
    """The layout of two calls, each given with its batch size; the sizes must differ.

    Two sizes tell a batch axis from one that is as long by chance. Raises CalibrationError when the calls differ in
    more than their batch.
    """
    (one, size_one), (other, size_other) = first, second
    slots: list[Slot] = []
    leaves: list[Any] = []
    for left, right in _pairs(one, other, where):
        if _same(left, right):
            leaves.append(left)
        elif _follows_batch(left, size_one, right, size_other):
            slots.append(Slot(len(slots), tuple(left.shape[1:]), left.dtype))
            leaves.append(slots[-1])
        else:
            raise CalibrationError(
                f"{where}: calls differ in more than the batch: {_short(left)} and {_short(right)}",
                hint="such a model cannot be trained block by block",
            )
    return CallLayout(_replace_leaves(one, iter(leaves)), tuple(slots))


def _follows_batch(left: Any, size_left: int, right: Any, size_right: int) -> bool:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.dtype != right.dtype or left.ndim == 0:
        return False
    return (left.shape[0], right.shape[0]) == (size_left, size_right) and left.shape[1:] == right.shape[1:]


def _map(visit: Any, part: Any) -> Any:
    """`part` with `visit` applied to the elements, if it is a nest; else itself."""
    if isinstance(part, tuple):
        elements = [visit(item) for item in part]
        return type(part)(*elements) if hasattr(part, "_fields") else tuple(elements)
    if isinstance(part, list):
        return [visit(item) for item in part]
    if isinstance(part, dict):
        items = {key: visit(item) for key, item in part.items()}
        return items if type(part) is dict else type(part)(**items)  # diffusers' outputs are such dicts
    return part


def _replace_leaves(template: Any, leaves: Iterator[Any]) -> Any:
    def visit(part: Any) -> Any:
        return _map(visit, part) if isinstance(part, (tuple, list, dict)) else next(leaves)

    return visit(template)


def _pairs(template: Any, value: Any, where: str) -> Iterator[tuple[Any, Any]]:
    """Leaves of two nests of one shape, side by side."""
    if isinstance(template, (tuple, list)) and isinstance(value, (tuple, list)) and len(template) == len(value):
        for expected, got in zip(template, value, strict=True):
            yield from _pairs(expected, got, where)
    elif isinstance(template, dict) and isinstance(value, dict) and template.keys() == value.keys():
        for key, expected in template.items():
            yield from _pairs(expected, value[key], where)
    elif isinstance(template, (tuple, list, dict)) or isinstance(value, (tuple, list, dict)):
        raise CalibrationError(f"{where}: the call changed its form: {_short(template)} and {_short(value)}")
    else:
        yield template, value


def _same(expected: Any, got: Any) -> bool:
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        return expected.shape == got.shape and bool(torch.equal(expected, got))
    if isinstance(expected, Tensor) or isinstance(got, Tensor):
        return False
    return expected is got or bool(expected == got)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Slot):
        return f"a tensor (batch, {', '.join(map(str, value.shape))})"
    return repr(value)[:60]
