# ruff: noqa: T201 - a script talks to its user
"""Accuracy beside NVIDIA Model Optimizer, on the bundled model: same samples, same bits, same seeds.

    python -m venv peer && peer/bin/pip install . nvidia-modelopt     # its own environment: it has its own pins
    peer/bin/python tests/benchmarks/peer_modelopt.py --bits w8a8 w6a6 w4a4 --output peer_modelopt.json

Both sides start from the same float UNet, calibrate on the same recorded trajectory points and are judged on the same
held-out ones and on the same seeds:

* eps SQNR: 10 log10(sum ref² / sum (quantized - ref)²) of the predicted noise, pooled over all evaluation points;
* image PSNR: mean over the pictures of a whole sampling run, against the float model's picture of the same seed.

dmqexport runs its own calibration and the fake quantization that its ONNX graph reproduces code by code. Model
Optimizer runs `mtq.quantize` as documented, in several settings, so that no difference is a badly chosen one:

* recipe: its preset for diffusers (`configs/ptq/presets/diffusers/int8`) with the layers its diffusers example leaves
  in float by name: time embedding and its projections, first and last convolution, all shortcut convolutions.
  "dmqexport, the recipe's float layers" leaves the same ones;
* default: `INT8_DEFAULT_CFG` as it ships, whose name patterns (made for language models) leave the blocks' `proj_out`;
* same layers: every layer that dmqexport quantizes, at the same bits, the boundary at 8: the like-for-like rows. With
  max calibration (its default), with its `mse` search of weight scales, and with SmoothQuant, which it has for 8 bits
  only, at its default alpha of 1 and at 0.5.

Not tried: the percentile calibrator of its diffusers example, which is not part of the package, and its training
(QAT) and mixed-precision search, which have no counterpart here. At bits other than 8 only `num_bits` changes; those
rows are simulations that its exporter refuses to write ("Number of bits must be 8 for INT8 ONNX export").
"""

import argparse
import copy
import fnmatch
import importlib
import io
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.bit_allocation import uniform
from calib.channel_scaling import ScalingSettings, choose_scaling
from calib.equalize import apply_folds, fold_sites
from calib.freeze import freeze
from calib.observer import Observer
from calib.probe import ProbeResult, probe
from calib.quantizer import simulate
from calib.sampling import TIMESTEP, CalibrationSet
from calib.second_order import refine_weights
from calib.timestep_table import equal_groups, used_rows
from dmqexport.models.loading import LoadedModel, load_model
from dmqexport.models.sampling import sample_images, set_denoiser
from dmqexport.quant_plan import QuantWeights
from dmqexport.quant_types import BitWidths

SCALING_ENTRIES = 512
REFINE_ENTRIES = 1024
ROWS = 10
SAMPLES_PER_ROW = 8192
CALIBRATION_SEED = 1_000_000
# The names that the diffusers example of Model Optimizer leaves in float by default (those that SD-like UNets have).
EXAMPLE_KEEPS_FLOAT = ("time_emb_proj", "time_embedding", "conv_in", "conv_out", "conv_shortcut", "add_embedding")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    bits: str
    eps_sqnr_db: float
    image_psnr_db: float
    float_layers: tuple[str, ...]
    float_macs_share: float
    seconds: float


@dataclass(frozen=True)
class Setting:
    """One way to run Model Optimizer.

    config: bits -> its configuration. keep_float: parts of names to disable afterwards, as its example does.
    only_8_bits: its algorithm does nothing at other widths.
    """

    name: str
    config: Callable[[BitWidths], dict[str, Any]]
    keep_float: tuple[str, ...] = ()
    only_8_bits: bool = False


