# ruff: noqa: T201 - scripts talk to their user
"""What the comparisons with other quantizers share: one float model, one set of samples, one judge, one table.

Everything is `dmqexport validate`'s own: calibration points are those a build records, evaluation points, prompts and
seeds those it is judged on. The columns:

* eps SQNR: 10 log10(sum ref² / sum (quantized - ref)²) of the predicted noise, pooled over all evaluation points;
* image PSNR, SSIM: against the float model's picture of the same seed, after a whole sampling run, mean over pictures;
* retrieval: share of captions whose training picture is nearest to the picture drawn from it;
* Fréchet: distance to the training set over the named extractor's features, as a multiple of the float model's own.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.probe import ProbeResult
from calib.quantizer import simulate
from calib.sampling import CalibrationSet
from dmqexport.pipeline import Build
from dmqexport.pipeline_ablate import Judge
from dmqexport.recipe import load_recipe
from dmqexport.workspace import SilentReporter, Workspace


@dataclass(frozen=True)
class Row:
    """One line of the table. metrics: as `Judge` gives them; seconds: quantization alone."""

    method: str
    bits: str
    metrics: Mapping[str, Any]
    float_layers: tuple[str, ...]
    float_macs_share: float
    seconds: float


class Bench:
    """The float model, the shared samples, and the float results everything is measured against."""

    def __init__(self, options: argparse.Namespace) -> None:
        """options: of `parser`. Draws the float pictures, unless `--work` holds them."""
        self.work: Path = options.work
        self.settings = [
            f"calibration.size={options.calib_size}",
            f"validation.retrieval={options.pictures}",
            f"validation.images={min(16, options.pictures)}",
            f"validation.entries={options.eval_size}",
        ]
        # Without factors the graph that peers are given is the float model as it was loaded.
        plain = load_recipe(None, {"model": "emoji"}, [*self.settings, "scaling.method=none"])
        self.judge = Judge(plain, self.work)
        self.judge.prepare()
        self.build = self.judge.build
        self.batch_size = self.build.recipe.calibration.batch_size

    @property
    def denoiser(self) -> nn.Module:
        """The float UNet, as it was loaded."""
        return self.build.model.denoiser

    @property
    def calibration(self) -> CalibrationSet:
        """The points that everyone calibrates on."""
        return self.build.calibration_set

    @property
    def found(self) -> ProbeResult:
        """What dmqexport quantizes."""
        return self.build.probe_result

    def run(self, denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predicted noise."""
        return denoiser(**inputs, return_dict=False)[0]

    def row(self, method: str, bits: str, denoiser: Any, float_layers: Sequence[str], seconds: float) -> Row:
        """Judge `denoiser`."""
        metrics, _ = self.judge.judge(denoiser)
        return Row(method, bits, metrics, tuple(float_layers), self.float_share(float_layers), seconds)

    def float_share(self, names: Sequence[str]) -> float:
        """Share of the multiply-accumulates of Conv and Linear layers that `names` hold."""
        macs = {layer.name: layer.macs for layer in self.found.layers}
        return sum(macs.get(name, 0) for name in names) / sum(macs.values())

    def ours(self, recipe: str, bits: str, *assignments: str, name: str | None = None) -> Row:
        """dmqexport with a recipe, on a model of its own: folded factors stay out of the peers' weights."""
        start = time.perf_counter()
        resolved = load_recipe(recipe, {"model": "emoji", "bits": bits}, [*self.settings, *assignments])
        build = Build(resolved, self.work / "bundle", Workspace(self.work, SilentReporter()))
        plan = build.plan
        seconds = time.perf_counter() - start
        kept = [layer.name for layer in self.found.layers if layer.name in plan.float_layers]
        with simulate(build.model.denoiser, plan, build.weights):
            return self.row(name or f"dmqexport, recipe {recipe}", bits, build.model.denoiser, kept, seconds)


def parser(description: str, output: str) -> argparse.ArgumentParser:
    """The options that every comparison takes."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--calib-size", type=int, default=64, help="calibration trajectories (default: 64)")
    found.add_argument("--eval-size", type=int, default=400, help="held-out trajectory points (default: 400)")
    found.add_argument("--pictures", type=int, default=200, help="pictures drawn by every method (default: 200)")
    found.add_argument("--recipes", nargs="*", default=["fast"], help="dmqexport's recipes beside the peer (fast)")
    found.add_argument("--work", type=Path, default=Path("peer.work"), help="work folder, shared by comparisons")
    found.add_argument("--output", type=Path, default=Path(output))
    return found


def table(rows: Sequence[Row], layers: int) -> str:
    """Markdown, one line a row."""
    lines = [
        "| method | bits | eps SQNR (dB) | image PSNR (dB) | SSIM | retrieval | Fréchet / float's "
        "| Conv and Linear layers in float (share of MACs) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        kept = f"{len(row.float_layers)} of {layers} ({row.float_macs_share:.1%})" if row.float_layers else "none"
        values = [
            _text(row.metrics.get(key), digits)
            for key, digits in (
                ("eps_sqnr_db", 1),
                ("image_psnr_db", 1),
                ("image_ssim", 3),
                ("retrieval_accuracy", 3),
                ("frechet_train_ratio", 2),
            )
        ]
        lines.append(f"| {row.method} | {row.bits} | {' | '.join(values)} | {kept} |")
    return "\n".join(lines)


def _text(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def report(
    bench: Bench, rows: Iterator[Row], order: Callable[[Row], Any], versions: Mapping[str, str], output: Path
) -> None:
    """Print rows as they come, then the table in `order`; write the JSON after every row."""
    found: list[Row] = []
    layers = len(bench.found.layers)
    print(f"{versions}; {len(bench.calibration)} calibration points", flush=True)
    for row in rows:
        found.append(row)
        print(table([row], layers).splitlines()[-1], flush=True)
        document = {
            "model": bench.build.model.name,
            "model_fingerprint": bench.build.model.fingerprint,
            "steps": bench.build.steps,
            "guidance": bench.build.guidance,
            "calibration_points": len(bench.calibration),
            "settings": bench.settings,
            "versions": {**versions, "torch": torch.__version__, "python": platform.python_version()},
            "rows": [asdict(item) for item in sorted(found, key=order)],
        }
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(sorted(found, key=order), layers))
    print("\nAttention matmuls are in float in every row of dmqexport.")
