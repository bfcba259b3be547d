"""What the command line shows while it works and when it is done."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dmqexport.bundle import Bundle
from dmqexport.workspace import Reporter, SilentReporter


class _BarReporter:
    """One progress bar a stage, with time left, on a terminal; one line a finished stage elsewhere."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        self._task: TaskID | None = None

    def started(self, stage: str) -> None:
        """Begin a bar."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(stage, total=None)

    def progress(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def finished(self, stage: str, seconds: float, cached: bool) -> None:
        """Replace the bar by a line."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        note = "reused" if cached else f"{seconds:.1f} s"
        self._console.print(f"{stage:<14}{note}", highlight=False)


@contextmanager
def console_reporter(*, quiet: bool) -> Iterator[Reporter]:
    """A reporter on standard error, so that standard output holds results alone."""
    if quiet:
        yield SilentReporter()
        return
    console = Console(file=sys.stderr)
    progress = Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        yield _BarReporter(progress, console)


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """The headline figures."""
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [("predicted noise", _db(metrics.get("eps_sqnr_db")) + " SQNR against float")]
    psnr, ssim = metrics.get("image_psnr_db"), metrics.get("image_ssim")
    rows.append(("pictures", f"{_db(psnr)} PSNR, SSIM {ssim:.4f}" if ssim is not None else _db(psnr)))
    if metrics.get("retrieval_accuracy") is not None:
        rows.append(
            ("retrieval", f"{metrics['retrieval_accuracy']:.1%} (float {metrics['retrieval_accuracy_fp']:.1%})")
        )
    for label, text in rows:
        table.add_row(label, text)
    Console(width=100, highlight=False).print(table)


def print_summary(document: Mapping[str, Any]) -> None:
    """The end of a build."""
    console = Console(width=100, highlight=False)
    console.print(f"{document['model']['name']} {document['bits']} for {document['target']}")
    print_metrics(document["metrics"])
    size = document["size_bytes"]
    console.print(
        f"size             {size['storage'] / 1e6:.2f} MB on disk "
        f"(nominal {size['nominal'] / 1e6:.2f}, float {size['float'] / 1e6:.2f})"
    )
    latency = document["latency"]
    if latency is not None:
        console.print(
            f"latency          {latency['quantized_ms']:.2f} ms, float {latency['fp32_ms']:.2f} ms: "
            f"ratio {latency['ratio']:.2f} (batch {latency['batch']}, {latency['threads']} threads)"
        )
    engine = document["engine"]
    if engine is not None and engine.get("layers_planned"):
        console.print(f"engine           {engine['layers_proven']} of {engine['layers_planned']} layers proven int8")
    for gate in document["gates"]:
        state = {True: "passed", False: "FAILED", None: "not measured"}[gate["passed"]]
        measured = "" if gate["measured"] is None else f" {gate['measured']:.4g}"
        console.print(f"gate             {gate['name']}{measured} (threshold {gate['threshold']:g}): {state}")
    for warning in document["warnings"]:
        console.print(f"warning          {warning}")


def print_bundle(bundle: Bundle, layers: bool) -> None:
    """`dmqexport inspect`."""
    console = Console(width=120, highlight=False)
    manifest, report, plan = bundle.manifest, bundle.report, bundle.plan
    console.print(
        f"{manifest['model']['name']} ({manifest['model']['family']}), {manifest['bits']}, {manifest['target']}"
    )
    console.print(
        f"{len(plan.layers)} layers quantized, {len(plan.attentions)} attentions, {plan.rows} table rows, "
        f"average {plan.allocation.average_weight_bits:.2f} weight bits"
    )
    print_metrics(report["metrics"])
    if manifest.get("engine"):
        console.print(
            f"engine: {manifest['engine']['target']} {manifest['engine']['version']}, "
            f"{manifest['engine']['layers_proven']} of {manifest['engine']['layers_planned']} layers proven int8"
        )
    if manifest.get("finish_command"):
        console.print(f"engine not built yet; on the GPU host: {manifest['finish_command']}")
    if plan.float_layers:
        console.print("left in float:")
        for name, reason in plan.float_layers.items():
            console.print(f"  {name}: {reason}")
    if layers:
        table = Table("layer", "weight", "activation", "storage", "compute", "SQNR")
        rows = [layer for layer in report["layers"] if layer["sqnr_db"] is not None]
        for layer in sorted(rows, key=lambda item: float(item["sqnr_db"])):
            bits = layer["nominal_bits"]
            table.add_row(
                layer["name"],
                str(bits["weight"]),
                str(bits["activation"] or "float"),
                str(layer["storage_bits"]["weight"]),
                layer["compute"],
                _db(layer["sqnr_db"]),
            )
        console.print(table)


def _db(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} dB"
