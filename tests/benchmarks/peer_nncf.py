# ruff: noqa: T201 - a script talks to its user
"""Accuracy beside NNCF and OpenVINO, on the bundled model: same samples, same seeds.

    python -m venv peer && peer/bin/pip install . nncf openvino     # its own environment: it has its own pins
    peer/bin/python tests/benchmarks/peer_nncf.py --output peer_nncf.json

What is shared, and the columns, are described in `peer_bench.py`. NNCF gets the float ONNX graph that dmqexport
exports, quantizes it on the calibration points that dmqexport calibrates on, and OpenVINO runs the result on this CPU:

* W8A8, default: `nncf.quantize` as documented (mixed-timestep samples, 300 of them, its default number);
* W8A8, all samples: the same with every calibration point;
* W8A8, transformer: `model_type=TRANSFORMER`, its setting for models with attention, with SmoothQuant;
* W4A16: `nncf.compress_weights` to 4 bits, the fewest bits that it has for whole models, with float activations: plain,
  and with its data-driven AWQ and scale estimation. Convolutions and what it keeps at 8 bits are counted by itself.

NNCF has no activations below 8 bits: W4A4 and W6A6 have no row of its own.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peer_bench import Bench, Row, parser, report

from dmqexport.runtime import QuantizedDenoiser

BATCH = 1  # NNCF takes one sample a call, as its documentation does


@dataclass(frozen=True)
class Setting:
    """One way to run NNCF. quantize: OpenVINO model → quantized OpenVINO model."""

    name: str
    bits: str
    quantize: Callable[[Any], Any]


class OpenVinoRunner:
    """A compiled OpenVINO model behind the interface of our ONNX Runtime runner."""

    def __init__(self, openvino: Any, model: Any) -> None:
        # Without the hint a CPU with bfloat16 would round what the comparison takes for float.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = openvino.Core().compile_model(model, "CPU", options)
        self.input_names = tuple(item.get_any_name() for item in self.compiled.inputs)
        self.output_names = tuple(item.get_any_name() for item in self.compiled.outputs)

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Execute once; arrays by name."""
        values = self.compiled({name: inputs[name] for name in self.input_names})
        return {name: np.array(values[name]) for name in outputs or self.output_names}


def settings(bench: Bench, nncf: Any) -> list[Setting]:
    """Every way in which NNCF is run."""
    count = len(bench.calibration)
    order = np.random.default_rng(0).permutation(count)

    def samples() -> list[dict[str, np.ndarray]]:
        found = []
        for index in order:
            inputs = bench.calibration.select(torch.tensor([index] * BATCH))
            found.append({name: value.numpy() for name, value in inputs.items()})
        return found

    dataset = nncf.Dataset(samples())
    transformer = nncf.ModelType.TRANSFORMER
    four = nncf.CompressWeightsMode.INT4_ASYM
    whole = {"mode": four, "ratio": 1.0, "group_size": -1, "all_layers": True}
    return [
        Setting("NNCF, default", "w8a8", lambda model: nncf.quantize(model, dataset)),
        Setting("NNCF, all samples", "w8a8", lambda model: nncf.quantize(model, dataset, subset_size=count)),
        Setting("NNCF, transformer", "w8a8", lambda model: nncf.quantize(model, dataset, model_type=transformer)),
        Setting("NNCF, int4 weights", "w4a16", lambda model: nncf.compress_weights(model, **whole)),
        Setting(
            "NNCF, int4 weights, AWQ and scale estimation",
            "w4a16",
            lambda model: nncf.compress_weights(model, **whole, dataset=dataset, awq=True, scale_estimation=True),
        ),
    ]


def operations(model: Any) -> tuple[int, int]:
    """(quantized, all) Convolution and MatMul operations that multiply by a weight; attention's products are none."""
    quantized = total = 0
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            kinds = _kinds(operation.input_value(1).get_node())
            total += "Constant" in kinds
            quantized += "Constant" in kinds and bool({"FakeQuantize", "i8", "u8", "i4", "u4"} & kinds)
    return quantized, total


def _kinds(node: Any) -> set[str]:
    """Types of the operations from an operand back to where its values come from, and the element type there."""
    kinds = {node.get_type_name()}
    while node.get_type_name() in ("FakeQuantize", "Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()  # the others hold scales, ranges and shapes
        kinds.add(node.get_type_name())
    if node.get_type_name() == "Constant":
        kinds.add(node.get_element_type().get_type_name())
    return kinds


def compare(bench: Bench, nncf: Any, openvino: Any, recipes: Sequence[str]) -> Iterator[Row]:
    """Ours at its bits, OpenVINO in float (the exporter's and the runtime's own error), then every setting."""
    core, config = openvino.Core(), bench.build.denoiser_config

    def judged(name: str, bits: str, model: Any, seconds: float) -> Row:
        runner: Any = OpenVinoRunner(openvino, model)
        denoiser = QuantizedDenoiser(runner, bench.build.model.family, config, bench.build.model.num_timesteps)
        return bench.row(name, bits, denoiser, (), seconds)

    graph = bench.build.float_graph
    yield judged("OpenVINO, float", "float", core.read_model(graph), 0.0)
    for setting in settings(bench, nncf):
        start = time.perf_counter()
        model = setting.quantize(core.read_model(graph))
        seconds = time.perf_counter() - start
        done, total = operations(model)
        print(f"{setting.name}: {done} of {total} layers with weights quantized, {seconds:.0f} s", flush=True)
        yield judged(f"{setting.name} ({done} of {total} layers)", setting.bits, model, seconds)
    for recipe in recipes:
        for bits in ("w8a8", "w4a16", "w4a4"):
            yield bench.ours(recipe, bits)


def main() -> None:
    """Run the comparison, print the table, write the JSON."""
    options = parser("Accuracy of dmqexport beside NNCF and OpenVINO.", "peer_nncf.json").parse_args()
    try:
        nncf, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    except ImportError as error:
        raise SystemExit(f"NNCF is not installed: {error}\n  hint: pip install nncf openvino") from error
    importlib.import_module("logging").getLogger("nncf").setLevel("ERROR")
    bench = Bench(options)
    order = {"float": 0, "w8a8": 1, "w4a16": 2, "w4a4": 3}
    versions = {"nncf": nncf.__version__, "openvino": openvino.__version__.split("-")[0]}
    rows = compare(bench, nncf, openvino, options.recipes)
    report(bench, rows, lambda row: order[row.bits], versions, options.output)


if __name__ == "__main__":
    main()
