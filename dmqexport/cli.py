"""The command line. One sub-command a stage, and what is done with a finished bundle; `--help` is the manual.

Exit codes: 0 ok · 1 internal · 2 usage or recipe · 3 accuracy gate · 4 performance gate · 5 resource limit ·
6 bundle integrity or compatibility · 7 backend missing. By convention of shells: 130 interrupted, 141 the reader of the
output went away.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmqexport import cli_ablate, cli_bundle, cli_models, cli_package, cli_reproduce
from dmqexport.cli_log import Session, start_logging
from dmqexport.cli_options import (
    AttentionOption,
    BitsOption,
    BudgetOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    JsonOption,
    LoraOption,
    MaxDiskOption,
    MaxRamOption,
    MixedOption,
    ModelOption,
    OutputOption,
    ParetoOption,
    PrecisionOption,
    PromptsOption,
    QuietOption,
    RandomStatisticsOption,
    RecipeOption,
    ResumeOption,
    RevisionOption,
    RowsOption,
    SchedulerOption,
    SeedOption,
    SetOption,
    SizeOption,
    StepsOption,
    TargetOption,
    VariantOption,
    VerboseOption,
    WeightsOption,
    WorkOption,
)
from dmqexport.cli_ranks import joined_ranks, note_rank, share_stages, speaks
from dmqexport.errors import (
    BackendMissingError,
    DmqExportError,
    GateError,
    PerformanceGateError,
    RankError,
    RecipeError,
    ResourceError,
)

if TYPE_CHECKING:
    from dmqexport.pipeline import Build

logger = logging.getLogger(__name__)

# 128 + the signal, as shells do.
_INTERRUPTED = 130
_CLOSED_PIPE = 141


def _print_version(wanted: bool) -> None:
    if wanted:
        from dmqexport import __version__

        print(f"dmqexport {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="dmqexport",
    epilog="Exit codes: 0 ok, 1 internal, 2 usage or recipe, 3 accuracy gate, 4 performance gate, 5 resource limit, "
    "6 bundle integrity or compatibility, 7 backend missing, 130 interrupted.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """From a PyTorch diffusion model to a quantized, validated, deployable bundle.

    \b
    Start here:
      dmqexport build -m emoji -o out/emoji --bits w4a4
      dmqexport run out/emoji -o faces.png --prompt "grinning face"
      dmqexport inspect out/emoji --layers

    The verbs calibrate, plan, train, export, compile and validate are the stages of build. Each runs what it needs
    before it and shares the work folder with the others, so that nothing is computed twice. Several processes share
    the work of one: torchrun --nproc-per-node 8 -m dmqexport build ...
    """
    note_rank(context.invoked_subcommand)


def _folders(output: Path, work: Path | None) -> tuple[Path, Path]:
    """(bundle, work folder); raises RecipeError for places where one would destroy something."""
    if output.name in ("", "..") or output == Path():
        raise RecipeError(f"--output {str(output)!r} names no folder of its own", hint="e.g. -o out/my-bundle")
    folder = work if work is not None else output.with_name(output.name + ".work")
    bundle, inner = output.resolve(), folder.resolve()
    if bundle == inner or bundle in inner.parents:
        raise RecipeError(
            f"--work {folder} lies in --output {output}, which is replaced as a whole",
            hint="leave --work out, or give a folder beside the bundle",
        )
    return output, folder


def _stage_command(name: str, summary: str, manual: str, action: Callable[["Build", bool], None]) -> None:
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
        random_statistics: RandomStatisticsOption = False,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        max_ram: MaxRamOption = None,
        max_disk: MaxDiskOption = None,
        seed: SeedOption = None,
        attention_bits: AttentionOption = None,
        precision: PrecisionOption = None,
        mixed: MixedOption = False,
        budget: BudgetOption = None,
        pareto: ParetoOption = False,
        revision: RevisionOption = None,
        variant: VariantOption = None,
        lora: LoraOption = None,
        weights: WeightsOption = None,
        work: WorkOption = None,
        resume: ResumeOption = True,
        dry_run: DryRunOption = False,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
        quiet: QuietOption = False,
    ) -> None:
        start_logging(verbose=verbose, quiet=quiet)
        from dmqexport.recipe import load_recipe

        options = {
            "model": model,
            "revision": revision,
            "variant": variant,
            "lora": lora or None,
            "weights": weights,
            "bits": bits,
            "target": target,
            "seed": seed,
            "sampling.steps": steps,
            "sampling.scheduler": scheduler,
            "calibration.prompts": None if calib_prompts is None else str(calib_prompts),
            "calibration.size": calib_size,
            "calibration.device": device,
            "calibration.dtype": dtype,
            "calibration.statistics": "drawn" if random_statistics else None,
            "max_ram": max_ram,
            "max_disk": max_disk,
            "calibration.rows": rows,
            "quantization.attention_bits": attention_bits,
            "lowering.precision": precision,
            "allocation.mixed": mixed or budget is not None or None,
            "allocation.budget": budget,
            "allocation.pareto": pareto or None,
        }
        resolved = load_recipe(recipe, options, assignments or [])
        if dry_run:
            if Session.rank == 0:
                from dmqexport.cli_estimate import print_dry_run

                print_dry_run(resolved, output, as_json=as_json)
            return
        from dmqexport.bundle import check_replaceable
        from dmqexport.cli_console import console_reporter
        from dmqexport.workspace import Workspace

        bundle, folder = _folders(output, work)
        check_replaceable(bundle)
        with joined_ranks() as ranks, console_reporter(quiet=quiet or as_json or ranks.rank > 0) as reporter:
            workspace = Workspace(folder, reporter, resume=resume, ranks=ranks)
            Session.resumable = True
            try:
                from dmqexport.pipeline import Build

                build = Build(resolved, bundle, workspace)
                if share_stages(build, name):
                    action(build, as_json)
            finally:
                workspace.close()

    app.command(name, help=manual, short_help=summary)(command)


def _run_stages(until: str) -> Callable[["Build", bool], None]:
    def action(build: "Build", as_json: bool) -> None:
        from dmqexport.pipeline import Stage

        stage = Stage(until)
        build.run(stage)
        artifacts = _artifacts(build, stage)
        if as_json:
            stages = [
                {"name": r.name, "path": str(r.path), "seconds": r.seconds, "cached": r.cached}
                for r in build.workspace.records
            ]
            named = {name: str(path) for name, path in artifacts.items()}
            print(json.dumps({"stages": stages, "artifacts": named}, indent=1))
        else:
            from dmqexport.cli_console import columns

            print(columns([(name.replace("_", " "), str(path)) for name, path in artifacts.items()]))
        if stage is Stage.COMPILE and build.compiled.missing is not None:
            raise BackendMissingError(
                build.compiled.missing,
                hint="`dmqexport build` writes a bundle with a script that finishes on a GPU host",
            )
        if stage is Stage.COMPILE and build.compiled.engine is None and not as_json:
            print(f"target {build.recipe.target.value} needs no engine: the deployed graph is what runs")

    return action


def _artifacts(build: "Build", stage: str) -> dict[str, Path]:
    """What a stage is for, by name."""
    from dmqexport.pipeline import Stage

    if stage == Stage.CALIBRATE:
        return {
            "trajectories": build.trajectories.path / "calibration.safetensors",
            "statistics": build.calibrated.path / "statistics.safetensors",
        }
    if stage in (Stage.PLAN, Stage.TRAIN):
        from dmqexport.quant_plan import PLAN_ARRAYS, PLAN_JSON
        from dmqexport.quant_weights import WEIGHT_CODES

        folder = (build.planned if stage == Stage.PLAN else build.trained_plan).path
        curve = {}
        if build.recipe.allocation.pareto:
            curve = {"pareto": build.pareto.path / "pareto.json", "pareto_plot": build.pareto.path / "pareto.svg"}
        return {
            "quant_plan": folder / PLAN_JSON,
            "quant_plan_arrays": folder / PLAN_ARRAYS,
            "weight_codes": folder / WEIGHT_CODES,
            **curve,
        }
    graphs = {
        "float_graph": build.float_graph,
        "canonical_graph": build.canonical_graph,
        "deployed_graph": build.deployed_graph,
    }
    if stage == Stage.COMPILE:
        engine = {"engine": build.compiled.engine, "build_log": build.compiled.log}
        return {"deployed_graph": build.deployed_graph, **{k: v for k, v in engine.items() if v is not None}}
    return graphs


def _validate(build: "Build", as_json: bool) -> None:
    from dmqexport.cli_console import columns, gate_rows, metric_rows
    from dmqexport.pipeline_report import ReportBuilder
    from dmqexport.pipeline_validate import Validation

    if build.recipe.drawn:
        raise RecipeError(
            "there is nothing to validate: statistics were drawn, not measured",
            hint="leave --random-statistics out; build and inspect show size and structure",
        )
    report = ReportBuilder(build, Validation(build))
    metrics = {key: value for key, value in report.validation.metrics.items() if key != "layers"}
    if as_json:
        print(json.dumps({"metrics": metrics, "gates": report.gates}, indent=1))
    else:
        print(columns([*metric_rows(metrics), *gate_rows(report.gates)]))
    _raise_gates([gate["name"] for gate in report.gates if gate["passed"] is False], None)


def _build(build: "Build", as_json: bool) -> None:
    from dmqexport.cli_console import print_summary
    from dmqexport.pipeline_bundle import run_build

    result = run_build(build)
    if as_json:
        kept = ("bits", "target", "metrics", "size_bytes", "latency", "gates", "engine", "warnings")
        print(json.dumps({"bundle": str(result.path), **{key: result.document[key] for key in kept}}, indent=1))
    else:
        print_summary(result.document, result.path)
    _raise_gates(list(result.failed_gates), result.path)
    if result.missing is not None:
        raise BackendMissingError(
            f"the bundle is complete but for its engine: {result.missing}",
            hint=f"on the GPU host run: cd {result.path} && python finish_on_gpu.py",
        )


def _raise_gates(failed: list[str], path: Path | None) -> None:
    if not failed:
        return
    hint = "thresholds are validation.gates in the recipe" + (
        "" if path is None else f"; the bundle was written, and its report says where it hurts: {path}"
    )
    if failed == ["latency_ratio"]:
        raise PerformanceGateError("slower than the recipe requires: latency_ratio", hint=hint)
    raise GateError(f"below the recipe's thresholds: {', '.join(failed)}", hint=hint)


_RESUME = """

