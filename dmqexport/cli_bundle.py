"""The verbs for finished bundles and for the machine."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmqexport.cli_log import start_logging
from dmqexport.cli_options import (
    BundleArgument,
    JsonOption,
    QuietOption,
    RebuildOption,
    SchedulerOption,
    StepsOption,
    ThreadsOption,
    VerboseOption,
    VerifyOption,
    WorkOption,
)
from dmqexport.errors import PerformanceGateError, ResourceError

if TYPE_CHECKING:
    from dmqexport.bundle import Bundle


def run(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="PNG to write.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; repeat for more rows.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Seed; repeat for more columns. Default 0."),
    ] = None,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="X", help="Guidance scale. Default: the build's.")
    ] = None,
    scheduler: SchedulerOption = None,
    scale: Annotated[int, typer.Option("--scale", metavar="N", min=1, max=32, help="Enlarge each pixel N times.")] = 1,
    threads: ThreadsOption = None,
    verify: VerifyOption = False,
    rebuild: RebuildOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw pictures with a bundle: a grid of prompts (rows) by seeds (columns).

    \b
      dmqexport run out/emoji -o a.png -p "grinning face" -p "red heart" --seed 1 --seed 2 --scale 4

    A bundle for OpenVINO runs there; any other one's graph runs in ONNX Runtime on the CPU, whatever its target.
    """
    start_logging(verbose=verbose, quiet=quiet)
    from dmqexport.bundle import open_bundle
    from dmqexport.cli_console import console_reporter

    opened = _rebuilt(bundle) if rebuild else open_bundle(bundle)
    if verify:
        opened = open_bundle(bundle, verify=True)
    with console_reporter(quiet=quiet) as reporter:
        from dmqexport.draw import draw_grid

        count = draw_grid(
            opened, output, prompt or [], seed or [0], steps, guidance, scheduler, scale, threads, reporter
        )
    print(f"{output}: {count} picture{'' if count == 1 else 's'}")


def inspect(
    bundle: BundleArgument,
    verify: VerifyOption = False,
    rebuild: RebuildOption = False,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer, worst first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle holds: bits, sizes, precision, what stayed in float and why.

    A changed manifest, missing files and wrong sizes are always found; --verify also finds changed content and files
    that the build did not write (exit code 6).
    """
    start_logging(verbose=False)
    from dmqexport.bundle import open_bundle

    opened = _rebuilt(bundle) if rebuild else open_bundle(bundle)
    if verify:
        opened = open_bundle(bundle, verify=True)
    if as_json:
        document = {key: value for key, value in opened.manifest.items() if key != "files"}
        result = {"manifest": document, "metrics": opened.report["metrics"]}
        if layers:
            result["layers"] = opened.report["layers"]
        print(json.dumps(result, indent=1))
        return
    from dmqexport.cli_console import print_bundle

    print_bundle(opened, layers)
    if verify:
        print(f"verified: all {len(opened.files)} files are as they were built")


def bench(
    bundle: BundleArgument,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Batch size.")] = 8,
    runs: Annotated[int, typer.Option("--runs", metavar="N", min=3, help="Timed runs of each graph.")] = 30,
    threads: ThreadsOption = None,
    max_ratio: Annotated[
        float | None, typer.Option("--max-ratio", metavar="X", help="Exit with 4 above this quantized/fp32.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="MODEL", help="The float model, if it has moved.")
    ] = None,
    work: WorkOption = None,
    details: Annotated[
        bool, typer.Option("--details", help="Also other runtimes, half precision, memory, layers, a trajectory.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the details there, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture of the details there, as SVG.")
    ] = None,
    rebuild: RebuildOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Time FP32 against quantized in the bundle's runtime, on the same inputs, interleaved; medians and ratio.

    \b
      dmqexport bench out/emoji --threads 1 --max-ratio 0.8
      dmqexport bench out/emoji --batch 8 --details -o bench.json --plot bench.svg

    The float graph comes from the build's work folder, or is exported again from the model, which must be the one the
    bundle was built from.
    """
    start_logging(verbose=verbose)
    for path in (output, plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ResourceError(f"{path} cannot be written: it is a folder, or in none", hint="name a file of a folder")
    details = details or output is not None or plot is not None
    from dmqexport.bundle import open_bundle
    from dmqexport.cli_console import console_reporter

    opened = _rebuilt(bundle) if rebuild else open_bundle(bundle)
    with console_reporter(quiet=as_json) as reporter:
        from dmqexport.bench import bench_bundle

        result = bench_bundle(opened, batch, runs, threads, reporter, model=model, work=work, details=details)
    if output is not None:
        _write(output, json.dumps(result, indent=1) + "\n")
    if plot is not None:
        from dmqexport.report.bench_chart import bench_svg

        _write(plot, bench_svg(result))
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        from dmqexport.cli_bench import print_bench

        print_bench(result)
    if max_ratio is not None and result["ratio"] > max_ratio:
        raise PerformanceGateError(f"ratio {result['ratio']:.3f} is above --max-ratio {max_ratio:g}")


def _rebuilt(path: Path) -> "Bundle":
    """The bundle, built anew where it does not fit this machine; what was done goes to standard error."""
    from dmqexport.pipeline_rebuild import rebuild

    return rebuild(path, lambda text: print(text, file=sys.stderr))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}", hint="name another file") from error


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can build and run, and what it lacks."""
    start_logging(verbose=False)
    from dmqexport.doctor import examine, render

    found = examine()
    print(json.dumps(found, indent=1) if as_json else render(found))
