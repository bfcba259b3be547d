"""A picture of a benchmark: every runtime and precision as a bar, then the layers that cost most."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 760, 330, 90, 14, 8, 34
_FLOAT, _QUANTIZED = "#8a8a8a", "#1f5fa8"
_FLOATS = ("fp32", "fp16", "bf16")
_MOST_LAYERS = 20


def bench_svg(document: Mapping[str, Any]) -> str:
    """An SVG document of what `dmqexport.bench.bench_bundle` returns with details: milliseconds to the right."""
    whole = [
        (f"{row['runtime']} {row['precision']}", row["median_ms"], row["precision"] not in _FLOATS)
        for row in document["runtimes"]
    ]
    mixed, trajectory = document["mixed"], document["trajectory"]
    whole += _pair(f"{mixed['rows']} table rows", mixed)
    steps = _pair(f"{trajectory['steps']} steps", trajectory)
    known = [row for row in document["layers"] if row["fp32_ms"] and row["quantized_ms"]]
    costly = sorted(known, key=lambda row: -float(row["fp32_ms"]))[:_MOST_LAYERS]
    layers = [bar for row in costly for bar in _pair(row["layer"], row)]
    parts: list[str] = []
    y = 0
    title = f"batch {document['batch']}, {document['threads']} threads, ratio {document['ratio']:.3f}"
    for heading, bars in (
        (f"One call: {title}", whole),
        (f"A trajectory: {trajectory['pictures']:g} pictures", steps),
        ("Costliest layers", layers),
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


def _pair(label: str, times: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """The bars of float and quantized."""
    return [(f"{label}, fp32", times["fp32_ms"], False), (f"{label}, quantized", times["quantized_ms"], True)]


def _section(parts: list[str], y: int, heading: str, bars: Sequence[tuple[str, float, bool]]) -> int:
    """Append one group of bars on a scale of their own; returns where the next begins."""
    parts.append(f'<text x="8" y="{y + 20}" font-weight="bold">{escape(heading)}</text>')
    y += _TOP
    longest = max(milliseconds for _, milliseconds, _ in bars) or 1.0
    for label, milliseconds, quantized in bars:
        length = round((_WIDTH - _LEFT - _RIGHT) * milliseconds / longest, 1)
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{length}" height="{_BAR}" fill="{_QUANTIZED if quantized else _FLOAT}"/>'
            f'<text x="{_LEFT + length + 5}" y="{y + 11}">{milliseconds:.3g} ms</text>'
        )
        y += _BAR + _GAP
    return y
