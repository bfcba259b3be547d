"""What the choice of channel factors is judged on: a few input vectors of every layer, and each channel's extremes."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.probe import ProbeResult, removing
from calib.sampling import CalibrationSet
from dmqexport.quant_types import IntArray

_MEMORY_BYTES = 2**30
#: How a layer reads its input: kernel, stride, padding and dilation; None for a linear layer.
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None


@dataclass(frozen=True)
class ScaledTensor:
    """A tensor that may get channel factors: input channels [start, stop) of every layer in `readers`.

    key: `source#index`, the name under which its statistics and factors are kept; geometries: one a reader.
    """

    key: str
    start: int
    stop: int
    readers: tuple[str, ...]
    geometries: tuple[Geometry, ...]
    timestep_dependent: bool

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.stop - self.start


@dataclass
class TensorSamples:
    """columns: by geometry, float32 [n, channels, taps], the vectors that rows of a reader's weight are multiplied
    with; rows: int64 [n], table row of each; low, high, mean: float32 [channels], extremes and mean of |x| over
    everything seen."""

    columns: dict[Geometry, Tensor]
    rows: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor

    @property
    def values(self) -> Tensor:
        """float32 [n, channels]: the tensor itself at the sampled positions (the middle tap of a kernel)."""
        columns = next(iter(self.columns.values()))
        return columns[:, :, columns.shape[2] // 2]


def scaled_tensors(denoiser: nn.Module, found: ProbeResult, readable: Callable[[str], bool]) -> list[ScaledTensor]:
    """Every tensor that one or several layers read, halves of a concat apart, in execution order.

    `readable(name)` tells whether a layer is quantized at all. Grouped convolutions are left out: a column of theirs is
    not a channel of the tensor.
    """
    readers: dict[tuple[str, tuple[tuple[int, int], ...]], list[str]] = {}
    dependent: dict[str, bool] = {}
    for info in found.layers:
        module = denoiser.get_submodule(info.name)
        plain = not isinstance(module, nn.Conv2d) or (module.groups == 1 and not isinstance(module.padding, str))
        dependent[info.source] = info.timestep_dependent
        if readable(info.name) and plain:
            readers.setdefault((info.source, info.segments), []).append(info.name)
    return [
        ScaledTensor(
            f"{source}#{index}",
            start,
            stop,
            tuple(names),
            tuple(_geometry(denoiser.get_submodule(name)) for name in names),
            dependent[source],
        )
        for (source, segments), names in readers.items()
        for index, (start, stop) in enumerate(segments)
    ]


def _geometry(module: nn.Module) -> Geometry:
    if not isinstance(module, nn.Conv2d):
        return None
    assert not isinstance(module.padding, str)
    return tuple(module.kernel_size), tuple(module.stride), tuple(module.padding), tuple(module.dilation)


def gather_samples(
    denoiser: nn.Module,
    tensors: Sequence[ScaledTensor],
    row_map: IntArray,
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    vectors: int,
    seed: int,
) -> Iterator[tuple[ScaledTensor, TensorSamples]]:
    """Yield every tensor with about `vectors` sampled vectors of the float model, taken alike from every entry.

    Tensors are gathered in groups, one pass over the calibration set each, so that memory stays bounded.
    """
    each = max(1, -(-vectors // len(calibration)))
    rows_of, timesteps = torch.from_numpy(row_map.copy()), calibration.timesteps
    for group in _groups(tensors, each * len(calibration)):
        collectors = {item.key: _Collector(item, each, seed ^ zlib.crc32(item.key.encode())) for item in group}
        rows: list[int] = []

        def hook(name: str, items: Sequence[_Collector], rows: list[int] = rows) -> Callable[..., None]:
            def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
                for item in items:
                    item.observe(module, args[0], rows)

            return observe

        by_reader: dict[str, list[_Collector]] = {}
        for collector in collectors.values():
            by_reader.setdefault(collector.tensor.readers[0], []).append(collector)
        handles = [
            denoiser.get_submodule(name).register_forward_pre_hook(hook(name, items))
            for name, items in by_reader.items()
        ]
        with removing(handles), torch.no_grad():
            for index, batch in calibration.batches(batch_size):
                rows[:] = rows_of[timesteps[index].clamp(0, len(rows_of) - 1)].tolist()
                run(batch)
        for item in group:
            yield item, collectors.pop(item.key).result()


def _groups(tensors: Sequence[ScaledTensor], vectors: int) -> Iterator[list[ScaledTensor]]:
    group: list[ScaledTensor] = []
    size = 0
    for item in tensors:
        taps = sum(1 if geometry is None else geometry[0][0] * geometry[0][1] for geometry in set(item.geometries))
        needed = 4 * vectors * item.channels * taps
        if group and size + needed > _MEMORY_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += needed
    if group:
        yield group


@dataclass
class _Collector:
    tensor: ScaledTensor
    each: int
    seed: int
    columns: dict[Geometry, list[Tensor]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    extremes: tuple[Tensor, Tensor] | None = None
    total: Tensor | None = None
    count: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def observe(self, module: nn.Module, tensor: Tensor, rows: Sequence[int]) -> None:
        """Take `each` vectors of every entry, and the extremes of all of it."""
        conv = isinstance(module, nn.Conv2d)
        part = tensor.narrow(1 if conv else tensor.ndim - 1, self.tensor.start, self.tensor.channels)
        # [batch, ...] without moving channels about: a strided copy of a large activation takes as long as its layer.
        axes = [axis for axis in range(1, part.ndim) if axis != (1 if conv else part.ndim - 1)]
        low, high = part.amin(dim=(0, *axes)).cpu(), part.amax(dim=(0, *axes)).cpu()
        if self.extremes is not None:
            low, high = torch.minimum(low, self.extremes[0]), torch.maximum(high, self.extremes[1])
        self.extremes = (low, high)
        norms = torch.linalg.vector_norm(part, 1, dim=axes) if axes else part.abs()
        total = norms.sum(dim=0, dtype=torch.float64).cpu()
        self.total = total if self.total is None else self.total + total
        self.count += part.numel() // self.tensor.channels
        for geometry in dict.fromkeys(self.tensor.geometries):
            self.columns.setdefault(geometry, []).append(self._columns(part, geometry).cpu())
        used = rows if self.tensor.timestep_dependent else [0] * len(rows)
        self.rows += [row for row in used for _ in range(self.each)]

    def _columns(self, part: Tensor, geometry: Geometry) -> Tensor:
        batch, channels = part.shape[0], self.tensor.channels
        if geometry is None:
            tokens = part.reshape(batch, -1, channels)
            picked = torch.randint(tokens.shape[1], (self.each,), generator=self._generator)
            return tokens[:, picked.to(part.device)].reshape(-1, channels, 1)
        kernel, stride, padding, dilation = geometry
        padded = F.pad(part, [padding[1], padding[1], padding[0], padding[0]])
        starts = []
        for axis in (0, 1):
            size = (padded.shape[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
            chosen = torch.randint(size, (self.each, 1), generator=self._generator) * stride[axis]
            starts.append((chosen + torch.arange(kernel[axis]) * dilation[axis]).to(part.device))
        patches = padded[:, :, starts[0][:, :, None], starts[1][:, None, :]]  # [batch, channels, each, kh, kw]
        return patches.transpose(1, 2).reshape(batch * self.each, channels, -1)

    def result(self) -> TensorSamples:
        """Everything seen, in order."""
        assert self.extremes is not None
        assert self.total is not None
        columns = {geometry: torch.cat(parts).float() for geometry, parts in self.columns.items()}
        mean = (self.total / self.count).float()
        return TensorSamples(columns, torch.tensor(self.rows), self.extremes[0], self.extremes[1], mean)
