"""NNCF on the float graph, OpenVINO running what comes out.

https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
"""

import logging
from typing import Any

from peer_job import Arrays, Job, RefusedError, Result, main

PACKAGES = {"nncf": "nncf", "openvino": "openvino"}


def quantize(job: Job) -> Result:
    """setting: further arguments of `nncf.quantize`; subset: number of points, None for all."""
    import nncf
    import openvino

    if job.bits == "w4a4":
        raise RefusedError("it has no activations below 8 bits")
    logging.getLogger("nncf").setLevel("ERROR")
    subset = job.setting.get("subset") or job.points
    # One sample a call, as its documentation does.
    samples: list[Arrays] = list(job.calibration(1, subset))
    options: dict[str, Any] = {"subset_size": subset}
    if "model_type" in job.setting:
        options["model_type"] = nncf.ModelType[job.setting["model_type"]]
    model = nncf.quantize(openvino.Core().read_model(str(job.float_graph)), nncf.Dataset(samples), **options)
    note = "" if subset == job.points else f"calibrated on {subset} of the points, its default number"
    openvino.save_model(model, str(job.output / "model.xml"), compress_to_fp16=False)
    return Result("openvino", job.output / "model.xml", note=note)


if __name__ == "__main__":
    main(quantize, PACKAGES)
