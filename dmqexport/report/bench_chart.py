"""A picture of a benchmark: every runtime and precision as a bar, the layers and operators that cost most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 930, 400, 190, 14, 8, 34
_FLOAT, _QUANTIZED = "#8a8a8a", "#1f5fa8"
#: The part of an operator's bar that lies beyond what the machine's peaks would take.
_BEYOND = "0.35"
_FLOATS = ("fp32", "fp16", "bf16")
_MOST_LAYERS, _MOST_OPERATORS = 20, 12


@dataclass(frozen=True)
class _Bar:
    """milliseconds to the right; ideal: what it would take at the machine's peaks, None where that is not known."""

    label: str
    milliseconds: float
    quantized: bool
    ideal: float | None = None
    note: str = ""


def bench_svg(document: Mapping[str, Any]) -> str:
    """An SVG document of what `dmqexport.bench.bench_bundle` returns with details: milliseconds to the right.

    An operator's bar is solid as far as the machine's peaks would take and pale from there: that is where time goes.
    """
    whole = [
        _Bar(f"{row['runtime']} {row['precision']}", row["median_ms"], row["precision"] not in _FLOATS)
        for row in document["runtimes"]
    ]
    mixed, trajectory = document["mixed"], document["trajectory"]
    whole += _pair(f"{mixed['rows']} table rows", mixed)
    steps = _pair(f"{trajectory['steps']} steps", trajectory)
    known = [row for row in document["layers"] if row["fp32_ms"] and row["quantized_ms"]]
    costly = sorted(known, key=lambda row: -float(row["fp32_ms"]))[:_MOST_LAYERS]
    layers = [bar for row in costly for bar in _pair(row["layer"], row)]
    share = "" if document["peaks"] is None else ", solid: at this machine's peaks"
    parts: list[str] = []
    y = 0
    title = f"batch {document['batch']}, {document['threads']} threads, ratio {document['ratio']:.3f}"
    for heading, bars in (
        (f"One call: {title}", whole),
        (f"A trajectory: {trajectory['pictures']:g} pictures", steps),
        ("Costliest layers", layers),
        (f"Operators, quantized{share}", _operators(document["operators"]["quantized"], quantized=True)),
        (f"Operators, fp32{share}", _operators(document["operators"]["fp32"], quantized=False)),
    ):
        if bars:
            y = _section(parts, y, heading, bars)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + _GAP}" width="{_WIDTH}" '
            f'height="{y + _GAP}" font-family="sans-serif" font-size="11">',
            f'<rect width="{_WIDTH}" height="{y + _GAP}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _pair(label: str, times: Mapping[str, Any]) -> list[_Bar]:
    """The bars of float and quantized."""
    return [_Bar(f"{label}, fp32", times["fp32_ms"], False), _Bar(f"{label}, quantized", times["quantized_ms"], True)]


def _operators(table: Sequence[Mapping[str, Any]], *, quantized: bool) -> list[_Bar]:
    """The costliest rows of a roofline table; in cache an operator may be faster than memory's peak."""
    bars = []
    for row in table[:_MOST_OPERATORS]:
        shapes = " × ".join(str(list(shape)).replace(" ", "") for shape in row["shapes"])
        reached = row.get("of_peak")
        ideal = None if reached is None else min(reached, 1.0) * row["ms"]
        note = "" if reached is None else f", {reached:.0%} of {row['bound']}"
        bars.append(_Bar(f"{row['count']} {row['op']} {shapes}", row["ms"], quantized, ideal, note))
    return bars


def _section(parts: list[str], y: int, heading: str, bars: Sequence[_Bar]) -> int:
    """Append one group of bars on a scale of their own; returns where the next begins."""
    parts.append(f'<text x="8" y="{y + 20}" font-weight="bold">{escape(heading)}</text>')
    y += _TOP
    longest = max(bar.milliseconds for bar in bars) or 1.0
    for bar in bars:
        scale = (_WIDTH - _LEFT - _RIGHT) / longest
        length = round(scale * bar.milliseconds, 1)
        solid = length if bar.ideal is None else round(scale * bar.ideal, 1)
        colour = _QUANTIZED if bar.quantized else _FLOAT
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(bar.label)}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{solid}" height="{_BAR}" fill="{colour}"/>'
        )
        if solid < length:
            parts.append(
                f'<rect x="{_LEFT + solid:g}" y="{y}" width="{length - solid:.4g}" height="{_BAR}" fill="{colour}" '
                f'fill-opacity="{_BEYOND}"/>'
            )
        parts.append(
            f'<text x="{_LEFT + length + 5}" y="{y + 11}">{_number(bar.milliseconds)} ms{escape(bar.note)}</text>'
        )
        y += _BAR + _GAP
    return y


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
