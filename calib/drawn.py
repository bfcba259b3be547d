"""What calibration needs of a model that is never run: its layers from shapes alone, its ranges drawn from a seed.

A plan made so has the size, the structure and the kinds of integers of a measured one, and no claim to accuracy.
"""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calib.observer import ATTENTION_OPERANDS, ActivationStatistics
from calib.probe import ProbeResult, probe
from calib.sampling import seeded_generator

_VALUES = 256  # drawn a tensor and row; ranges of drawn values need no more
_TAIL = 4.0  # standard deviations of the extremes
_ROW_SPREAD = 0.2  # of the logarithm of a row's standard deviation
_CHANNEL_SPREAD = 0.5  # likewise, of a channel's
_PEAK = 8.0  # probabilities of attention bunch near zero


def probe_shapes(denoiser: nn.Module, run: Callable[[], Any], varying: list[Tensor]) -> ProbeResult:
    """As `calib.probe.probe`, of a forward on the meta device, where nothing is allocated or computed.

    `run` must run one forward of `denoiser`; what depends on the timestep is what is computed from the tensors
    `varying`, the timestep and the sample. Raises as `probe` does.
    """
    with _Dependence(varying) as dependence:
        return probe(denoiser, lambda index: run(), lambda tensor, index: index * dependence.holds(tensor))


class _Dependence(TorchDispatchMode):
    """Follows from operator to operator which tensors were computed from given ones."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._dependent: WeakSet[Any] = WeakSet(tensor.untyped_storage() for tensor in given)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` depends on what was given."""
        return tensor.untyped_storage() in self._dependent

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self.holds(tensor) for tensor in _tensors((args, kwargs or {}))):
            self._dependent.update(tensor.untyped_storage() for tensor in _tensors(result))
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def draw_statistics(found: ProbeResult, rows: int, seed: int, *, attention: bool) -> dict[str, ActivationStatistics]:
    """Statistics of every tensor that `calib.observer.Observer` would observe, by the same keys, drawn from `seed`.

    Normal values, each row with a standard deviation of its own; probabilities of attention between 0 and 1.
    """
    drawn = {}
    for layer in found.layers:
        if layer.source != layer.name:
            continue
        for index, (start, stop) in enumerate(layer.segments):
            key = f"{layer.name}#{index}"
            drawn[key] = _normal(key, rows if layer.timestep_dependent else 1, stop - start, seed)
    for name in found.attentions if attention else ():
        for operand in ATTENTION_OPERANDS:
            key = f"{name}#{operand}"
            drawn[key] = _probability(key, rows, seed) if operand == "probability" else _normal(key, rows, 0, seed)
    return drawn


def _normal(key: str, rows: int, channels: int, seed: int) -> ActivationStatistics:
    generator = seeded_generator(seed, key)
    spread = np.exp(_ROW_SPREAD * generator.standard_normal(rows))[:, None]
    values = np.clip(spread * generator.standard_normal((rows, _VALUES)), -_TAIL * spread, _TAIL * spread)
    return _statistics(values, np.exp(_CHANNEL_SPREAD * generator.standard_normal(channels)))


def _probability(key: str, rows: int, seed: int) -> ActivationStatistics:
    values = seeded_generator(seed, key).random((rows, _VALUES)) ** _PEAK
    return _statistics(values, np.zeros(0))


def _statistics(values: Any, moment: Any) -> ActivationStatistics:
    tensor = torch.from_numpy(values).float()
    moments = torch.from_numpy(moment).float()
    return ActivationStatistics(tensor, torch.ones_like(tensor), tensor.amin(dim=1), tensor.amax(dim=1), moments)
