"""Comparing two graphs and linting one, by NVIDIA Polygraphy through its Python API; Polygraphy loads late."""

import argparse
import importlib.util
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmqexport.errors import BackendMissingError, EngineError
from engines.ort import Optimization, OrtRunner
from engines.runner import Arrays

Level = Literal["error", "warning", "info"]
#: What ONNX Runtime says of a node that is given bytes for FP8 codes.
_HANDED_ON = re.compile(r"tensor\(uint8\) and tensor\(float8")


@dataclass(frozen=True)
class OutputComparison:
    """How far one output of the deployed graph lies from the reference, over all elements of all inputs."""

    mean_abs_error: float
    """Mean |deployed - reference|: the figure that is judged."""
    median_abs_error: float
    """Float rounding alone when the graphs agree and only codes on a rounding tie differ."""
    max_abs_error: float
    """For the reader; never judged."""
    atol: float
    """What mean_abs_error may be at most."""
    passed: bool


@dataclass(frozen=True)
class GraphComparison:
    """Polygraphy's verdict on two graphs, by output name, and in `note` what was compared and how."""

    passed: bool
    outputs: Mapping[str, OutputComparison]
    note: str


@dataclass(frozen=True)
class LintFinding:
    """One entry of Polygraphy's lint report. node is None when it concerns the whole model."""

    level: Level
    node: str | None
    message: str


def version() -> str | None:
    """Version of Polygraphy, None when it is not installed."""
    if importlib.util.find_spec("polygraphy") is None:
        return None
    import polygraphy

    return str(polygraphy.__version__)


