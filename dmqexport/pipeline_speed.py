"""How fast this machine is at the few things that builds spend their time on; measured in a few seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from calib.range_search import search_asymmetric
from dmqexport.models.footprint import Footprint, LayerCost

COARSE, FINE, CENTERED = 197, 51, 96  # candidates of calib/range_search.py
LONG = 4096  # likewise: of longer rows, coarse candidates see only so many values
_LAYERS = 6
_SECONDS = 0.2  # of repetitions of one measurement
_COPIED = 2**24  # beyond caches, and what an allocator gives without asking the system anew
_SIDE = 512
_WRITTEN = 2**25


@dataclass(frozen=True)
class MachineSpeed:
    """macs: multiply-accumulates a second in this model's own layers; products: of large square matrices; candidates:
    values judged in range searches; copied: bytes that pass through an elementwise operation; drawn: random numbers;
    written: bytes to the work folder; call: seconds of an operator on next to nothing.
    """

    macs: float
    products: float
    candidates: float
    copied: float
    drawn: float
    written: float
    call: float


def measure_speed(footprint: Footprint, folder: Path) -> MachineSpeed:
    """Time samples of each kind of work, with as many threads as a build would use; writes 32 MiB in `folder`."""
    with torch.no_grad():
        chosen = _representative(footprint.layers)
        seconds = sum(_best(_layer(layer)) for layer in chosen)
        matrix = torch.randn(_SIDE, _SIDE)
        values = torch.randn(8, LONG)
        low, high = values.amin(dim=1), values.amax(dim=1)
        large, small = torch.zeros(_COPIED // 4), torch.zeros(4)
        return MachineSpeed(
            macs=sum(layer.macs for layer in chosen) / seconds,
            products=_SIDE**3 / _best(lambda: matrix @ matrix),
            # Searches give every thread rows of its own; one call is long enough to be interrupted by others' work.
            candidates=torch.get_num_threads() * (COARSE + FINE) * values.numel()
            / _best(lambda: search_asymmetric(values, torch.ones_like(values), low, high, 4), time.thread_time),
            copied=_COPIED / _best(lambda: large + 1),
            drawn=2**20 / _best(lambda: torch.randn(2**20)),
            written=_WRITTEN / _write(folder),
            call=_best(lambda: small + 1),
        )  # fmt: skip


def _representative(layers: tuple[LayerCost, ...]) -> list[LayerCost]:
    """The most expensive kinds of layers, one of each."""
    total: dict[tuple[object, ...], int] = {}
    example: dict[tuple[object, ...], LayerCost] = {}
    for layer in layers:
        kind = (layer.weight, layer.input_shape, layer.stride)
        total[kind] = total.get(kind, 0) + layer.macs
        example[kind] = layer
    return [example[kind] for kind in sorted(total, key=lambda kind: -total[kind])[:_LAYERS]]


def _layer(layer: LayerCost) -> Callable[[], object]:
    tensor, weight = torch.randn(1, *layer.input_shape), torch.full(layer.weight, 0.01)
    if not layer.convolution:
        return lambda: F.linear(tensor, weight)
    groups = layer.input_shape[0] // layer.weight[1]
    return lambda: F.conv2d(tensor, weight, None, layer.stride or 1, layer.padding or 0, 1, groups)


def _best(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Least seconds of one call: what it takes where nobody else wants the processor. The first one warms up."""
    work()
    times: list[float] = []
    while sum(times) < _SECONDS or len(times) < 5:
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def _write(folder: Path) -> float:
    path = folder / ".speed"
    try:
        start = time.perf_counter()
        path.write_bytes(bytes(_WRITTEN))
        return time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
