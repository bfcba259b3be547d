"""Sizes and budgets as people write them."""

import re
from dataclasses import dataclass
from enum import StrEnum

from dmqexport.errors import RecipeError

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_MOST = 2**60


def parse_bytes(text: str) -> int:
    """Bytes in `2.5MiB`, `400 MB`, `4GiB` or a plain number; RecipeError for anything else."""
    amount, unit = _amount(text)
    size = amount * _BYTES.get(unit, 1)
    if unit not in {"", *_BYTES} or not 1 <= size < _MOST:
        raise RecipeError(f"{text!r} is no size", hint="for example 2.5MiB, 400MB or 4GiB")
    return int(size)


class BudgetKind(StrEnum):
    """What a single budget limits."""

    JOINT_BITS = "bits"
    BYTES = "bytes"
    MILLISECONDS = "ms"


@dataclass(frozen=True)
class Budget:
    """One limit for a whole model: average bits of weights and activations together, bytes of weights, or latency."""

    kind: BudgetKind
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parse `2.5MiB`, `900kB`, `4.5bits` or `1.2ms`; raises RecipeError for anything else."""
        amount, unit = _amount(text)
        if amount > 0 and unit in _BYTES:
            return cls(BudgetKind.BYTES, amount * _BYTES[unit])
        if amount > 0 and unit in (BudgetKind.JOINT_BITS, BudgetKind.MILLISECONDS):
            return cls(BudgetKind(unit), amount)
        raise RecipeError(
            f"budget {text!r} is not a positive amount with a unit",
            hint="for example 2.5MiB (stored weights), 4.5bits (weights and activations together) or 1.2ms",
        )


def _amount(text: str) -> tuple[float, str]:
    """(number, unit in lower case) of `text`; the number is 0 where there is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    return (0.0, "") if match is None else (float(match[1]), match[2])
