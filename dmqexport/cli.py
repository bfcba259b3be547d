"""The command line. One sub-command a stage, and what is done with a finished bundle; `--help` is the manual.

Exit codes: 0 ok · 1 internal · 2 usage or recipe · 3 accuracy gate · 4 performance gate · 5 resource limit ·
6 bundle integrity or compatibility · 7 backend missing.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmqexport.errors import BackendMissingError, DmqExportError, GateError, PerformanceGateError, RecipeError

if TYPE_CHECKING:
    from dmqexport.pipeline import Build

app = typer.Typer(
    name="dmqexport",
    help="From a PyTorch diffusion model to a quantized, validated, deployable bundle.",
    epilog="Exit codes: 0 ok, 1 internal, 2 usage or recipe, 3 accuracy gate, 4 performance gate, 5 resource limit, "
    "6 bundle integrity or compatibility, 7 backend missing.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None, typer.Option("-m", "--model", help="Preset (emoji, …), hub id, or local diffusers folder.")
]
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Bundle folder; work goes to OUTPUT.work.")]
BitsOption = Annotated[str | None, typer.Option("--bits", help="Weight and activation bits: w4a4, w8a8, w4a16 …")]
TargetOption = Annotated[str | None, typer.Option("--target", help="onnx, ort-cpu, trt-rtx or trt.")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="YAML recipe; options override it.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Recipe key: --set calibration.rows=20.")]
RowsOption = Annotated[int | None, typer.Option("--rows", help="Rows of the timestep table.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps.")]
SchedulerOption = Annotated[str | None, typer.Option("--scheduler", help="ddim, ddpm, euler …; default: the model's.")]
PromptsOption = Annotated[Path | None, typer.Option("--calib-prompts", help="Calibration prompts, one a line.")]
SizeOption = Annotated[int | None, typer.Option("--calib-size", help="Float trajectories to calibrate on.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
AttentionOption = Annotated[int | None, typer.Option("--attention-bits", help="Quantize attention matmuls too.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")]
WorkOption = Annotated[Path | None, typer.Option("--work", help="Work folder instead of OUTPUT.work.")]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="Reuse finished stages.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Log details; tracebacks for internal errors.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors and the result.")]
BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder, the -o of a build.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; default: every core.")]


def _stage_command(name: str, summary: str, action: Callable[["Build", bool], None]) -> None:
    """Register one verb that takes the options of a build."""

    def command(
        output: OutputOption,
        model: ModelOption = None,
        bits: BitsOption = None,
        target: TargetOption = None,
        recipe: RecipeOption = None,
        assignments: SetOption = None,
        rows: RowsOption = None,
        steps: StepsOption = None,
        scheduler: SchedulerOption = None,
        calib_prompts: PromptsOption = None,
        calib_size: SizeOption = None,
        seed: SeedOption = None,
        attention_bits: AttentionOption = None,
        revision: RevisionOption = None,
        work: WorkOption = None,
        resume: ResumeOption = True,
        dry_run: DryRunOption = False,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
        quiet: QuietOption = False,
    ) -> None:
        _logging(verbose)
        from dmqexport.recipe import load_recipe

        options = {
            "model": model,
            "revision": revision,
            "bits": bits,
            "target": target,
            "seed": seed,
            "sampling.steps": steps,
            "sampling.scheduler": scheduler,
            "calibration.prompts": None if calib_prompts is None else str(calib_prompts),
            "calibration.size": calib_size,
            "calibration.rows": rows,
            "quantization.attention_bits": attention_bits,
        }
        resolved = load_recipe(recipe, options, assignments or [])
        if dry_run:
            print(resolved.to_yaml(), end="")
            return
        from dmqexport.cli_console import console_reporter

        with console_reporter(quiet=quiet or as_json) as reporter:
            from dmqexport.pipeline import Build
            from dmqexport.workspace import Workspace

            folder = work if work is not None else output.with_name(output.name + ".work")
            action(Build(resolved, output, Workspace(folder, reporter, resume=resume)), as_json)

    app.command(name, help=summary)(command)


def _run_stages(until: str) -> Callable[["Build", bool], None]:
    def action(build: "Build", as_json: bool) -> None:
        from dmqexport.pipeline import Stage

        stage = Stage(until)
        build.run(stage)
        result = {record.name: str(record.path) for record in build.workspace.records}
        if stage is Stage.COMPILE and build.compiled.missing is not None:
            raise BackendMissingError(build.compiled.missing)
        print(json.dumps(result, indent=1) if as_json else "\n".join(f"{k}: {v}" for k, v in result.items()))

    return action


def _validate(build: "Build", as_json: bool) -> None:
    from dmqexport.cli_console import print_metrics
    from dmqexport.pipeline_report import ReportBuilder
    from dmqexport.pipeline_validate import Validation

    report = ReportBuilder(build, Validation(build))
    metrics = {key: value for key, value in report.validation.metrics.items() if key != "layers"}
    if as_json:
        print(json.dumps({"metrics": metrics, "gates": report.gates}, indent=1))
    else:
        print_metrics(metrics)
    _raise_gates([gate["name"] for gate in report.gates if gate["passed"] is False], None)


def _build(build: "Build", as_json: bool) -> None:
    from dmqexport.bundle import GRID, REPORT_HTML
    from dmqexport.cli_console import print_summary
    from dmqexport.pipeline_bundle import run_build

    result = run_build(build)
    if as_json:
        kept = ("bits", "target", "metrics", "size_bytes", "latency", "gates", "engine", "warnings")
        print(json.dumps({"bundle": str(result.path), **{key: result.document[key] for key in kept}}, indent=1))
    else:
        print_summary(result.document)
        print(f"bundle:  {result.path}\nreport:  {result.path / REPORT_HTML}\npicture: {result.path / GRID}")
    _raise_gates(list(result.failed_gates), result.path)
    if result.missing is not None:
        raise BackendMissingError(
            result.missing, hint=f"on the GPU host run: cd {result.path} && python finish_on_gpu.py"
        )


def _raise_gates(failed: list[str], path: Path | None) -> None:
    if not failed:
        return
    hint = "thresholds are validation.gates in the recipe" + (
        "" if path is None else f"; the report in {path} says where"
    )
    if failed == ["latency_ratio"]:
        raise PerformanceGateError("slower than the recipe requires: latency_ratio", hint=hint)
    raise GateError(f"below the recipe's thresholds: {', '.join(failed)}", hint=hint)


_stage_command("build", "Everything: calibrate, plan, export, compile, validate, report, bundle.", _build)
_stage_command("calibrate", "Record float trajectories and gather activation statistics.", _run_stages("calibrate"))
_stage_command("plan", "Choose bits, scales and zero-points; write the QuantPlan.", _run_stages("plan"))
_stage_command("export", "Export the float ONNX graph and rewrite it for the target.", _run_stages("passes"))
_stage_command("compile", "Build the target's engine and prove its precision.", _run_stages("compile"))
_stage_command("validate", "Measure the deployed graph against the float graph.", _validate)


@app.command()
def run(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG to write.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Prompt; repeat for more rows.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Seed; repeat for more columns.")] = None,
    steps: StepsOption = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Guidance scale.")] = None,
    scheduler: SchedulerOption = None,
    scale: Annotated[int, typer.Option("--scale", min=1, max=32, help="Enlarge each pixel this many times.")] = 1,
    threads: ThreadsOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Draw pictures with a bundle: a grid of prompts (rows) by seeds (columns)."""
    _logging(verbose)
    from dmqexport.bundle import open_bundle
    from dmqexport.draw import draw_grid

    opened = open_bundle(bundle)
    count = draw_grid(opened, output, prompt or [], seed or [0], steps, guidance, scheduler, scale, threads)
    print(f"{output}: {count} pictures")


