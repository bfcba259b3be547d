"""What the command line shows while it works and when it is done.

Results are plain text in columns, never wrapped, so that `grep` and `head` work on them; only progress bars are drawn.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmqexport.bundle import GRID, REPORT_HTML, Bundle
from dmqexport.quant_plan import QuantPlan
from dmqexport.workspace import Reporter, SilentReporter

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_STAGE_WIDTH = 14
_LINE_SECONDS = 30.0


class _LineReporter:
    """One line a finished stage; a long stage also says twice a minute how far it is. For logs and pipes."""

    def __init__(self) -> None:
        self._stage = ""
        self._start = self._last = 0.0

    def started(self, stage: str) -> None:
        """Remember when."""
        self._stage, self._start = stage, time.perf_counter()
        self._last = self._start

    def progress(self, done: int, total: int) -> None:
        """Say how far a long stage is."""
        now = time.perf_counter()
        if now - self._last >= _LINE_SECONDS and 0 < done < total:
            self._last = now
            left = (now - self._start) * (total - done) / done
            print(f"{self._stage:<{_STAGE_WIDTH}}{done}/{total}, about {duration(left)} left", file=sys.stderr)

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Say what it took."""
        print(_finished(stage, seconds, cached), file=sys.stderr, flush=True)


class _BarReporter:
    """One progress bar a stage, with time left; a line when it is finished. For terminals."""

    def __init__(self, progress: "Progress", console: "Console") -> None:
        self._progress = progress
        self._console = console
        self._task: TaskID | None = None

    def started(self, stage: str) -> None:
        """Begin a bar."""
        self._remove()
        self._task = self._progress.add_task(stage, total=None, count="")

    def progress(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, count=f"{done}/{total}")

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Replace the bar by a line."""
        self._remove()
        self._console.print(_finished(stage, seconds, cached), highlight=False, markup=False, soft_wrap=True)

    def _remove(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def _finished(stage: str, seconds: float, cached: bool) -> str:
    return f"{stage:<{_STAGE_WIDTH}}{'reused' if cached else duration(seconds)}"


def duration(seconds: float) -> str:
    """`7.5 s`, `12 min 30 s` or `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def console_reporter(*, quiet: bool) -> Iterator[Reporter]:
    """A reporter on standard error, so that standard output holds results alone."""
    if quiet:
        yield SilentReporter()
    elif not sys.stderr.isatty():
        yield _LineReporter()
    else:
        with _bars() as reporter:
            yield reporter


@contextmanager
def _bars() -> Iterator[Reporter]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        """Nothing until there is an estimate."""

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            return Text("" if task.total is None or left is None else f"about {duration(left)} left")

    console = Console(file=sys.stderr)
    progress = Progress(
        TextColumn(f"{{task.description:<{_STAGE_WIDTH - 1}}}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TimeLeft(),
        console=console,
        transient=True,
        redirect_stdout=False,  # results must reach pipes untouched
    )
    with progress:
        yield _BarReporter(progress, console)


def columns(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Rows as text, every column but the last as wide as its longest cell."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]) - 1)] if cells else []
    return "\n".join(
        indent + "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False)) + row[-1]
        for row in cells
    )


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headline figures, as (label, text)."""
    rows = [("predicted noise", f"{_db(metrics.get('eps_sqnr_db'))} SQNR against float")]
    psnr, ssim, count = (metrics.get(key) for key in ("image_psnr_db", "image_ssim", "image_count"))
    if psnr is not None and ssim is not None:
        rows.append(("pictures", f"{_db(psnr)} PSNR, SSIM {ssim:.4f} ({count} pairs)"))
    if metrics.get("retrieval_accuracy") is not None:
        accuracy, reference = metrics["retrieval_accuracy"], metrics["retrieval_accuracy_fp"]
        rows.append(("retrieval", f"{accuracy:.1%} of {metrics['retrieval_count']} captions (float {reference:.1%})"))
    if metrics.get("frechet_train") is not None:
        distance, reference = metrics["frechet_train"], metrics["frechet_train_fp"]
        rows.append(
            ("Fréchet", f"{distance:.4f} to the training set (float {reference:.4f}; {metrics['frechet_extractor']})")
        )
    return rows


def gate_rows(gates: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every gate, as (label, text)."""
    rows = []
    for gate in gates:
        state = {True: "passed", False: "FAILED", None: "not measured"}[gate["passed"]]
        measured = "" if gate["measured"] is None else f" {gate['measured']:.4g}"
        bound = "at least" if gate["direction"] == "min" else "at most"
        rows.append(("gate", f"{gate['name']}{measured}, {bound} {gate['threshold']:g}: {state}"))
    return rows


def print_summary(document: Mapping[str, Any], path: Path) -> None:
    """The end of a build."""
    drawn = document.get("statistics") == "drawn"
    rows = [] if drawn else metric_rows(document["metrics"])
    size = document["size_bytes"]
    on_disk, nominal, original = (size[key] / 1e6 for key in ("storage", "nominal", "float"))
    rows.append(("size", f"{on_disk:.2f} MB on disk (nominal {nominal:.2f}, float {original:.2f})"))
    latency = document["latency"]
    if latency is not None:
        rows.append(
            (
                "latency",
                f"{latency['quantized_ms']:.2f} ms, float {latency['fp32_ms']:.2f} ms: ratio {latency['ratio']:.2f} "
                f"(batch {latency['batch']}, {latency['threads']} threads)",
            )
        )
    engine = document["engine"]
    if engine is not None and engine.get("layers_planned"):
        rows.append(("engine", f"{engine['layers_proven']} of {engine['layers_planned']} layers {proven(engine)}"))
    rows += gate_rows(document["gates"])
    rows += [("warning", warning) for warning in document["warnings"]]
    if any(gate["passed"] is False for gate in document["gates"]):
        rows += [("try", suggestion) for suggestion in document["suggestions"]]
    rows += [("bundle", str(path)), ("report", str(path / REPORT_HTML))]
    rows += [] if drawn else [("grid", str(path / GRID))]
    print(f"{document['model']['name']} {document['bits']} for {document['target']}\n{columns(rows)}")


def proven(engine: Mapping[str, Any]) -> str:
    """In which types the report's engine was found to multiply: "proven int8", or the note's counts where not all are.

    engine: as in report.json.
    """
    types = str(engine.get("note") or "").partition(": ")[2]
    operands = {operand for kind in types.split(", ") for operand in kind.lower().split()[1:] if operand != "x"}
    return "proven int8" if operands <= {"int8", "i8", "u8"} else f"proven: {types}"


def _average_bits(plan: QuantPlan) -> str:
    weight, activation = plan.allocation.average_weight_bits, plan.allocation.average_activation_bits
    return f"{weight:.2f} weight bits" + ("" if activation is None else f", {activation:.2f} activation bits")


def print_bundle(bundle: Bundle, layers: bool) -> None:
    """`dmqexport inspect`: the findings, and with `layers` every layer by name."""
    manifest, report, plan = bundle.manifest, bundle.report, bundle.plan
    model = manifest["model"]
    rows = [
        ("model", f"{model['name']} ({model['family']})"),
        ("bits", f"{manifest['bits']}, on average {_average_bits(plan)}"),
        ("target", str(manifest["target"])),
        (
            "quantized",
            f"{len(plan.layers)} layers, {len(plan.attentions)} attentions, {plan.rows} rows of the timestep table",
        ),
        *(metric_rows(report["metrics"]) if manifest.get("statistics") != "drawn" else _drawn_rows(report)),
    ]
    engine = manifest.get("engine")
    if engine:
        share = f"{engine['layers_proven']} of {engine['layers_planned']} layers {proven(report.get('engine') or {})}"
        rows.append(("engine", f"{engine['target']} {engine['version']}, {share}"))
    if manifest.get("finish_command"):
        rows.append(("engine", f"not built yet; on the GPU host: {manifest['finish_command']}"))
    twice = [layer.name for layer in plan.layers if layer.has_remainder]
    if twice:
        rows.append(("two products", f"{len(twice)} layers: activations in 16 bits, as two int8 codes"))
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.float_layers.items():
        by_reason.setdefault(reason, []).append(name)
    rows += [("in float", f"{len(names)}: {reason}") for reason, names in by_reason.items()]
    print(columns(rows, indent=""))
    if layers:
        print("\n" + columns(_layer_rows(report["layers"]), indent=""))


def _drawn_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """In the place of figures that nobody measured."""
    return [("warning", str(warning)) for warning in report["warnings"][:1]]


def _layer_rows(layers: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Worst first, then what stayed in float."""
    rows: list[tuple[str, ...]] = [("layer", "weight", "activation", "storage", "compute", "SQNR")]
    ordered = sorted(layers, key=lambda item: (item["sqnr_db"] is None, item["sqnr_db"] or 0.0))
    for layer in ordered:
        bits = layer["nominal_bits"]
        rows.append(
            (
                str(layer["name"]),
                str(bits["weight"] or "float"),
                "float" if not bits["activation"] else f"{bits['activation']:.3g}",
                str(layer["storage_bits"]["weight"] or "-"),
                str(layer["compute"]),
                "-" if layer["sqnr_db"] is None else _db(layer["sqnr_db"]),
            )
        )
    return rows


def _db(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} dB"