@dataclass
class Bench:
    """The float model, the shared samples, and the float results everything is measured against."""

    loaded: LoadedModel
    calibration: CalibrationSet
    evaluation: CalibrationSet
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch_size: int
    found: ProbeResult = field(init=False)
    reference: Tensor = field(init=False)
    pictures: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.found = probe(self.loaded.denoiser, self._probe_run)
        self.reference = self.predict(self.loaded.denoiser)
        self.pictures = self.draw()

    def run(self, denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predicted noise."""
        return denoiser(**inputs, return_dict=False)[0]

    def predict(self, denoiser: nn.Module) -> Tensor:
        """Predicted noise on every evaluation point."""
        return torch.cat([self.run(denoiser, batch) for _, batch in self.evaluation.batches(self.batch_size)])

    def draw(self) -> np.ndarray:
        """Pictures with whatever denoiser the pipeline holds, uint8 [N, H, W, 3]."""
        return sample_images(
            self.loaded,
            self.prompts,
            self.seeds,
            steps=self.loaded.default_steps,
            guidance=self.loaded.default_guidance,
            batch_size=self.batch_size,
        ).images

    def judge(self, denoiser: nn.Module) -> tuple[float, float]:
        """(eps SQNR, mean image PSNR) of `denoiser`, which the pipeline must hold."""
        error = (self.predict(denoiser) - self.reference).double().square().sum()
        sqnr = 10 * torch.log10(self.reference.double().square().sum() / error)
        difference = (self.draw().astype(np.float64) - self.pictures) / 255
        # A picture that is equal to the last bit counts as an error of half a code, not as infinitely good.
        squared = np.maximum(np.square(difference).mean(axis=(1, 2, 3)), (0.5 / 255) ** 2)
        return float(sqnr), float(np.mean(-10 * np.log10(squared)))

    def float_share(self, names: Sequence[str]) -> float:
        """Share of the multiply-accumulates of Conv and Linear layers that `names` hold."""
        macs = {layer.name: layer.macs for layer in self.found.layers}
        return sum(macs.get(name, 0) for name in names) / sum(macs.values())

    def _probe_run(self, index: int) -> Tensor:
        first, last = int(torch.argmin(self.calibration.timesteps)), int(torch.argmax(self.calibration.timesteps))
        inputs = self.calibration.select(torch.tensor([first]))
        if index == 1:
            other = self.calibration.select(torch.tensor([last]))
            inputs = {name: other[name] if name in ("sample", TIMESTEP) else v for name, v in inputs.items()}
        return self.run(self.loaded.denoiser, inputs)


def ours(bench: Bench, requested: Sequence[str]) -> Iterator[Row]:
    """dmqexport's calibration, plan and simulation for every width, with and without float layers."""
    denoiser = bench.loaded.denoiser
    used = np.unique(bench.calibration.timesteps.numpy())
    row_map = used_rows(equal_groups(bench.loaded.num_train_timesteps, ROWS), used)
    original = {name: value.clone() for name, value in denoiser.state_dict().items()}
    entries = bench.calibration.subset(SCALING_ENTRIES, 0)
    recipe_floats = [layer.name for layer in bench.found.layers if any(n in layer.name for n in EXAMPLE_KEEPS_FLOAT)]
    for bits in requested:
        for name, keep in (("dmqexport", []), ("dmqexport, the recipe's float layers", recipe_floats)):
            start = time.perf_counter()
            denoiser.load_state_dict(original)
            with tempfile.TemporaryDirectory() as folder:
                codes = Path(folder) / "codes.safetensors"
                chosen = uniform(bench.found, BitWidths.parse(bits), bench.loaded.family.boundary, {}, keep)
                scaling = choose_scaling(
                    denoiser,
                    bench.found,
                    chosen,
                    row_map,
                    entries,
                    lambda inputs: bench.run(denoiser, inputs),
                    bench.batch_size,
                    ScalingSettings(),
                    0,
                )
                first = entries.select(torch.tensor([0]))
                apply_folds(denoiser, fold_sites(denoiser), scaling.folds, partial(bench.run, denoiser, first))
                observer = Observer(bench.found, row_map, SAMPLES_PER_ROW, 0, False, scaling.factors)
                statistics = observer.observe(
                    denoiser, bench.calibration, lambda inputs: bench.run(denoiser, inputs), bench.batch_size
                )
                plan = freeze(
                    denoiser,
                    bench.found,
                    chosen,
                    statistics,
                    row_map,
                    None,
                    bench.loaded.fingerprint,
                    bits,
                    codes,
                    factors=scaling.factors,
                )
                plan, refined = refine_weights(
                    denoiser,
                    plan,
                    QuantWeights(codes),
                    bench.calibration.subset(REFINE_ENTRIES, 0),
                    lambda inputs: bench.run(denoiser, inputs),
                    bench.batch_size,
                    0,
                )
                QuantWeights.save(codes, refined)
                seconds = time.perf_counter() - start
                with simulate(denoiser, plan, QuantWeights(codes)):
                    sqnr, psnr = bench.judge(denoiser)
            kept = tuple(layer.name for layer in bench.found.layers if layer.name in plan.float_layers)
            yield Row(name, bits, sqnr, psnr, kept, bench.float_share(kept), seconds)
    denoiser.load_state_dict(original)  # the peer starts from the model as it was


def settings(bench: Bench, mtq: Any) -> list[Setting]:
    """Every way in which Model Optimizer is run."""
    load_config = importlib.import_module("modelopt.torch.opt.config_loader").load_config
    schema = importlib.import_module("modelopt.torch.quantization.config").QuantizeConfig
    preset = load_config("configs/ptq/presets/diffusers/int8", schema_type=schema).model_dump(exclude_unset=True)

    def at(base: Mapping[str, Any]) -> Callable[[BitWidths], dict[str, Any]]:
        def config(widths: BitWidths) -> dict[str, Any]:
            result = copy.deepcopy(dict(base))
            for entry in result["quant_cfg"]:
                attributes = entry.get("cfg") or {}
                if "num_bits" in attributes:
                    weight = "weight" in entry["quantizer_name"]
                    attributes["num_bits"] = widths.weight if weight else widths.activation
            return result

        return config

    def same_layers(algorithm: str | dict[str, Any]) -> Callable[[BitWidths], dict[str, Any]]:
        boundary = [
            layer.name
            for layer in bench.found.layers
            if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in bench.loaded.family.boundary)
        ]

        def config(widths: BitWidths) -> dict[str, Any]:
            result = at(preset)(widths)
            result["algorithm"] = algorithm
            for name in boundary:
                for kind, axis in (("weight", 0), ("input", None)):
                    result["quant_cfg"].append(
                        {"quantizer_name": f"{name}.{kind}_quantizer", "cfg": {"num_bits": 8, "axis": axis}}
                    )
            return result

        return config

    return [
        Setting("Model Optimizer, diffusers recipe", at(preset), EXAMPLE_KEEPS_FLOAT),
        Setting("Model Optimizer, INT8_DEFAULT_CFG", at(mtq.INT8_DEFAULT_CFG)),
        Setting("Model Optimizer, same layers, max", same_layers("max")),
        Setting("Model Optimizer, same layers, mse", same_layers("mse")),
        *(
            Setting(
                f"Model Optimizer, same layers, smoothquant {alpha}",
                same_layers({"method": "smoothquant", "alpha": alpha}),
                only_8_bits=True,
            )
            for alpha in (1.0, 0.5)
        ),
    ]


