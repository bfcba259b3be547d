"""Accuracy beside NVIDIA Model Optimizer, on the bundled model: same samples, same bits, same seeds.

    python -m venv peer && peer/bin/pip install . nvidia-modelopt     # its own environment: it has its own pins
    peer/bin/python tests/benchmarks/peer_modelopt.py --bits w8a8 w6a6 w4a4 --output peer_modelopt.json

What is shared, and the columns, are described in `peer_bench.py`.

dmqexport runs its own calibration and the fake quantization that its ONNX graph reproduces code by code. Model
Optimizer runs `mtq.quantize` as documented, in several settings, so that no difference is a badly chosen one:

* recipe: its preset for diffusers (`configs/ptq/presets/diffusers/int8`) with the layers its diffusers example leaves
  in float by name: time embedding and its projections, first and last convolution, all shortcut convolutions.
  "dmqexport ..., those layers in float" leaves the same ones;
* default: `INT8_DEFAULT_CFG` as it ships, whose name patterns (made for language models) leave the blocks' `proj_out`;
* same layers: every layer that dmqexport quantizes, at the same bits, the boundary at 8: the like-for-like rows. With
  max calibration (its default), with its `mse` search of weight scales, and with SmoothQuant, which it has for 8 bits
  only, at its default alpha of 1 and at 0.5.

Not tried: the percentile calibrator of its diffusers example, which is not part of the package, and its training
(QAT) and mixed-precision search, which have no counterpart here. At bits other than 8 only `num_bits` changes; those
rows are simulations that its exporter refuses to write ("Number of bits must be 8 for INT8 ONNX export").
"""

import copy
import fnmatch
import importlib
import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from peer_bench import Bench, Row, parser, report
from torch import nn

from dmqexport.quant_types import BitWidths

# The names that the diffusers example of Model Optimizer leaves in float by default (those that SD-like UNets have).
EXAMPLE_KEEPS_FLOAT = ("time_emb_proj", "time_embedding", "conv_in", "conv_out", "conv_shortcut", "add_embedding")


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
            if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in bench.build.model.family.boundary)
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
    model = copy.deepcopy(bench.denoiser)

    def forward_loop(quantized: nn.Module) -> None:
        for _, batch in bench.calibration.batches(bench.batch_size):
            bench.run(quantized, batch)

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it counts aloud; the table says it all
        with torch.no_grad():
            mtq.quantize(model, setting.config(BitWidths.parse(bits)), forward_loop)
        if setting.keep_float:
            mtq.disable_quantizer(model, lambda name: any(part in name for part in setting.keep_float))
    seconds = time.perf_counter() - start
    kept = []
    for layer in bench.found.layers:
        module = model.get_submodule(layer.name)
        if not (module.weight_quantizer.is_enabled and module.input_quantizer.is_enabled):
            kept.append(layer.name)
    return bench.row(setting.name, bits, model, kept, seconds)


def compare(bench: Bench, mtq: Any, recipes: Sequence[str], requested: Sequence[str]) -> Iterator[Row]:
    """Every setting at every width, then ours, also with the layers in float that its recipe leaves there."""
    floats = [layer.name for layer in bench.found.layers if any(n in layer.name for n in EXAMPLE_KEEPS_FLOAT)]
    for bits in requested:
        for setting in settings(bench, mtq):
            if not setting.only_8_bits or BitWidths.parse(bits) == BitWidths(8, 8):
                yield peer(bench, mtq, setting, bits)
        for recipe in recipes:
            yield bench.ours(recipe, bits)
            same = f"quantization.keep_float=[{', '.join(floats)}]"
            yield bench.ours(recipe, bits, same, name=f"dmqexport, recipe {recipe}, those layers in float")


def main() -> None:
    """Run the comparison, print the table, write the JSON."""
    found = parser("Accuracy of dmqexport beside NVIDIA Model Optimizer.", "peer_modelopt.json")
    found.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a4"], help="wNaM, several allowed")
    options = found.parse_args()
    if any(BitWidths.parse(bits).activation is None for bits in options.bits):
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
    bench = Bench(options)
    rows = compare(bench, mtq, options.recipes, options.bits)
    report(bench, rows, lambda row: options.bits.index(row.bits), {"modelopt": version}, options.output)


if __name__ == "__main__":
    main()
