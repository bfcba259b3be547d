"""Second moments of what a weight is multiplied with, x̂ x̂ᵀ and x x̂ᵀ, summed over the positions of its output.

A convolution's inputs are kernel windows: the same pixels, nine times over in a 3 × 3 kernel. The product of two taps,
summed over all positions, depends on their displacement alone, but for pixels at the border: 25 products of channels
with channels stand for the 81 of all pairs of taps (13 for 45 where both sides are equal), and nothing is unfolded.
Small images have too much of a border for that, and few positions are soon multiplied one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS = 512  # of a symmetric product at once: what lies left of the diagonal is computed within such squares only
_GATHERED = 2**24  # values of kernel windows in memory at once
_WRITTEN = 150  # positions whose products take as long as adding blocks of channels to both squares does


def paired_products(width: int | float) -> float:
    """Multiplications a position, in squares of `width`, of both moments: one of them is symmetric."""
    return 1.5 + 0.5 * min(1.0, ROWS / width)


def displaced_products(kernel: Sequence[int], image: Sequence[int]) -> float:
    """The same where taps are multiplied by their displacement; the symmetric moment is half computed throughout."""
    taps, displacements, padded, border = 1, 1, 1.0, 0.0
    for size, side in zip(kernel, image, strict=True):
        taps, displacements = taps * size, displacements * (2 * size - 1)
        padded *= 1 + (size - 1) / side
        border += (size * size - 1) / (4 * size * side)  # pixels that a tap never reads, on average
    return 1.5 * (padded * displacements / (taps * taps) + min(1.0, border))


def displaced_pays(kernel: Sequence[int], image: Sequence[int], width: int | float, positions: int, kept: int) -> bool:
    """Whether that is less work for all `positions` of a batch than one by one for those that are kept of them."""
    return positions * displaced_products(kernel, image) + _WRITTEN < kept * paired_products(width)


@dataclass(frozen=True)
class Sampling:
    """At most `positions` of a batch, drawn from `generator`."""

    positions: int
    generator: torch.Generator

    def chosen(self, count: int, device: torch.device) -> Tensor | None:
        """Which of `count` positions to take; None: all."""
        if count <= self.positions:
            return None
        return torch.randperm(count, generator=self.generator)[: self.positions].to(device)


class Moments:
    """Running sums of one tensor, float32, for each block of columns of the flattened weight; whole channels each.

    Inside, kernel taps come first and channels second, and of x̂ x̂ᵀ only what is on or above the diagonal is kept up.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], taps: int, device: torch.device) -> None:
        self.spans, self._taps = tuple(spans), taps
        self._quantized = [torch.zeros(stop - start, stop - start, device=device) for start, stop in spans]
        self._mixed = [square.clone() for square in self._quantized]

    def add(self, module: nn.Module, left: Tensor, right: Tensor, sampling: Sampling) -> None:
        """Add the float and the quantized inputs that `module` reads in one batch."""
        if not isinstance(module, nn.Conv2d):
            vectors = [tensor.reshape(-1, 1, tensor.shape[-1]) for tensor in (left, right)]
            chosen = sampling.chosen(len(vectors[0]), left.device)
            self._add_vectors(*(part if chosen is None else part[chosen] for part in vectors))
            return
        windows = _Windows(module, left)
        chosen = sampling.chosen(windows.positions, left.device)
        padded = windows.padded(left), windows.padded(right)
        kept, width = windows.positions if chosen is None else len(chosen), max(map(len, self._quantized))
        image = (left.shape[2], left.shape[3])
        if windows.uniform and displaced_pays(module.kernel_size, image, width, windows.positions, kept):
            self._add_displaced(windows, *padded)
            return
        for some in windows.gathering(chosen):
            self._add_vectors(padded[0][some], padded[1][some])

    def pop(self) -> tuple[Tensor, Tensor]:
        """x̂ x̂ᵀ and x x̂ᵀ of the first block that is left, [k, k], channels first as in the weight; on the CPU."""
        quantized, mixed = self._quantized.pop(0).cpu(), self._mixed.pop(0).cpu()
        upper = quantized.triu_()
        return self._ordered(upper + upper.triu(1).T), self._ordered(mixed)

    def _ordered(self, square: Tensor) -> Tensor:
        if self._taps == 1:
            return square
        return square.reshape(self._taps, -1, self._taps, len(square) // self._taps).permute(1, 0, 3, 2).reshape(
            square.shape
        )  # fmt: skip

    def _channels(self, index: int) -> slice:
        start, stop = self.spans[index]
        return slice(start // self._taps, stop // self._taps)

    def _add_vectors(self, left: Tensor, right: Tensor) -> None:
        """left, right [positions, taps, channels]."""
        for index, (quantized, mixed) in enumerate(zip(self._quantized, self._mixed, strict=True)):
            first, second = (part[:, :, self._channels(index)].flatten(1) for part in (left, right))
            mixed.addmm_(first.T, second)
            for start in range(0, len(quantized), ROWS):
                stop = min(start + ROWS, len(quantized))
                quantized[start:stop, start:].addmm_(second[:, start:stop].T, second[:, start:])

    def _add_displaced(self, windows: "_Windows", left: Tensor, right: Tensor) -> None:
        """left, right [padded pixels, channels]."""
        for index, (quantized, mixed) in enumerate(zip(self._quantized, self._mixed, strict=True)):
            channels = self._channels(index)
            first, second = left[:, channels], right[:, channels]
            _displaced(quantized, windows, second, second, symmetric=True)
            _displaced(mixed, windows, first, second, symmetric=False)


def _displaced(moment: Tensor, windows: "_Windows", left: Tensor, right: Tensor, symmetric: bool) -> None:
    """Add the products of every two taps to `moment`, [taps·channels, taps·channels]; or of those in ascending order.

    First those of all pixels with their neighbour at each displacement, then less the pixels that a tap never reads.
    """
    taps, channels = len(windows.offsets), left.shape[1]
    blocks = moment.view(taps, channels, taps, channels)
    inner = slice(windows.reach, len(left) - windows.reach)
    products: dict[int, Tensor] = {}
    for one, start in enumerate(windows.offsets):
        after = one if symmetric else 0
        for other, stop in enumerate(windows.offsets[after:], after):
            offset = stop - start
            if offset not in products:
                products[offset] = left[inner].T @ right[inner.start + offset : inner.stop + offset]
            blocks[one, :, other].add_(products[offset])
        unread = windows.unread(one)
        if len(unread):
            offsets = torch.tensor(windows.offsets[after:], device=unread.device) - start
            beside = right[unread.unsqueeze(1) + offsets].flatten(1)
            moment[one * channels : (one + 1) * channels, after * channels :].addmm_(left[unread].T, beside, alpha=-1)


class _Windows:
    """Where the windows of a convolution lie in the rows of its padded input, pixels first and channels last.

    `reach` rows of zeros stand before and after, so that a displaced row is always one. offsets: from a window's first
    pixel to that of each tap. uniform: every displacement of an image pixel that leaves the image finds a zero, and
    every pixel is at the centre of a window.
    """

    def __init__(self, conv: nn.Conv2d, tensor: Tensor) -> None:
        assert not isinstance(conv.padding, str)
        self._padding = conv.padding
        self._stride, self._device = conv.stride, tensor.device
        self._batch, (self._height, self._width) = len(tensor), tensor.shape[2:]
        spread = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        self._rows, self._row = self._height + 2 * self._padding[0], self._width + 2 * self._padding[1]
        self._taps = [
            (conv.dilation[0] * down, conv.dilation[1] * right)
            for down in range(conv.kernel_size[0])
            for right in range(conv.kernel_size[1])
        ]
        self.offsets = [down * self._row + right for down, right in self._taps]
        self.reach = spread[0] * self._row + spread[1]
        self._down = (self._rows - spread[0] - 1) // self._stride[0] + 1
        self._right = (self._row - spread[1] - 1) // self._stride[1] + 1
        self.positions = self._batch * self._down * self._right
        centred = all(extent == 2 * pad for extent, pad in zip(spread, self._padding, strict=True))
        self.uniform = centred and tuple(self._stride) == (1, 1)

    def padded(self, tensor: Tensor) -> Tensor:
        """[batch, channels, height, width] as rows [pixels, channels]."""
        (down, right), channels = self._padding, tensor.shape[1]
        rows = tensor.new_zeros(self._batch * self._rows * self._row + 2 * self.reach, channels)
        images = rows[self.reach : len(rows) - self.reach].view(self._batch, self._rows, self._row, channels)
        images[:, down : down + self._height, right : right + self._width] = tensor.permute(0, 2, 3, 1)
        return rows

    def gathering(self, chosen: Tensor | None) -> Iterator[Tensor]:
        """Rows of the windows at some positions [positions, taps], a few at a time."""
        sides = (self._batch, self._rows * self._row), (self._down, self._stride[0] * self._row)
        first = torch.zeros(1, dtype=torch.int64, device=self._device) + self.reach
        for count, step in (*sides, (self._right, self._stride[1])):
            first = (first.unsqueeze(1) + step * torch.arange(count, device=self._device)).flatten()
        first = first if chosen is None else first[chosen]
        offsets = torch.tensor(self.offsets, device=self._device)
        yield from (first.unsqueeze(1) + offsets).split(max(1, _GATHERED // (len(offsets) * 1024)))  # type: ignore[no-untyped-call]

    def unread(self, tap: int) -> Tensor:
        """Rows of the image pixels that no window has at this tap."""
        inside = torch.zeros(self._rows, self._row, dtype=torch.bool)
        (down, right), (top, left) = self._padding, self._taps[tap]
        inside[down : down + self._height, right : right + self._width] = True
        inside[top : top + self._down, left : left + self._right] = False
        pixels = inside.flatten().nonzero().flatten().to(self._device)
        images = torch.arange(self._batch, device=self._device) * (self._rows * self._row)
        return (images.unsqueeze(1) + pixels).flatten() + self.reach
