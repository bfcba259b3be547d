"""Hugging Face's optimum: its quantizer over ONNX Runtime, its quantizer over NNCF, and quanto.

https://huggingface.co/docs/optimum-onnx/onnxruntime/usage_guides/quantization
https://huggingface.co/docs/optimum-intel/openvino/optimization
https://github.com/huggingface/optimum-quanto
"""

import shutil
import sys
from types import SimpleNamespace
from typing import Any

from peer_job import UNET, Job, RefusedError, Result, main

BATCH = 32
#: Seen by measurement: a network of convolutions answers to the last bit as it does with weights quantized alone.
NO_GRAPH = "its modules in torch, which export no graph; its convolutions computed on float activations"
_PACKAGES = {
    "onnx": {"optimum.onnxruntime": "optimum-onnx", "onnxruntime": "onnxruntime"},
    "intel": {"optimum.intel": "optimum-intel", "openvino": "openvino"},
    "quanto": {"optimum.quanto": "optimum-quanto", "torch": "torch", "diffusers": "diffusers"},
}


def with_onnxruntime(job: Job) -> Result:
    """`ORTQuantizer` with its configuration for CPUs with AVX-512 VNNI, static."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig
    from optimum.onnxruntime.preprocessors import QuantizationPreprocessor

    if job.bits != "w8a8":
        raise RefusedError("its configurations are 8-bit")
    source = job.output / "float"
    source.mkdir()
    shutil.copy2(job.float_graph, source / "model.onnx")
    quantizer = ORTQuantizer.from_pretrained(source, file_name="model.onnx")
    config = AutoQuantizationConfig.avx512_vnni(is_static=True, per_channel=True)
    samples = _Rows({name: value[0] for name, value in batch.items()} for batch in job.calibration(1))
    calibration = AutoCalibrationConfig.minmax(samples)
    ranges = quantizer.fit(samples, calibration, operators_to_quantize=config.operators_to_quantize)
    quantizer.quantize(
        config, job.output, calibration_tensors_range=ranges, preprocessor=QuantizationPreprocessor(), file_suffix=None
    )
    return Result("onnxruntime", job.output / "model.onnx")


class _Rows(list[Any]):
    """Samples as optimum reads them: as a data set of `datasets`, which knows its length and has an origin."""

    info = SimpleNamespace(builder_name="points", config_name=None)
    split = "calibration"

    @property
    def num_rows(self) -> int:
        return len(self)


def with_intel(job: Job) -> Result:
    """Not run: `OVQuantizer` takes whole pipelines, and hands their networks to NNCF."""
    raise RefusedError("its int8 is NNCF's, which has rows of its own")


def with_quanto(job: Job) -> Result:
    """quanto's modules in torch: int8 or int4 weights, int8 activations; it exports no graph."""
    import torch
    from diffusers import UNet2DConditionModel
    from optimum.quanto import Calibration, freeze, qint4, qint8
    from optimum.quanto import quantize as convert

    if job.bits == "w4a4":
        raise RefusedError("it has no activations below 8 bits")
    torch.set_num_threads(1)
    unet = UNet2DConditionModel.from_pretrained(job.shared / UNET).eval()
    convert(unet, weights=qint4 if job.bits.startswith("w4") else qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        for batch in job.calibration(BATCH):
            unet(**{name: torch.from_numpy(value) for name, value in batch.items()}, return_dict=False)
    freeze(unet)

    def judged() -> dict[str, Any]:
        from peer_judge import judge_of, metrics_of

        return metrics_of(judge_of(job.judge), unet, bool(job.judge["pictures"]))

    return Result("simulation", None, later=judged, note=NO_GRAPH)


WAYS = {"onnx": with_onnxruntime, "intel": with_intel, "quanto": with_quanto}

if __name__ == "__main__":
    way = sys.argv[2]
    main(WAYS[way], _PACKAGES[way])
