"""The Pareto sweep as one SVG file: size of the weights against distortion, predicted and measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 20, 54, 48
#: (key, dashes, filled) of the two figures every point has.
_FIGURES = (("predicted_distortion", "4 3", False), ("measured_distortion", "", True))
_COLOURS = {"uniform": "#8a5a00"}
_OTHER = "#1f5fa8"


def pareto_svg(points: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document; x: nominal bytes of the weights in MB, y: distortion, logarithmic.

    points: `method`, `nominal_bytes`, `predicted_distortion`, `measured_distortion` (None or not positive: left out).
    """
    values = [point[key] for point in points for key, _, _ in _FIGURES if (point[key] or 0.0) > 0]
    sizes = [point["nominal_bytes"] / 1e6 for point in points]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
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
            label = f"{method}, {key.removesuffix('_distortion')}"
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
