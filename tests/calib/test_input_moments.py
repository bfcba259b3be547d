"""Moments of a layer's inputs: those of the unfolded tensors, however they were found."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.input_moments import Moments, Sampling, displaced_pays

ALL = 10**6


def unfolded(conv: nn.Conv2d, tensor: Tensor, kept: Tensor | None) -> Tensor:
    assert not isinstance(conv.padding, str)
    columns = F.unfold(tensor, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2).flatten(0, 1)
    return columns if kept is None else columns[kept]


def assert_moments(moments: Moments, spans: list[tuple[int, int]], left: Tensor, right: Tensor) -> None:
    for start, stop in spans:
        quantized, mixed = moments.pop()
        part = right[:, start:stop]
        torch.testing.assert_close(quantized, part.T @ part, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mixed, left[:, start:stop].T @ part, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sides", [(9, 7), (8, 8), (2, 1)], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [(3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), ((5, 3), 1, (2, 1), 1), (3, 1, 2, 2), (3, 1, (2, 1), 1)],
    ids=["same", "strided", "one tap", "oblong", "dilated", "wider than the image"],
)
@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize("positions", [20, ALL])
def test_moments_are_those_of_the_unfolded_tensors(
    geometry: tuple[int, int, int, int],
    sides: tuple[int, int],
    positions: int,
    displaced: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """displaced: wherever windows allow it and all positions are wanted, however little it pays."""
    monkeypatch.setattr("calib.input_moments.displaced_pays", lambda *given: displaced and given[-2] == given[-1])
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 5, *geometry)
    taps = conv.weight[0, 0].numel()
    spans = [(0, 2 * taps), (2 * taps, 6 * taps)]
    moments, exact, seen = Moments(spans, taps, torch.device("cpu")), [], []
    sampling, drawn = (Sampling(positions, torch.Generator().manual_seed(3)) for _ in range(2))
    for _ in range(2):
        inputs = torch.randn(4, 6, *sides, generator=generator)
        quantized = torch.round(inputs * 2) / 2
        kept = drawn.chosen(len(unfolded(conv, inputs, None)), inputs.device)
        exact.append(unfolded(conv, inputs, kept))
        seen.append(unfolded(conv, quantized, kept))
        moments.add(conv, inputs, quantized, sampling)
    assert_moments(moments, spans, torch.cat(exact), torch.cat(seen))


@pytest.mark.parametrize("positions", [20, ALL])
def test_moments_of_tokens(positions: int) -> None:
    inputs = torch.randn(3, 11, 600, generator=torch.Generator().manual_seed(1))
    quantized = torch.round(inputs)
    spans = [(0, 40), (40, 600)]
    moments = Moments(spans, 1, inputs.device)
    moments.add(nn.Linear(600, 4), inputs, quantized, Sampling(positions, torch.Generator().manual_seed(5)))
    kept = Sampling(positions, torch.Generator().manual_seed(5)).chosen(33, inputs.device)
    kept = torch.arange(33) if kept is None else kept
    assert_moments(moments, spans, inputs.flatten(0, 1)[kept], quantized.flatten(0, 1)[kept])


def test_large_images_are_summed_by_displacement_and_small_or_few_ones_are_not() -> None:
    kernel, width = (3, 3), 1152
    assert displaced_pays(kernel, (64, 64), width, 2 * 64**2, 2 * 64**2)
    assert displaced_pays(kernel, (16, 16), width, 8 * 16**2, 8 * 16**2)
    assert not displaced_pays(kernel, (4, 4), width, 32 * 4**2, 32 * 4**2)
    assert not displaced_pays(kernel, (64, 64), width, 8 * 64**2, 1024)
