"""Sizes as people write them."""

import re

from dmqexport.errors import RecipeError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes in `2.5MiB`, `400 MB`, `4GiB` or a plain number; RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", text.lower())
    unit = None if match is None else match[2] if match[2] in _UNITS else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise RecipeError(f"{text!r} is no size", hint="for example 2.5MiB, 400MB or 4GiB")
    return int(float(match[1]) * _UNITS[unit])
