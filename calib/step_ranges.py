"""How the range of every activation moves along the sampling steps: what rows of a table are clustered by."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calib.probe import ProbeResult, removing
from calib.sampling import CalibrationSet
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerOp
from dmqexport.quant_types import IntArray

_SMALLEST_SHARE = 1e-3  # of a tensor's own largest extreme: an end that is almost zero does not move a range


def step_ranges(
    denoiser: nn.Module,
    found: ProbeResult,
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """(used timesteps int64 [n] increasing, features float64 [n, 2 · tensors]) of the float denoiser.

    A feature is the binary logarithm of one end of one tensor's range at one timestep, the mean over its entries: a
    scale that is off by the same factor costs the same wherever it is. Only tensors that depend on the timestep count.
    Raises CalibrationError when there is none, or no entry.
    """
    readers = [layer for layer in found.layers if layer.source == layer.name and layer.timestep_dependent]
    if not readers or len(calibration) == 0:
        raise CalibrationError("cluster: no activation that depends on the timestep was seen")
    ends: dict[str, list[Tensor]] = {}

    def hook(name: str, op: LayerOp, segments: tuple[tuple[int, int], ...]) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            axis = 1 if op is LayerOp.CONV else args[0].ndim - 1
            for index, (start, stop) in enumerate(segments):
                flat = args[0].narrow(axis, start, stop - start).flatten(1)
                pair = torch.stack([(-flat.amin(dim=1)).clamp_min(0), flat.amax(dim=1).clamp_min(0)], dim=1)
                ends.setdefault(f"{name}#{index}", []).append(pair.cpu())

        return observe

    handles = [
        denoiser.get_submodule(layer.name).register_forward_pre_hook(hook(layer.name, layer.op, layer.segments))
        for layer in readers
    ]
    with removing(handles), torch.no_grad():
        for _, batch in calibration.batches(batch_size):
            run(batch)
    used, step = np.unique(calibration.timesteps.numpy(), return_inverse=True)
    counts = np.bincount(step, minlength=len(used)).astype(np.float64)[:, np.newaxis]
    columns = []
    for pairs in ends.values():
        values = torch.cat(pairs).double().numpy()
        means = np.zeros((len(used), 2))
        np.add.at(means, step, values)
        means /= counts
        columns.append(np.log2(np.maximum(means, _SMALLEST_SHARE * max(float(means.max()), 1e-30))))
    return used.astype(np.int64), np.concatenate(columns, axis=1)
