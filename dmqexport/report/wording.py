"""Numbers as people read them; one function a kind of quantity, so that every table agrees."""

from collections.abc import Callable

NOT_MEASURED = "not measured"

Form = Callable[[float], str]


def decibels(value: float) -> str:
    """Return 21.34 as '21.3 dB'."""
    return f"{value:.1f} dB"


def size(value: float) -> str:
    """Return 14235648 as '14.2 MB' (decimal units, as storage is sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{_significant(value)} {unit}"
        value /= 1000
    return f"{_significant(value)} TB"


def count(value: float) -> str:
    """Return 3731203 as '3.73 M'."""
    if value < 10_000:
        return f"{value:,.0f}"
    for unit in ("k", "M", "G"):
        value /= 1000
        if value < 1000:
            return f"{_significant(value)} {unit}"
    return f"{_significant(value / 1000)} T"


def duration(value: float) -> str:
    """Return 3725.0 seconds as '1 h 2 min'."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    if minutes < 60:
        seconds = round(value)
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{minutes // 60} h {minutes % 60} min"


def milliseconds(value: float) -> str:
    """Return 61.27 as '61.3 ms'."""
    return f"{_significant(value)} ms"


def percent(value: float) -> str:
    """Return 0.953 as '95.3 %'."""
    return f"{value * 100:.1f}".removesuffix(".0") + " %"


def times(value: float) -> str:
    """Return 1.93 as '1.93×'."""
    return f"{_significant(value)}×"


def plain(value: float) -> str:
    """Return a number without a unit, at four significant digits."""
    return f"{value:.4g}"


def measured(value: float | None, form: Form) -> str:
    """Return the value in words, or say that there is none."""
    return NOT_MEASURED if value is None else form(value)


def _significant(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"
