"""The ablation: which methods, at which bits, from which seeds; every run in a process of its own, kept, and averaged.

A method is an overlay over the recipe: the keys in which it differs, by name, in `ablation_methods.yaml`. Runs share
one work folder, so that trajectories and statistics are computed once. A run's process ends with it, so that its peak
memory is its own.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

import dmqexport
from dmqexport.ablation_table import Method
from dmqexport.errors import DmqExportError, RecipeError, ResourceError
from dmqexport.recipe import Recipe, load_recipe
from dmqexport.workspace import file_errors, writable_folder

SCHEMA_VERSION: Final = 1
#: Measured in every run and averaged over seeds: key → (label, digits, whether more is better).
METRICS: Final[Mapping[str, tuple[str, int, bool]]] = {
    "eps_sqnr_db": ("eps SQNR (dB)", 2, True),
    "image_psnr_db": ("image PSNR (dB)", 2, True),
    "image_ssim": ("SSIM", 4, True),
    "frechet_train": ("Fréchet, training set", 4, False),
    "frechet_float": ("Fréchet, float", 4, False),
    "retrieval_accuracy": ("retrieval", 3, True),
}
#: What the float side depends on, beside the code.
_JUDGED: Final = {"model", "revision", "lora", "sampling", "validation"}
_RUNS: Final = "runs"
_LAST_LINES: Final = 6


class AblationError(DmqExportError):
    """Runs of an ablation that failed; the others' results were written."""


@dataclass(frozen=True)
class Run:
    """One cell of the table before averaging. recipe: fully resolved; method: None for the float model alone."""

    method: str | None
    bits: str
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        """How the run is called in progress lines."""
        return "float model" if self.method is None else f"{self.method} {self.bits} seed {self.seed}"

    def stem(self, key: str) -> str:
        """File name without suffix, unique for `key`."""
        return f"{self.label.replace(' ', '-')}-{key[:12]}"


@dataclass(frozen=True)
class Outcome:
    """What a run left. result: None when it failed, and `failure` says why. cached: it was done before."""

    run: Run
    result: Mapping[str, Any] | None
    failure: str | None
    cached: bool
    seconds: float


def plan_runs(
    base: Mapping[str, Any],
    methods: Sequence[Method],
    bits: Sequence[str],
    seeds: Sequence[int],
    assignments: Sequence[str],
    effort: float = 1.0,
) -> list[Run]:
    """Every run, the float model first, then whole tables seed by seed: an early stop leaves comparable rows.

    base: dotted recipe keys of the command line, `model` among them; assignments: `--set`, which wins over methods;
    effort: share of every method's training iterations that is spent, at least one where there are any.
    Raises RecipeError for a method whose recipe does not resolve, naming it.
    """

    def resolve(method: Method, width: str, seed: int) -> Recipe:
        options = {**base, "bits": width, "seed": seed}
        try:
            return with_effort(load_recipe(method.base, options, [*method.assignments, *assignments]), effort)
        except DmqExportError as error:
            raise type(error)(f"method {method.name!r}: {error.message}", hint=error.hint) from error

    # Pictures are judged on seed 0 whatever the methods' seeds: a deviation over seeds is then the methods' own.
    runs = [Run(None, "float", 0, load_recipe(None, {**base, "seed": 0}, assignments))]
    for seed in seeds:
        runs += [Run(m.name, width, seed, resolve(m, width, seed)) for width in bits for m in methods]
    return runs


def with_effort(recipe: Recipe, effort: float) -> Recipe:
    """The recipe with `effort` times its training iterations: less for a quick look, more for patience."""
    if not (effort > 0 and math.isfinite(effort)):
        raise RecipeError(f"effort is {effort:g}, expected a number above 0", hint="1 is the methods' own iterations")

    def scaled(iterations: int) -> int:
        return math.ceil(iterations * effort)

    training = recipe.training
    stages = {
        name: getattr(training, name).model_copy(update={"iterations": scaled(getattr(training, name).iterations)})
        for name in ("blocks", "network", "sampler")
    }
    return recipe.model_copy(update={"training": training.model_copy(update=stages)})