Finished stages are kept in the work folder: the same command goes on where it was stopped, and other bits or targets
reuse what they have in common."""

_stage_command(
    "build",
    "Everything, from the model to the bundle.",
    """Everything: calibrate, plan, export, compile, validate, report, bundle.

\b
  dmqexport build -m emoji -o out/emoji --bits w4a4
  dmqexport build -m ./my-pipeline -o out/mine --bits w8a8 --target trt-rtx
  dmqexport build --recipe recipe.yaml -o out/mine --set validation.gates.image_psnr_db=30

FOLDER then holds a diffusers pipeline whose denoiser is quantized ONNX, and FOLDER/dmqexport/report.html. A failed
gate ends with exit code 3 or 4, and a missing TensorRT with 7; the bundle is written all the same. An earlier bundle
in FOLDER is replaced, anything else is left alone."""
    + _RESUME,
    _build,
)
_stage_command(
    "calibrate",
    "Record trajectories and activation statistics.",
    "Record float trajectories and gather activation statistics per timestep row." + _RESUME,
    _run_stages("calibrate"),
)
_stage_command(
    "plan",
    "Choose bits, scales and zero-points.",
    "Choose bits, scales and zero-points; write the QuantPlan and print where it is.\n\n"
    "Quantization is fixed here: every target computes with the integers of this plan." + _RESUME,
    _run_stages("plan"),
)
_stage_command(
    "train",
    "Distil the plan block by block and as a whole.",
    "Train weights, scales and tables as the recipe says; write the trained QuantPlan and print where it is.\n\n"
    "Recipes default and full train, fast does not: --recipe default, or any key under `training`." + _RESUME,
    _run_stages("train"),
)
_stage_command(
    "export",
    "Export the ONNX graph and rewrite it.",
    "Export the float ONNX graph and rewrite it for the target." + _RESUME,
    _run_stages("passes"),
)
_stage_command(
    "compile",
    "Build the engine and prove its precision.",
    "Build the target's engine and prove from the builder's log that its layers run in int8.\n\n"
    "Targets without an engine (onnx, ort-cpu) end with the deployed graph." + _RESUME,
    _run_stages("compile"),
)
_stage_command(
    "validate",
    "Measure the deployed graph against float.",
    "Measure the deployed graph against the float graph; exit code 3 when a gate fails.\n\n"
    "Predicted noise, pictures, and for the bundled model retrieval, on prompts that calibration never saw." + _RESUME,
    _validate,
)


for _verb, _summary in (
    (cli_bundle.run, "Draw pictures with a bundle."),
    (cli_bundle.inspect, "Show what a bundle holds, and verify it."),
    (cli_bundle.bench, "Time FP32 against quantized on this machine."),
    (cli_bundle.doctor, "Say what this machine can build and run."),
    (cli_models.models, "List the model presets."),
    (cli_models.convert, "Convert an original checkpoint."),
    (cli_package.package, "Write a bundle for an inference server."),
    (cli_ablate.ablate, "Compare quantization methods."),
    (cli_reproduce.verify_reproducible, "Build twice and compare byte for byte."),
):
    app.command(short_help=_summary)(_verb)


def main() -> None:
    """Entry point: turns errors into messages and exit codes."""
    try:
        code = app(prog_name="dmqexport", standalone_mode=False)
        if code == _INTERRUPTED:  # some releases of typer return this instead of raising
            raise KeyboardInterrupt
        sys.stdout.flush()
    except DmqExportError as error:
        logger.info("details", exc_info=error)
        if isinstance(error, RankError) and not speaks(error):
            sys.exit(error.exit_code)
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        kept = "; finished stages are kept, the same command resumes" if Session.resumable else ""
        if Session.rank == 0:
            print(f"interrupted{kept}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        _closed_pipe()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer exits with 1 by itself
            _closed_pipe()
        raise
    except Exception as error:
        _unexpected(error)
    sys.exit(code if isinstance(code, int) else 0)


def _closed_pipe() -> None:
    """The reader of our output has seen enough; what is left in the buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(_CLOSED_PIPE)


def _unexpected(error: Exception) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        sys.exit(RecipeError.exit_code)
    if hasattr(error, "format_message"):  # usage errors of typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "dmqexport"
        _fail(f"{error.format_message()}\n  hint: {command} --help", RecipeError.exit_code)
    text = str(error).lower()
    if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text or "out of memory" in text:
        logger.info("details", exc_info=error)
        _fail(
            "out of memory\n  hint: lower calibration.batch_size and validation.batch_size with --set",
            ResourceError.exit_code,
        )
    if Session.verbose:
        traceback.print_exception(error)
    _fail(f"internal: {type(error).__name__}: {error}\n  hint: -v shows where; please report it", 1)


def _fail(message: str, code: int) -> None:
    if Session.rank and not Session.resumable:
        sys.exit(code)  # rank 0 finds the same fault in the command
    who = f"rank {Session.rank}: " if Session.rank else ""
    print(f"error: {who}{message}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