def compare_graphs(
    reference: Path,
    deployed: Path,
    inputs: Sequence[Arrays],
    *,
    max_mean_relative_error: float,
    config: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> GraphComparison:
    """Run both graphs on `inputs` in ONNX Runtime and judge the mean absolute error of every output.

    An output passes when its mean absolute error over all inputs is at most `max_mean_relative_error` times the
    reference's mean magnitude. The maximum is not judged: a value that falls on a rounding tie may take either
    integer, and in a deep net that one code moves the whole output of its sample by about as much as quantization
    itself does. Measured on a W4A4 UNet, one sample in twelve differs so and the others agree to 2e-7: give enough
    samples that the mean says something (64 or more), and set the bound for the bits at hand. Element-wise relative
    error is not judged either: outputs cross zero.

    reference: executed node by node as written. deployed: as a user runs it, all optimizations on, with the session
    `config` its target needs (Polygraphy's command line cannot set those).
    Raises EngineError when the two graphs cannot be compared at all, or a run fails.
    """
    if not inputs:
        raise EngineError(f"{deployed.name}: nothing to compare on, `inputs` is empty")
    if not max_mean_relative_error > 0:
        raise EngineError(f"max_mean_relative_error must be above 0, got {max_mean_relative_error}")
    require_polygraphy()
    # Opened by Polygraphy, one after the other: both together hold a large model three times.
    sides: dict[str, Callable[[], Any]] = {
        "reference": lambda: OrtRunner(reference, optimization=Optimization.REFERENCE, threads=threads).session,
        "deployed": lambda: OrtRunner(deployed, optimization=Optimization.FAST, threads=threads, config=config).session,
    }
    pair = f"{deployed.name} against {reference.name}"
    # Polygraphy pairs by name and passes over what only one side has; an output that is not compared must not pass.
    (wanted, outputs_wanted), (inputs_found, outputs_found) = (_names(path) for path in (reference, deployed))
    _require_equal(pair, "inputs", wanted, inputs_found)
    _require_equal(pair, "outputs", outputs_wanted, outputs_found)
    feeds = [{name: array for name, array in feed.items() if name in wanted} for feed in inputs]

    from polygraphy import comparator
    from polygraphy.backend.onnxrt import OnnxrtRunner

    with _silent():
        try:
            runs = comparator.Comparator.run(
                [OnnxrtRunner(opened, name=name) for name, opened in sides.items()], data_loader=feeds
            )
        except Exception as error:  # Polygraphy's own errors and onnxruntime's untyped ones
            raise EngineError(f"{pair}: a run failed: {error}") from error
        (_, expected), (_, got) = runs
        for left, right in zip(expected, got, strict=True):
            for name in left:
                _require_equal(pair, f"shape of {name}", left[name].shape, right[name].shape)
        # One result for all inputs: Polygraphy 0.50 judges input by input, and a single sample's tie must not decide.
        joined = comparator.RunResults()
        for side, results in runs:
            arrays = {name: np.concatenate([result[name].ravel() for result in results]) for name in results[0]}
            joined.append((side, [comparator.IterationResult(arrays, runner_name=side)]))
        magnitudes = {name: np.abs(array, dtype=np.float64).mean() for name, array in joined[0][1][0].items()}
        atol = {name: max_mean_relative_error * float(magnitude) for name, magnitude in magnitudes.items()}
        # CompareFunc.simple is deprecated where SimpleCompareFunc exists, and all there is before that.
        simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple
        judge = simple(atol=atol, rtol=0.0, check_error_stat="mean")
        judged: dict[str, Any] = {}

        def recorded(left: Any, right: Any) -> Any:
            # What compare_accuracy returns differs between Polygraphy versions; what the judge returns does not.
            judged.update(judge(left, right))
            return judged

        passed = bool(comparator.Comparator.compare_accuracy(joined, compare_func=recorded))
    outputs = {
        name: OutputComparison(
            mean_abs_error=float(result.mean_absdiff),
            median_abs_error=float(result.median_absdiff),
            max_abs_error=float(result.max_absdiff),
            atol=atol[name],
            passed=bool(result),
        )
        for name, result in judged.items()
    }
    samples = sum(math.prod(next(iter(result.values())).shape[:1]) for result in expected)
    note = (
        f"Polygraphy {version()}: {deployed.name} (optimized) against {reference.name} (as written) on {samples} "
        f"samples; mean absolute error at most {max_mean_relative_error:g} of the mean magnitude"
    )
    return GraphComparison(passed and all(output.passed for output in outputs.values()), outputs, note)


def lint_graph(path: Path, inputs: Arrays | None = None) -> list[LintFinding]:
    """Polygraphy's lint of an ONNX graph: specification, names, unused nodes and inputs, and a run of every node.

    A graph without an "error" is one that the ONNX checker accepts and ONNX Runtime runs, its own operators
    (com.microsoft) included; an operator that ONNX Runtime does not know is a "warning", as in `polygraphy check lint`,
    and so is a node that reads FP8 codes, whose values numpy has no type for.
    inputs: what to run the nodes on; without them Polygraphy makes up values, with 1 for every dynamic dimension.
    Keep other threads quiet meanwhile: Polygraphy takes the process's stdout and stderr to read the runtime's
    warnings, and would take foreign lines on stderr for them.
    Raises EngineError when linting itself failed.
    """
    require_polygraphy()
    if importlib.util.find_spec("onnx_graphsurgeon") is None:
        raise BackendMissingError(
            "Polygraphy's lint needs onnx-graphsurgeon", hint="pip install 'onnx-graphsurgeon>=0.5'"
        )
    if not path.is_file():
        raise EngineError(f"{path}: no such file to lint")
    from polygraphy.json import save_json
    from polygraphy.tools.check.subtool.lint import Lint

    with tempfile.TemporaryDirectory() as folder, _silent():
        arguments = [str(path)]
        if inputs is not None:
            feed = Path(folder) / "inputs.json"
            save_json([dict(inputs)], str(feed))
            arguments += ["--load-inputs", str(feed)]
        tool = Lint()
        parser: argparse.ArgumentParser = tool.setup_parser()
        try:
            tool.parse(parser.parse_args(arguments))
            tool.run(parser.parse_args(arguments))
        except Exception as error:  # Polygraphy's own errors, and the parser's on a file that is no graph
            raise EngineError(f"{path}: Polygraphy could not lint this graph: {error}") from error
        entries: list[dict[str, Any]] = tool.report.lint_entries
    levels: dict[str, Level] = {"exception": "error", "warning": "warning", "info": "info"}
    found = []
    for entry in entries:
        level, message = levels[entry["level"]], str(entry["message"]).strip()
        if _HANDED_ON.search(message):
            level, message = "warning", f"not run, since Polygraphy hands FP8 values on as bytes: {message}"
        found.append(LintFinding(level, next(iter(entry.get("nodes", ())), None), message))
    return found


def check_graph(path: Path) -> None:
    """Have the ONNX checker read the graph, its weights left in their file. Raises EngineError for what it refuses."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except Exception as error:  # its own errors, and protobuf's of a file that is no graph
        raise EngineError(f"{path}: the ONNX checker refuses this graph: {error}") from error


def require_polygraphy() -> None:
    """Raise BackendMissingError, with the way out, unless Polygraphy is installed."""
    if importlib.util.find_spec("polygraphy") is None:
        raise BackendMissingError("Polygraphy is not installed", hint="pip install 'polygraphy>=0.50'")


def _names(path: Path) -> tuple[list[str], list[str]]:
    """Sorted names of a graph's inputs and outputs; weights outside the file stay there. Raises EngineError."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # the file's and protobuf's own
        raise EngineError(f"{path} cannot be read as an ONNX graph: {error}") from error
    held = {tensor.name for tensor in graph.initializer}
    return sorted({value.name for value in graph.input} - held), sorted(value.name for value in graph.output)


def _require_equal(pair: str, what: str, reference: object, deployed: object) -> None:
    if reference != deployed:
        raise EngineError(f"{pair}: {what} {deployed}, expected {reference}")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Polygraphy from printing: what it found is in the result, and only the command line prints."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield
