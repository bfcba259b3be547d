"""The table of a comparison as Markdown, and its place in the README; needs nothing but the standard library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN = "<!-- generated from tests/benchmarks/peers.json by tests/benchmarks/peers.py -->"
END = "<!-- end of what peers.py generates -->"
_HEAD = (
    "| | bits | run by | noise, SQNR | PSNR | retrieval | latency ÷ float32 | processor time ÷ float32 "
    "| on disk | build | peak memory |"
)
_RULE = "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "simulation": "its fake quantization"}
_GROUPS = ("w8a8", "w4a8", "w4a4")


def markdown(document: Mapping[str, Any]) -> str:
    """The whole section: what was compared, one line a row, remarks; rows that could not be done say why."""
    rows = sorted(document["rows"], key=lambda row: (_GROUPS.index(row["bits"]), bool(row.get("failure"))))
    notes = list(dict.fromkeys(row["note"] for row in rows if row.get("note") and not row.get("failure")))
    lines = [_introduction(document), "", _HEAD, _RULE, *(_line(row, notes) for row in rows), ""]
    remarks = [f"{_mark(index)} {note[0].upper()}{note[1:]}." for index, note in enumerate(notes)]
    return "\n".join([*lines, " ".join([*remarks, _fp32(rows)]).strip(), ""])


def update_readme(path: Path, document: Mapping[str, Any]) -> None:
    """Replace what lies between the two markers of `path`. Raises SystemExit when they are not there once each."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{path}: the table goes between the lines\n{BEGIN}\n{END}\nwhich must be there once each")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f"{before}{section(document)}{after}", encoding="utf-8")
    partial.replace(path)


def section(document: Mapping[str, Any]) -> str:
    """What stands in the README, markers included."""
    return f"{BEGIN}\n{markdown(document).strip()}\n{END}"


def merged(document: Mapping[str, Any], stored: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """`document`, and what is stored of the rows that it lacks, by their keys in `order`; what is not there is dropped.

    Raises SystemExit where those are of another model, other samples, another machine or other versions.
    """
    fresh = {row["key"]: row for row in document["rows"]}
    kept = {row["key"]: row for row in stored["rows"] if row["key"] in order and row["key"] not in fresh}
    if not kept:
        return dict(document)
    had = stored["versions"]
    differing = [key for key in ("model", "machine", "batch") if document[key] != stored[key]]
    differing += [name for name, number in document["versions"].items() if had.get(name, number) != number]
    if differing:
        raise SystemExit(
            f"other rows are stored already ({', '.join(kept)}), and {', '.join(differing)} differ there: "
            "rows that are not comparable make no table; run them all, without --only"
        )
    rows = sorted((kept | fresh).values(), key=lambda row: order.index(row["key"]))
    return {**document, "versions": dict(sorted((had | document["versions"]).items())), "rows": rows}


def _introduction(document: Mapping[str, Any]) -> str:
    about = document["model"]
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    pictures = f", {about['pictures']} pictures" if about["pictures"] else ""
    own = about.get("retrieval_accuracy")
    retrieval = "" if own is None else f" Retrieval of the float model: {own:.0%}."
    return (
        f"`{about['name']}` ({about['parameters'] / 1e6:.1f} M parameters), {about['calibration_points']:,} "
        f"calibration points, {about['evaluation_points']} evaluation points{pictures}; {document['machine']}, "
        f"one thread, batch {document['batch']}; {versions}.{retrieval}"
    )


def _line(row: Mapping[str, Any], notes: Sequence[str]) -> str:
    if row.get("failure"):
        return f"| {row['name']} | {row['bits'].upper()} | not done: {_escaped(row['failure'])} |{' |' * 8}"
    metrics, latency = row["metrics"], row.get("latency")
    mark = _mark(notes.index(row["note"])) if row.get("note") else ""
    bold = "**" if row["key"].startswith("ours") else ""
    cells = [
        f"{bold}{row['name']}{bold}{mark}",
        row["bits"].upper(),
        _RUNTIMES[row["runtime"]],
        _number(metrics.get("eps_sqnr_db"), ".1f", " dB"),
        _number(metrics.get("image_psnr_db"), ".1f", " dB"),
        "" if metrics.get("retrieval_accuracy") is None else f"{metrics['retrieval_accuracy']:.0%}",
        "" if latency is None else f"{latency['ratio']:.2f}",
        "" if latency is None else f"{latency['processor_ratio']:.2f}",
        "" if row.get("bytes") is None else f"{row['bytes'] / 1e6:.1f} MB",
        _seconds(row["build_seconds"]),
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB",
    ]
    return "| " + " | ".join(cells) + " |"


def _fp32(rows: Sequence[Mapping[str, Any]]) -> str:
    """Float32 of every runtime, and under which load the ratios were measured."""
    parts = []
    for runtime in ("onnxruntime", "openvino"):
        times = sorted(row["latency"]["fp32_ms"] for row in rows if row.get("latency") and row["runtime"] == runtime)
        if times:
            parts.append(f"{_RUNTIMES[runtime]} {times[len(times) // 2]:.1f} ms")
    loads = sorted(row["latency"]["load"] for row in rows if row.get("latency"))
    if not parts:
        return ""
    load = f"{loads[0]:g}" if loads[0] == loads[-1] else f"{loads[0]:g} to {loads[-1]:g}"
    return f"Float32 took {', '.join(parts)} a call; the machine's load was {load} while latencies were measured."


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.0f} min"


def _mark(index: int) -> str:
    return f"<sup>{index + 1}</sup>"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