def peer(bench: Bench, mtq: Any, setting: Setting, bits: str) -> Row:
    """Model Optimizer in one setting."""
    start = time.perf_counter()
    model = copy.deepcopy(bench.loaded.denoiser)

    def forward_loop(quantized: nn.Module) -> None:
        for _, batch in bench.calibration.batches(bench.batch_size):
            bench.run(quantized, batch)

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it counts aloud; the table says it all
        mtq.quantize(model, setting.config(BitWidths.parse(bits)), forward_loop)
        if setting.keep_float:
            mtq.disable_quantizer(model, lambda name: any(part in name for part in setting.keep_float))
    seconds = time.perf_counter() - start
    kept = []
    for layer in bench.found.layers:
        module = model.get_submodule(layer.name)
        if not (module.weight_quantizer.is_enabled and module.input_quantizer.is_enabled):
            kept.append(layer.name)
    with in_pipeline(bench.loaded, model):
        sqnr, psnr = bench.judge(model)
    return Row(setting.name, bits, sqnr, psnr, tuple(kept), bench.float_share(kept), seconds)


@contextmanager
def in_pipeline(loaded: LoadedModel, denoiser: nn.Module) -> Iterator[None]:
    """Let the pipeline draw with `denoiser` inside the block."""
    set_denoiser(loaded.pipeline, denoiser)
    try:
        yield
    finally:
        set_denoiser(loaded.pipeline, loaded.denoiser)