class Ablation:
    """Runs on one folder: `runs/` keeps every finished one, `work/` the stages that they share."""

    def __init__(self, folder: Path, work: Path | None = None, *, resume: bool = True) -> None:
        """Raises ResourceError when the folders cannot be written."""
        self.folder = folder
        self.runs_folder = folder / _RUNS
        self.work = work if work is not None else folder / "work"
        self._resume = resume
        for path in (folder, self.runs_folder, self.work):
            writable_folder(path)

    def execute(self, runs: Sequence[Run], report: Callable[[Outcome, int, int], None]) -> list[Outcome]:
        """Do every run that is not done, the float model's first; `report` hears (outcome, runs done, runs in all).

        A run that fails is recorded and the next one starts, unless it is the float model, without which nothing can
        be judged: then AblationError.
        """
        judged_by = runs[0].recipe
        outcomes = []
        for position, run in enumerate(runs):
            outcome = self._one(run, judged_by)
            outcomes.append(outcome)
            report(outcome, position + 1, len(runs))
            if run.method is None and outcome.failure is not None:
                raise AblationError(f"the float model could not be drawn: {outcome.failure}", hint=self._log_hint(run))
        return outcomes

    def _one(self, run: Run, judged_by: Recipe) -> Outcome:
        start = time.perf_counter()
        key = run_key(run, judged_by)
        path = self.runs_folder / f"{run.stem(key)}.json"
        if self._resume:
            found = _read_result(path, key)
            if found is not None:
                return Outcome(run, found, None, True, time.perf_counter() - start)
        job = {
            "key": key,
            "method": run.method,
            "bits": run.bits,
            "seed": run.seed,
            "recipe": run.recipe.model_dump(mode="json"),
            "judged_by": judged_by.model_dump(mode="json"),
            "work": str(self.work.resolve()),
            "result": str(path.resolve()),
        }
        with file_errors(self.runs_folder):
            job_path, log_path = path.with_suffix(".job"), path.with_suffix(".log")
            job_path.write_text(json.dumps(job), encoding="utf-8")
            with log_path.open("wb") as log:
                command = [sys.executable, "-m", "dmqexport.pipeline_ablate", str(job_path)]
                # The child finds the very package that runs here, wherever the command was started.
                paths = [str(Path(dmqexport.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in paths if part)}
                code = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
                ).returncode
            job_path.unlink()
        seconds = time.perf_counter() - start
        result = _read_result(path, key) if code == 0 else None
        if result is None:
            return Outcome(run, None, _last_words(log_path, code), False, seconds)
        return Outcome(run, result, None, False, seconds)

    def _log_hint(self, run: Run) -> str:
        return f"the whole story is in {self.runs_folder}/{run.label.replace(' ', '-')}-*.log"


def run_key(run: Run, judged_by: Recipe) -> str:
    """What a finished run depends on, sha256 in hex: its recipe, what it is judged by, and the version of the code."""
    parts = {
        "schema": SCHEMA_VERSION,
        "dmqexport": dmqexport.__version__,
        "method": run.method,
        "recipe": run.recipe.model_dump(mode="json") if run.method is not None else None,
        "judged_by": judged_by.model_dump(mode="json", include=_JUDGED),
        # Models without a retrieval metric are judged on the prompts that calibration leaves.
        "calibration": [judged_by.calibration.prompts, judged_by.calibration.size],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_result(path: Path, key: str) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def _last_words(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    words = errors[-1:] or lines[-_LAST_LINES:]
    killed = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return "\n".join(words) or killed


def summarize(outcomes: Sequence[Outcome], methods: Sequence[Method]) -> dict[str, Any]:
    """The document of ablation.json: one row a method and width, mean and standard deviation over seeds.

    Every row names its runs. A figure that no run measured is null; the deviation of a single seed is null too.
    """
    titles = {method.name: method for method in methods}
    reference = next((o.result for o in outcomes if o.run.method is None and o.result is not None), None)
    rows = []
    for name, bits in dict.fromkeys((o.run.method, o.run.bits) for o in outcomes if o.run.method is not None):
        cell = [o for o in outcomes if (o.run.method, o.run.bits) == (name, bits)]
        results = [o.result for o in cell if o.result is not None]
        method = titles[str(name)]
        rows.append(
            {
                "method": name,
                "title": method.title,
                "group": method.group,
                "source": method.source,
                "bits": bits,
                "seeds": [o.run.seed for o in cell if o.result is not None],
                "metrics": {key: _spread([r["metrics"].get(key) for r in results]) for key in METRICS},
                "frechet_ratio": _spread([r["metrics"].get("frechet_train_ratio") for r in results]),
                "seconds": _spread([r["seconds"] for r in results]),
                "peak_rss_bytes": _spread([r["peak_rss_bytes"] for r in results]),
                "average_bits": results[0]["average_bits"] if results else None,
                "pictures": results[0]["pictures"] if results else None,
                "failures": {str(o.run.seed): o.failure for o in cell if o.failure is not None},
                "runs": [dict(result) for result in results],
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "dmqexport_version": dmqexport.__version__,
        "reference": dict(reference) if reference is not None else None,
        "rows": rows,
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of what was measured."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return {"mean": fmean(known) if known else None, "std": stdev(known) if len(known) > 1 else None}


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all; raises ResourceError."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error}", hint="choose another -o/--output") from error


def failures(outcomes: Sequence[Outcome]) -> AblationError | None:
    """The error to end with, or None when every run succeeded."""
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    if not failed:
        return None
    lines = [f"{len(failed)} of {len(outcomes)} runs failed:"]
    lines += [f"  {outcome.run.label}: {(outcome.failure or '').splitlines()[0]}" for outcome in failed]
    return AblationError("\n".join(lines), hint="the others are in the table; runs/*.log tell more")
