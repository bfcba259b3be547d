"""The verb that compares methods."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmqexport.cli_log import Session, start_logging
from dmqexport.cli_options import (
    JsonOption,
    QuietOption,
    ResumeOption,
    SchedulerOption,
    SetOption,
    SizeOption,
    StepsOption,
    VerboseOption,
    WorkOption,
)

if TYPE_CHECKING:
    from dmqexport.ablate import Outcome


def ablate(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Table, pages and finished runs.")],
    model: Annotated[
        str, typer.Option("-m", "--model", metavar="MODEL", help="Preset, hub id, or diffusers folder.")
    ] = "emoji",
    bits: Annotated[
        list[str] | None, typer.Option("--bits", metavar="wNaM", help="Widths; repeat for more. Default w4a4.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B,...", help="Methods or groups, as --list names them. Default: all."),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,N,...", help="Calibration and training seeds.")] = "0",
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Your own table of methods, in place of the shipped.")
    ] = None,
    list_methods: Annotated[bool, typer.Option("--list", help="Print what every method sets, and stop.")] = False,
    effort: Annotated[
        float, typer.Option("--effort", metavar="X", help="Share of the training iterations; 0.1 for a quick look.")
    ] = 1.0,
    assignments: SetOption = None,
    steps: StepsOption = None,
    scheduler: SchedulerOption = None,
    calib_size: SizeOption = None,
    work: WorkOption = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare quantization methods on one model: accuracy, time and memory, averaged over seeds.

    \b
      dmqexport ablate -m emoji --bits w4a4 --methods baselines,ours --seeds 0,1,2 -o out/ablation

    Every run is a process of its own and is kept in FOLDER/runs: the same command goes on where it was stopped. All
    share the float trajectories. FOLDER/ablation.json and ablation.html hold the table, written anew after every run.
    A method is judged by its simulated plan, whose codes are those of the deployed graph.
    """
    start_logging(verbose=verbose, quiet=quiet)
    from dmqexport.ablate import METRICS, Ablation, failures, plan_runs, summarize, write_json
    from dmqexport.ablation_table import choose, describe, load_methods
    from dmqexport.report.ablation import write_ablation_page

    chosen = choose(load_methods(table), _split(methods))
    if list_methods:
        print(describe(chosen), end="")
        return
    base = {
        "model": model,
        "sampling.steps": steps,
        "sampling.scheduler": scheduler,
        "calibration.size": calib_size,
    }
    runs = plan_runs(base, chosen, _widths(bits or ["w4a4"]), _numbers(seeds), assignments or [], effort)
    ablation = Ablation(output, work, resume=resume)
    Session.resumable = True
    finished: list[Outcome] = []
    say = _teller(quiet or as_json)

    def report(outcome: "Outcome", done: int, total: int) -> None:
        finished.append(outcome)
        document = summarize(finished, chosen)
        write_json(document, output / "ablation.json")
        write_ablation_page(document, METRICS, ablation.runs_folder, output / "ablation.html")
        say(outcome, done, total)

    outcomes = ablation.execute(runs, report)
    document = summarize(outcomes, chosen)
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        print(_table(document, METRICS))
        print(f"\ntable   {output / 'ablation.json'}\npage    {output / 'ablation.html'}")
    problem = failures(outcomes)
    if problem is not None:
        raise problem


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _widths(texts: Sequence[str]) -> list[str]:
    """Canonical and without repetition; `--bits w4a4,w8a8` is as good as the option twice."""
    from dmqexport.quant_types import BitWidths

    return list(dict.fromkeys(str(BitWidths.parse(part)) for text in texts for part in _split(text)))


def _numbers(text: str) -> list[int]:
    from dmqexport.errors import RecipeError

    parts = _split(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise RecipeError(f"--seeds {text!r}: expected whole numbers with commas between", hint="e.g. --seeds 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def _teller(quiet: bool) -> Callable[["Outcome", int, int], None]:
    """One line a finished run on standard error, with the time left by what the runs so far took."""
    import sys

    from dmqexport.cli_console import duration

    spent: list[float] = []

    def say(outcome: "Outcome", done: int, total: int) -> None:
        if not outcome.cached:
            spent.append(outcome.seconds)
        if quiet:
            return
        left = ""
        if spent and done < total:
            left = f", about {duration(sum(spent) / len(spent) * (total - done))} left"
        state = "reused" if outcome.cached else duration(outcome.seconds)
        found = ""
        if outcome.failure is not None:
            state, found = "FAILED", f": {outcome.failure.splitlines()[0]}"
        elif outcome.result is not None and outcome.run.method is not None:
            metrics = outcome.result["metrics"]
            found = f": {metrics['eps_sqnr_db']:.2f} dB noise, {metrics['image_psnr_db']:.2f} dB pictures"
        print(f"[{done}/{total}] {outcome.run.label}  {state}{found}{left}", file=sys.stderr, flush=True)

    return say


def _table(document: Mapping[str, Any], metrics: Mapping[str, tuple[str, int, bool]]) -> str:
    """One line a method and width; the float model's own figures above."""
    from dmqexport.cli_console import columns
    from dmqexport.report import wording
    from dmqexport.report.ablation import cell_text

    lines = []
    reference = (document.get("reference") or {}).get("metrics") or {}
    if reference.get("frechet_extractor") is not None:
        lines.append(
            f"{reference['image_count']} pictures; float model: retrieval {reference['retrieval_accuracy_fp']:.3f}, "
            f"Fréchet distance to the training set {reference['frechet_train_fp']:.4f} "
            f"({reference['frechet_extractor']})"
        )
    rows = [("method", "bits", *(label for label, _, _ in metrics.values()), "time", "peak memory", "seeds")]
    for row in document["rows"]:
        figures = [cell_text(row["metrics"][key], digits) for key, (_, digits, _) in metrics.items()]
        seconds = wording.measured(row["seconds"]["mean"], wording.duration)
        memory = wording.measured(row["peak_rss_bytes"]["mean"], wording.size)
        seeds = ",".join(map(str, row["seeds"])) or "failed"
        rows.append((row["method"], row["bits"], *figures, seconds, memory, seeds))
    return "\n".join([*lines, columns(rows, indent="")])