def make_bench(calib_size: int, eval_size: int, pictures: int, batch_size: int) -> Bench:
    """Load the model and record both sets, from prompts and seeds that do not overlap."""
    loaded = load_model("emoji")
    prompts = loaded.default_prompts
    if calib_size + pictures > len(prompts):
        raise SystemExit(f"{calib_size} + {pictures} trajectories need as many captions, the model has {len(prompts)}")
    sampling: dict[str, Any] = {
        "steps": loaded.default_steps,
        "guidance": loaded.default_guidance,
        "batch_size": batch_size,
        "record": True,
    }
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + calib_size)
    calibration = sample_images(loaded, prompts[:calib_size], seeds, **sampling).calibration
    held_out = prompts[calib_size : calib_size + pictures]
    evaluation = sample_images(loaded, held_out, range(pictures), **sampling).calibration
    assert calibration is not None
    assert evaluation is not None
    return Bench(loaded, calibration, evaluation.subset(eval_size, 0), held_out, range(pictures), batch_size)


def table(rows: Sequence[Row], layers: int) -> str:
    """Markdown, one line a row."""
    lines = [
        "| method | bits | eps SQNR (dB) | image PSNR (dB) | Conv and Linear layers in float (share of MACs) |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        kept = f"{len(row.float_layers)} of {layers} ({row.float_macs_share:.1%})" if row.float_layers else "none"
        lines.append(f"| {row.method} | {row.bits} | {row.eps_sqnr_db:.1f} | {row.image_psnr_db:.1f} | {kept} |")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Accuracy of dmqexport beside NVIDIA Model Optimizer.")
    parser.add_argument("--calib-size", type=int, default=64, help="calibration trajectories (default: 64)")
    parser.add_argument("--eval-size", type=int, default=400, help="held-out trajectory points (default: 400)")
    parser.add_argument("--pictures", type=int, default=32, help="pictures for the PSNR (default: 32)")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a4"], help="wNaM, several allowed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("peer_modelopt.json"))
    options = parser.parse_args()
    widths = [BitWidths.parse(bits) for bits in options.bits]
    if any(width.activation is None for width in widths):
        raise SystemExit("weight-only widths are not compared here: give wNaM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every optional framework that is absent or newer than it knows
        try:
            mtq = importlib.import_module("modelopt.torch.quantization")
            version = importlib.import_module("modelopt").__version__
        except ImportError as error:
            raise SystemExit(
                f"Model Optimizer is not installed: {error}\n  hint: pip install nvidia-modelopt"
            ) from error

    torch.set_grad_enabled(False)
    bench = make_bench(options.calib_size, options.eval_size, options.pictures, options.batch_size)
    print(
        f"Model Optimizer {version}; {len(bench.calibration)} calibration and {len(bench.evaluation)} evaluation points"
    )
    rows: list[Row] = []
    for row in ours(bench, options.bits):
        rows.append(row)
        print(table([row], len(bench.found.layers)).splitlines()[-1], flush=True)
    for bits in options.bits:
        for setting in settings(bench, mtq):
            if setting.only_8_bits and BitWidths.parse(bits) != BitWidths(8, 8):
                continue
            rows.append(peer(bench, mtq, setting, bits))
            print(table(rows[-1:], len(bench.found.layers)).splitlines()[-1], flush=True)
    order = {bits: position for position, bits in enumerate(options.bits)}
    rows.sort(key=lambda row: order[row.bits])
    document = {
        "model": bench.loaded.name,
        "model_fingerprint": bench.loaded.fingerprint,
        "steps": bench.loaded.default_steps,
        "guidance": bench.loaded.default_guidance,
        "calibration_points": len(bench.calibration),
        "evaluation_points": len(bench.evaluation),
        "pictures": options.pictures,
        "versions": {"modelopt": version, "torch": torch.__version__, "python": platform.python_version()},
        "rows": [asdict(row) for row in rows],
    }
    options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(rows, len(bench.found.layers)))
    print("\nAttention matmuls are in float in every row: both leave them so by default.")


if __name__ == "__main__":
    main()
