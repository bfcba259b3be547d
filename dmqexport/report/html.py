"""report.json and the one self-contained report.html beside it."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup, escape

from dmqexport.errors import ResourceError
from dmqexport.report import heatmap, pictures, wording
from dmqexport.report.chart import Chart, timestep_chart
from dmqexport.report.document import CAP_DB, Gate, Layer, ReportDocument, parse_document
from dmqexport.report.pareto_chart import bits_svg, pareto_svg
from dmqexport.report.pictures import ReportImages

SHOWN_PICTURES = 16

Tone = Literal["plain", "good", "bad", "unknown"]


@dataclass(frozen=True)
class Card:
    """One figure of the headline."""

    label: str
    value: str
    detail: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Bar:
    """One labelled share of a whole."""

    label: str
    value: str
    share: float
    detail: str = ""


def write_report(
    document: Mapping[str, Any] | ReportDocument, images: ReportImages | None, folder: Path
) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder` and return their paths.

    Both are functions of the arguments alone, so the same build writes the same bytes. `images` is None where no
    pictures could be sampled; `document["images"]["note"]` then says why.
    """
    checked = document if isinstance(document, ReportDocument) else parse_document(document)
    data = json.dumps(checked.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_html(checked, images)
    json_path, html_path = folder / "report.json", folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in ((json_path, data), (html_path, page)):
            write_whole(path, text)
    except OSError as error:
        raise ResourceError(
            f"cannot write the report to {folder}: {error}", hint="free space there or choose another output folder"
        ) from error
    return json_path, html_path


def render_html(document: ReportDocument, images: ReportImages | None) -> str:
    """Return the page; everything it shows is inside it, and its own policy lets it load nothing else."""
    scale = heatmap.fit_scale(document.layers)
    style, script = _style(), resource("script.js.j2")
    return (
        page_environment()
        .get_template("template.html.j2")
        .render(
            doc=document,
            style=Markup(style),
            script=Markup(script),
            style_hash=policy_hash(style),
            script_hash=policy_hash(script),
            verdict=_verdict(document),
            cards=_cards(document),
            gates=[_gate_row(gate) for gate in document.gates],
            pictures=[] if images is None else pictures.embed(images, SHOWN_PICTURES),
            picture_count=0 if images is None else len(images),
            gain=pictures.DIFFERENCE_GAIN,
            charts=_charts(document),
            scale=scale,
            blocks=[] if scale is None else heatmap.blocks(document.layers, document.rows, scale),
            levels=heatmap.LEVELS,
            row_labels=[heatmap.timesteps(row) for row in document.rows],
            layers=[(layer, *_worst_row(layer, document)) for layer in _worst_first(document)],
            in_float=[layer for layer in document.layers if layer.in_float or layer.reason],
            sizes=_sizes(document),
            compute=_compute_shares(document),
            widths=bits_svg(document.layers),
            pareto=_pareto(document),
            stage_total=_total([stage.seconds for stage in document.stages]),
            forward_total=_total([stage.forward_seconds for stage in document.stages]),
            recipe=json.dumps(document.recipe, indent=2, ensure_ascii=False),
            cap=CAP_DB,
            w=wording,
        )
    )


def _charts(document: ReportDocument) -> list[tuple[str, Chart]]:
    """Return the chart drawn for each kind of screen: shrunk to a phone, the wide one's labels could not be read."""
    metrics = document.metrics
    drawn = (
        (kind, timestep_chart(metrics.by_timestep, document.rows, metrics.eps_sqnr_db, width=width, height=height))
        for kind, width, height in (("wide", 1000, 300), ("narrow", 340, 250))
    )
    return [(kind, chart) for kind, chart in drawn if chart is not None]


def _pareto(document: ReportDocument) -> Markup | None:
    """The sweep's picture; its figures were validated and its labels are escaped."""
    points = [] if document.allocation is None else list(document.allocation.pareto)
    return Markup(pareto_svg(points, inline=True)) if points else None


def _verdict(document: ReportDocument) -> Card:
    failed = [gate.name for gate in document.gates if gate.passed is False]
    open_ = [gate.name for gate in document.gates if gate.passed is None]
    total = len(document.gates)
    if failed:
        return Card("Gates", f"{len(failed)} of {total} gates failed", ", ".join(failed), "bad")
    if not total:
        return Card("Gates", "No gates were set", "nothing was required of this build", "unknown")
    if open_:
        return Card("Gates", f"{len(open_)} of {total} gates were not measured", ", ".join(open_), "unknown")
    return Card("Gates", "The gate passed" if total == 1 else f"All {total} gates passed", "", "good")


def _cards(document: ReportDocument) -> list[Card]:
    metrics, sizes = document.metrics, document.size_bytes
    return [
        _card(document, "Noise prediction", metrics.eps_sqnr_db, wording.decibels, "SQNR", "metrics.eps_sqnr_db"),
        _card(document, "Images", metrics.image_psnr_db, wording.decibels, "PSNR to FP", "metrics.image_psnr_db"),
        _card(document, "Structure", metrics.image_ssim, _ssim, "SSIM to FP", "metrics.image_ssim"),
        _retrieval_card(document),
        _frechet_card(document),
        _card(
            document,
            "Size",
            sizes.float_ / sizes.storage if sizes.float_ and sizes.storage else None,
            wording.times,
            f"smaller: {wording.measured(sizes.float_, wording.size)} → "
            f"{wording.measured(sizes.storage, wording.size)} stored",
            "size_bytes",
        ),
        _speed_card(document),
    ]


def _card(
    document: ReportDocument, label: str, value: float | None, form: wording.Form, detail: str, field: str
) -> Card:
    if value is None:
        return Card(label, wording.NOT_MEASURED, document.notes.get(field, detail), "unknown")
    return Card(label, form(value), detail)


def _ssim(value: float) -> str:
    return f"{value:.3f}"


def _retrieval_card(document: ReportDocument) -> Card:
    metrics = document.metrics
    if metrics.retrieval_accuracy is None:
        note = document.notes.get("metrics.retrieval_accuracy", "prompt retrieval")
        return Card("Prompt retrieval", wording.NOT_MEASURED, note, "unknown")
    detail = f"FP {wording.measured(metrics.retrieval_accuracy_fp, wording.percent)}"
    if metrics.retrieval_count is not None:
        detail += f", {wording.count(metrics.retrieval_count)} pictures"
    return Card("Prompt retrieval", wording.percent(metrics.retrieval_accuracy), detail)


def _frechet_card(document: ReportDocument) -> Card:
    metrics = document.metrics
    if metrics.frechet_train is None:
        note = document.notes.get("metrics.frechet_train", "Fréchet distance to the training set")
        return Card("Distribution", wording.NOT_MEASURED, note, "unknown")
    detail = f"Fréchet distance to the training set; FP {wording.measured(metrics.frechet_train_fp, wording.plain)}"
    if metrics.frechet_extractor is not None:
        detail += f", {metrics.frechet_extractor}"
    if metrics.frechet_count is not None:
        detail += f", {wording.count(metrics.frechet_count)} pictures"
    return Card("Distribution", wording.plain(metrics.frechet_train), detail)


def _speed_card(document: ReportDocument) -> Card:
    latency = document.latency
    if latency is None or latency.ratio is None:
        return Card("Latency", wording.NOT_MEASURED, document.notes.get("latency", "no timing was taken"), "unknown")
    detail = (
        f"{'of the float time' if latency.ratio <= 1 else 'slower than float'}: "
        f"{wording.measured(latency.fp32_ms, wording.milliseconds)} → "
        f"{wording.measured(latency.quantized_ms, wording.milliseconds)} a call"
    )
    return Card("Latency", wording.times(latency.ratio), detail, "plain" if latency.ratio <= 1 else "bad")


def _gate_row(gate: Gate) -> dict[str, str]:
    unit = f" {gate.unit}" if gate.unit else ""
    sign = {"min": "≥ ", "max": "≤ ", None: ""}[gate.direction]
    outcome = {True: "passed", False: "failed", None: "not measured"}[gate.passed]
    return {
        "name": gate.name,
        "threshold": f"{sign}{wording.plain(gate.threshold)}{unit}",
        "measured": wording.measured(gate.measured, lambda value: f"{wording.plain(value)}{unit}"),
        "outcome": outcome,
        "tone": {True: "good", False: "bad", None: "unknown"}[gate.passed],
        "mark": {True: "✓", False: "✗", None: "–"}[gate.passed],
    }


def _worst_first(document: ReportDocument) -> list[Layer]:
    return sorted(document.layers, key=lambda layer: math.inf if layer.sqnr_db is None else layer.sqnr_db)


def _worst_row(layer: Layer, document: ReportDocument) -> tuple[float | None, str]:
    known = [(value, index) for index, value in enumerate(layer.sqnr_by_row) if value is not None]
    if not known:
        return None, ""
    value, index = min(known)
    return value, heatmap.timesteps(document.rows[index])


def _sizes(document: ReportDocument) -> list[Bar]:
    sizes = document.size_bytes
    largest = max(sizes.float_ or 0, sizes.nominal or 0, sizes.storage or 0, 1)
    kinds = (
        ("float", sizes.float_, "weights as the model came"),
        ("nominal", sizes.nominal, "at the bits that the plan asks for"),
        ("storage", sizes.storage, "as the file holds them"),
    )
    return [
        Bar(label, wording.measured(value, wording.size), (value or 0) / largest, detail)
        for label, value, detail in kinds
    ]


def _compute_shares(document: ReportDocument) -> tuple[str, list[Bar]]:
    """Return what the shares count and the share of every compute type."""
    if not document.layers:
        return "", []
    by_macs = all(layer.macs is not None for layer in document.layers)
    totals: dict[str, int] = {}
    for layer in document.layers:
        totals[layer.compute] = totals.get(layer.compute, 0) + (1 if layer.macs is None or not by_macs else layer.macs)
    whole = sum(totals.values()) or 1
    shares = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    return (
        "multiply-accumulates" if by_macs else "layers",
        [Bar(kind, wording.percent(total / whole), total / whole, wording.count(total)) for kind, total in shares],
    )


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _style() -> str:
    levels = (f".v{level}{{fill:{colour}}}" for level, colour in enumerate(heatmap.colours()))
    return resource("style.css") + "".join(levels)


def policy_hash(text: str) -> Markup:
    """Return the source that a content security policy allows the inline style or script `text` by."""
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return Markup("'sha256-{}'").format(digest)


def page_environment() -> jinja2.Environment:
    """Return the environment of every page: escaping on, an unknown name is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """Let a long module name break after its dots, slashes and underscores instead of amid a word."""
    return Markup(re.sub(r"([./_])", r"\1<wbr>", str(escape(name))))


def resource(name: str) -> str:
    """Return a text file that lies beside this module."""
    return resources.files("dmqexport.report").joinpath(name).read_text(encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write the file whole or not at all, so that an interrupted run leaves no half page."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode("utf-8"))
    partial.replace(path)
