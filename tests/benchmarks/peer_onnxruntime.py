"""ONNX Runtime's own static quantization, as documented: graph preprocessed, Q/DQ, weights per channel.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from collections.abc import Iterator

from peer_job import Arrays, Job, RefusedError, Result, main

PACKAGES = {"onnxruntime": "onnxruntime", "onnx": "onnx", "sympy": "sympy"}
BATCH = 8  # every activation of a call is an output of the graph that calibration runs
#: Histograms keep every activation of every call in memory until the last one.
MOST_FOR_HISTOGRAMS = 128


def quantize(job: Job) -> Result:
    """setting: weights and activations, by their names in `QuantType`; method; operators, none for its own list."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, batches: Iterator[Arrays]) -> None:
            self.batches = batches

        def get_next(self) -> Arrays | None:
            return next(self.batches, None)

    weight, activation = QuantType[job.setting["weights"]], QuantType[job.setting["activations"]]
    if "Int4" in job.setting["activations"]:
        raise RefusedError("its operators take no 4-bit activations (QLinearConv and MatMulInteger are 8-bit)")
    method = CalibrationMethod[job.setting["method"]]
    most = None if method == CalibrationMethod.MinMax else MOST_FOR_HISTOGRAMS
    prepared, output = job.output / "preprocessed.onnx", job.output / "model.onnx"
    large = job.float_graph.with_name(job.float_graph.name + ".data").exists()
    try:
        quant_pre_process(str(job.float_graph), str(prepared), save_as_external_data=large)
    except Exception:  # its symbolic shape inference gives up on this graph, and may be left out
        quant_pre_process(str(job.float_graph), str(prepared), skip_symbolic_shape=True, save_as_external_data=large)
    quantize_static(
        str(prepared),
        str(output),
        Reader(job.calibration(BATCH, most)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=weight,
        activation_type=activation,
        calibrate_method=method,
        op_types_to_quantize=list(job.setting["operators"]) or None,
        use_external_data_format=large,
    )
    prepared.unlink()
    note = "" if most is None or most >= job.points else f"calibrated on {most} of the points, for its memory"
    return Result("onnxruntime", output, note=note)


if __name__ == "__main__":
    main(quantize, PACKAGES)