@app.command()
def inspect(
    bundle: BundleArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer, worst first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle holds: bits, sizes, precision, what stayed in float and why."""
    from dmqexport.bundle import open_bundle
    from dmqexport.cli_console import print_bundle

    opened = open_bundle(bundle, verify=verify)
    if as_json:
        document = {key: value for key, value in opened.manifest.items() if key != "files"}
        print(json.dumps({"manifest": document, "metrics": opened.report["metrics"]}, indent=1))
    else:
        print_bundle(opened, layers)
        if verify:
            print(f"verified: {len(opened.manifest['files'])} files match the manifest")


@app.command()
def bench(
    bundle: BundleArgument,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Batch size.")] = 8,
    runs: Annotated[int, typer.Option("--runs", min=3, help="Timed runs of each graph.")] = 30,
    threads: ThreadsOption = None,
    max_ratio: Annotated[float | None, typer.Option("--max-ratio", help="Exit 4 above quantized/fp32.")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Time FP32 against quantized ONNX Runtime on the same inputs, interleaved; medians and ratio."""
    _logging(verbose)
    from dmqexport.bench import bench_bundle
    from dmqexport.bundle import open_bundle
    from dmqexport.cli_console import console_reporter

    with console_reporter(quiet=True) as reporter:
        result = bench_bundle(open_bundle(bundle), batch, runs, threads, reporter)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print(
            f"batch {result['batch']}, {result['threads']} threads, {result['runs']} runs each: "
            f"fp32 {result['fp32_ms']:.2f} ms, quantized {result['quantized_ms']:.2f} ms, ratio {result['ratio']:.3f}"
        )
    if max_ratio is not None and result["ratio"] > max_ratio:
        raise PerformanceGateError(f"ratio {result['ratio']:.3f} is above --max-ratio {max_ratio:g}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can build and run."""
    from dmqexport.doctor import examine, render

    found = examine()
    print(json.dumps(found, indent=1) if as_json else render(found))


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the model presets."""
    from dmqexport.models.presets import PRESETS

    rows: list[dict[str, Any]] = [
        {"name": preset.name, "source": preset.hub_id or "bundled", "licence": preset.licence}
        for preset in PRESETS.values()
    ]
    print(json.dumps(rows, indent=1) if as_json else "\n".join("  ".join(map(str, row.values())) for row in rows))


def _logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for library in ("onnx_ir", "onnxscript", "torch", "diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if verbose:
        os.environ["DMQEXPORT_TRACEBACK"] = "1"


def main() -> None:
    """Entry point: turns errors into messages and exit codes."""
    try:
        code = app(standalone_mode=False)
    except DmqExportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        print("interrupted; finished stages are kept and the same command resumes", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept and the same command resumes", file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        print("error: out of memory\n  hint: lower calibration.batch_size and validation.batch_size", file=sys.stderr)
        sys.exit(5)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            print(f"error: {error.format_message()}\n  hint: dmqexport --help", file=sys.stderr)
            sys.exit(RecipeError.exit_code)
        if "DMQEXPORT_TRACEBACK" in os.environ:
            raise
        print(
            f"error: internal: {type(error).__name__}: {error}\n  hint: -v shows where; please report it",
            file=sys.stderr,
        )
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
