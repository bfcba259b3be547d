"""Pictures of a bit allocation: who got how many bits, and size against distortion over a sweep of budgets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from dmqexport.report.document import Layer

_NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 20, 54, 48
#: (key, dashes, filled) of the two figures every point has.
_FIGURES = (("predicted_distortion", "4 3", False), ("measured_distortion", "", True))
_COLOURS = {"uniform": "#8a5a00"}
_OTHER = "#1f5fa8"


def pareto_svg(points: Sequence[Mapping[str, Any]], *, inline: bool = False) -> str:
    """An SVG document; x: nominal bytes of the weights in MB, y: distortion, logarithmic.

    points: `method`, `nominal_bytes`, `predicted_distortion`, `measured_distortion` (None or not positive: left out).
    inline: for a place inside HTML, which knows SVG without being told the namespace.
    """
    values = [point[key] for point in points for key, _, _ in _FIGURES if (point[key] or 0.0) > 0]
    sizes = [point["nominal_bytes"] / 1e6 for point in points]
    parts = [
        f'<svg{"" if inline else _NAMESPACE} viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    if not values:
        return "\n".join([*parts, "</svg>\n"])
    bottom = math.floor(math.log10(min(values)))
    top = max(math.ceil(math.log10(max(values))), bottom + 1)
    left, right = math.floor(min(sizes) * 4) / 4, max(math.ceil(max(sizes) * 4) / 4, math.floor(min(sizes) * 4) / 4 + 1)

    def x(size: float) -> float:
        return round(float(_LEFT + (size - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)), 1)

    def y(value: float) -> float:
        share: float = (math.log10(value) - bottom) / (top - bottom)
        return round(float(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)), 1)

    for power in range(bottom, top + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{_LEFT}" y1="{at}" x2="{_WIDTH - _RIGHT}" y2="{at}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{10.0**power:g}</text>')
    for index in range(5):
        size = left + (right - left) * index / 4
        parts.append(f'<text x="{x(size)}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{size:.2f}</text>')
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">weights, MB (nominal)</text>'
        f'<text x="14" y="{_HEIGHT / 2}" transform="rotate(-90 14 {_HEIGHT / 2})" text-anchor="middle">'
        "distortion</text>"
    )
    legend = 0
    for method in dict.fromkeys(str(point["method"]) for point in points):
        colour = _COLOURS.get(method, _OTHER)
        for key, dashes, filled in _FIGURES:
            series = sorted(
                (point["nominal_bytes"] / 1e6, float(point[key]))
                for point in points
                if point["method"] == method and (point[key] or 0.0) > 0
            )
            label = f"{escape(method)}, {key.removesuffix('_distortion')}"
            line = " ".join(f"{x(size)},{y(value)}" for size, value in series)
            stroke = f'stroke="{colour}" stroke-dasharray="{dashes}"' if dashes else f'stroke="{colour}"'
            parts.append(f'<polyline points="{line}" fill="none" {stroke}/>')
            fill = colour if filled else "#ffffff"
            for size, value in series:
                parts.append(
                    f'<circle cx="{x(size)}" cy="{y(value)}" r="3.5" fill="{fill}" stroke="{colour}">'
                    f"<title>{label}: {size:.3f} MB, {value:.4g}</title></circle>"
                )
            place = _LEFT + 8 + 290 * (legend % 2), 18 + 16 * (legend // 2)
            parts.append(f'<circle cx="{place[0]}" cy="{place[1]}" r="3.5" fill="{fill}" stroke="{colour}"/>')
            parts.append(f'<text x="{place[0] + 9}" y="{place[1] + 4}">{label}</text>')
            legend += 1
    return "\n".join([*parts, "</svg>\n"])


def bits_svg(layers: Sequence[Layer]) -> Markup | None:
    """Bars of weight bits upwards and activation bits downwards, a layer each, for HTML; None without layers."""
    quantized = [layer for layer in layers if layer.nominal_bits.weight]
    if not quantized:
        return None
    most = max(max(layer.nominal_bits.weight or 0, layer.nominal_bits.activation or 0) for layer in quantized)
    wide, unit, middle = 7, 10 if most <= 8 else 5, 92
    width = len(quantized) * wide + 40
    parts = [
        f'<svg viewBox="0 0 {width} {2 * middle}" width="{width}" '
        f'height="{2 * middle}" font-family="sans-serif" font-size="10">'
        f'<text x="0" y="{middle - 30}" fill="{_OTHER}">weight</text>'
        f'<text x="0" y="{middle + 38}" fill="{_COLOURS["uniform"]}">act.</text>'
    ]
    for index, layer in enumerate(quantized):
        weight, activation = layer.nominal_bits.weight or 0, layer.nominal_bits.activation or 0
        at = 38 + index * wide
        parts.append(
            f"<g><title>{escape(layer.name)}: w{weight}a{activation or 16:.3g}</title>"
            f'<rect x="{at}" y="{middle - weight * unit}" width="{wide - 1}" height="{weight * unit}" fill="{_OTHER}"/>'
            f'<rect x="{at}" y="{middle + 2}" width="{wide - 1}" height="{activation * unit:g}" '
            f'fill="{_COLOURS["uniform"]}"/></g>'
        )
    return Markup("".join([*parts, "</svg>"]))
