"""NVIDIA Model Optimizer on the float UNet, `mtq.quantize` as documented; at 8 bits its own Q/DQ graph in ONNX Runtime.

In several settings, so that no difference is a badly chosen one:

* recipe: its preset for diffusers (`configs/ptq/presets/diffusers/int8`) with the layers its diffusers example leaves
  in float by name: time embedding and its projections, first and last convolution, all shortcut convolutions;
* default: `INT8_DEFAULT_CFG` as it ships;
* same: every layer that dmqexport quantizes, at the same bits, the boundary at 8; with max calibration (its default),
  its `mse` search of weight scales, or SmoothQuant, which it has for 8 bits only.

Not tried: the percentile calibrator of its diffusers example, which is not part of the package, its training and its
mixed-precision search. At bits other than 8 only `num_bits` changes; its exporter refuses to write those ("Number of
bits must be 8 for INT8 ONNX export"), so that they are judged as its own fake quantization.
"""

import copy
import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_job import MODEL, UNET, Job, Result, main

PACKAGES = {"modelopt.torch.quantization": "nvidia-modelopt", "torch": "torch", "diffusers": "diffusers"}
#: The names that its diffusers example leaves in float by default (those that UNets like Stable Diffusion's have).
EXAMPLE_KEEPS_FLOAT = ("time_emb_proj", "time_embedding", "conv_in", "conv_out", "conv_shortcut", "add_embedding")
BATCH = 32
OPSET = 20


def quantize(job: Job) -> Result:
    """setting: way (recipe, default, same), algorithm of `same`."""
    import modelopt.torch.quantization as mtq
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(1)
    unet = UNet2DConditionModel.from_pretrained(job.shared / UNET).eval()

    def forward_loop(quantized: Any) -> None:
        for batch in job.calibration(BATCH):
            quantized(**{name: torch.from_numpy(value) for name, value in batch.items()}, return_dict=False)

    described = json.loads((job.shared / MODEL).read_text(encoding="utf-8"))
    weight, activation = (int(part) for part in job.bits.removeprefix("w").split("a"))
    config = _config(job.setting, mtq, weight, activation, described)
    with torch.no_grad():
        mtq.quantize(unet, config, forward_loop)
    if job.setting["way"] == "recipe":
        mtq.disable_quantizer(unet, lambda name: any(part in name for part in EXAMPLE_KEEPS_FLOAT))
    layers = {name: unet.get_submodule(name) for name in described["layers"]}
    kept = [
        name
        for name, layer in layers.items()
        if not (layer.weight_quantizer.is_enabled and layer.input_quantizer.is_enabled)
    ]
    note = f"{len(kept)} of {len(layers)} layers in float" if kept else ""
    if (weight, activation) != (8, 8):
        return Result("simulation", None, note=note, later=lambda: _judged(job, unet))
    note = "; ".join(filter(None, [note, "its exporter stores float weights"]))
    return Result("onnxruntime", _export(unet, job), note=note)


def _config(
    setting: Mapping[str, Any], mtq: Any, weight: int, activation: int, described: Mapping[str, Any]
) -> dict[str, Any]:
    from modelopt.torch.opt.config_loader import load_config
    from modelopt.torch.quantization.config import QuantizeConfig

    preset = load_config("configs/ptq/presets/diffusers/int8", schema_type=QuantizeConfig)
    base = mtq.INT8_DEFAULT_CFG if setting["way"] == "default" else preset.model_dump(exclude_unset=True)
    config = copy.deepcopy(dict(base))
    for entry in config["quant_cfg"]:
        attributes = entry.get("cfg") or {}
        if "num_bits" in attributes:
            attributes["num_bits"] = weight if "weight" in entry["quantizer_name"] else activation
    if setting["way"] == "same":
        config["algorithm"] = setting["algorithm"]
        for name in described["layers"]:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in described["boundary"]):
                for kind, axis in (("weight", 0), ("input", None)):
                    entry = {"quantizer_name": f"{name}.{kind}_quantizer", "cfg": {"num_bits": 8, "axis": axis}}
                    config["quant_cfg"].append(entry)
    return config


def _export(unet: Any, job: Job) -> Path:
    """Its Q/DQ graph, through the exporter that it has its Q/DQ operators for."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, *values: Any) -> Any:
            return self.unet(**dict(zip(names, values, strict=True)), return_dict=False)[0]

    batch = next(job.calibration(2, 2))
    names, output = list(batch), job.output / "model.onnx"
    with torch.inference_mode():
        torch.onnx.export(
            Wrapped(),
            tuple(torch.from_numpy(value) for value in batch.values()),
            str(output),
            input_names=names,
            output_names=["out_sample"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "out_sample"]},
            opset_version=OPSET,
            dynamo=False,
        )
    return output


def _judged(job: Job, unet: Any) -> dict[str, Any]:
    """Its fake quantization, judged like everyone else's artefacts."""
    from peer_judge import judge_of, metrics_of

    judge = judge_of(job.judge)
    return metrics_of(judge, unet, bool(job.judge["pictures"]))


if __name__ == "__main__":
    main(quantize, PACKAGES)
