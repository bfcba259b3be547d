"""ablation.html: the table of methods, a strip of pictures for each, and what the words mean, all in one file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from dmqexport.report import wording
from dmqexport.report.html import page_environment, policy_hash, resource, write_whole

_EXTRA_STYLE = (
    "main,header,nav,footer{max-width:1400px}thead th{white-space:normal}"
    ".stripe{display:block;width:100%;max-width:760px;height:auto;image-rendering:pixelated;border-radius:3px}"
    "td.best{font-weight:700}tr.group th{background:var(--band);text-align:left}td small{color:var(--soft)}"
    ".who{margin:14px 0 4px;display:flex;justify-content:space-between;gap:8px;max-width:760px}"
)


def save_strip(pictures: NDArray[np.uint8], path: Path) -> None:
    """Write pictures uint8 [N, H, W, 3] side by side as one PNG."""
    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(path, "png", optimize=True)


def write_ablation_page(
    document: Mapping[str, Any], metrics: Mapping[str, tuple[str, int, bool]], pictures: Path, path: Path
) -> None:
    """Write the page of an ablation's document to `path`.

    metrics: key → (label, digits, whether more is better), the columns; pictures: folder of the strips the document
    names; a strip that is not there is left out.
    """
    style = resource("style.css") + _EXTRA_STYLE
    reference = document.get("reference") or {}
    columns = {key: label for key, (label, _, _) in metrics.items()}
    rows = [_row(row, metrics, best_values(document["rows"], metrics)) for row in document["rows"]]
    strips = [_strip("float model", "", reference.get("pictures"), pictures)]
    strips += [_strip(r["title"], r["bits"], r["pictures"], pictures) for r in document["rows"]]
    page = (
        page_environment()
        .get_template("ablation.html.j2")
        .render(
            style=Markup(style),
            style_hash=policy_hash(style),
            columns=columns,
            groups=_grouped(rows),
            strips=[strip for strip in strips if strip is not None],
            captions=reference.get("captions") or [],
            reference=reference.get("metrics") or {},
            version=document["dmqexport_version"],
            w=wording,
        )
    )
    write_whole(path, page)


def best_values(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, tuple[str, int, bool]]
) -> dict[tuple[str, str], float]:
    """(bits, metric) → the best mean of all rows with those bits."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        for key, (_, _, more) in metrics.items():
            mean = row["metrics"][key]["mean"]
            if mean is None:
                continue
            place = (row["bits"], key)
            best[place] = mean if place not in best else max(best[place], mean) if more else min(best[place], mean)
    return best


def cell_text(spread: Mapping[str, float | None], digits: int) -> str:
    """`33.52 ± 0.11`, without the deviation for one seed, or that nothing was measured."""
    if spread["mean"] is None:
        return wording.NOT_MEASURED
    text = f"{spread['mean']:.{digits}f}"
    return text if spread["std"] is None else f"{text} ± {spread['std']:.{digits}f}"


def _row(
    row: Mapping[str, Any],
    metrics: Mapping[str, tuple[str, int, bool]],
    best: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    cells = []
    for key, (_, digits, _) in metrics.items():
        spread = row["metrics"][key]
        is_best = spread["mean"] is not None and spread["mean"] == best.get((row["bits"], key))
        cells.append((cell_text(spread, digits), is_best))
    seconds, peak = row["seconds"]["mean"], row["peak_rss_bytes"]["mean"]
    return {
        "title": row["title"],
        "source": row["source"],
        "group": row["group"],
        "bits": row["bits"],
        "cells": cells,
        "seconds": wording.measured(seconds, wording.duration),
        "memory": wording.measured(peak, wording.size),
        "seeds": len(row["seeds"]),
        "failures": [f"seed {seed}: {text}" for seed, text in row["failures"].items()],
    }


def _grouped(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups = dict.fromkeys(row["group"] for row in rows)
    return [(group, [row for row in rows if row["group"] == group]) for group in groups]


def _strip(title: str, bits: str, name: str | None, folder: Path) -> dict[str, str] | None:
    path = None if name is None else folder / name
    if path is None or not path.is_file():
        return None
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"title": title, "bits": bits, "data": f"data:image/png;base64,{data}"}
