"""How far an output is from the float one, as one number an entry, and random probes of the same distance's curvature.

A distance is what bit allocation minimises; a probe is a random vector v with E[(v·e)²] equal to the distance of a
small error e, so that one backward pass of v tells what any error inside the model costs (see `calib.sketch`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dmqexport.errors import RecipeError

_WINDOW, _SIGMA = 11, 1.5  # Wang et al. 2004, "Image quality assessment", section III-C
_K1, _K2 = 0.01, 0.03
_TINY = 1e-12


class Metric(Protocol):
    """A distortion: zero for equal outputs, larger for worse ones."""

    def distance(self, reference: Tensor, output: Tensor) -> Tensor:
        """reference, output [entries, ...]; returns the distortion of each entry, float32 [entries]."""
        ...

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """A random v, shape of `reference`, with E[(v·e)²] = distance(reference, reference + e) for small e."""
        ...


class MeanSquaredError:
    """Mean of the squared error over an entry."""

    def distance(self, reference: Tensor, output: Tensor) -> Tensor:
        """As of `Metric`."""
        return (output - reference).flatten(1).square().mean(dim=1)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """As of `Metric`: white noise of variance 1 / elements."""
        scale: float = reference[0].numel() ** -0.5
        return torch.randn(reference.shape, generator=generator) * scale


class NoiseToSignal:
    """Power of the error over power of the reference: an SQNR of n dB is 10^(-n/10)."""

    def distance(self, reference: Tensor, output: Tensor) -> Tensor:
        """As of `Metric`."""
        return MeanSquaredError().distance(reference, output) / self._power(reference)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """As of `Metric`."""
        noise = MeanSquaredError().probe(reference, generator)
        return noise / self._power(reference).sqrt().reshape(-1, *([1] * (reference.ndim - 1)))

    @staticmethod
    def _power(reference: Tensor) -> Tensor:
        return reference.flatten(1).square().mean(dim=1).clamp_min(_TINY)


@dataclass(frozen=True)
class _Windows:
    """Local statistics of a reference: weights of one window [positions]; mean, variance [entries, channels, windows].

    c1, c2: [entries, 1, 1], the constants that keep flat windows from dividing by nothing.
    """

    weights: Tensor
    size: int
    mean: Tensor
    variance: Tensor
    c1: Tensor
    c2: Tensor


class StructuralDistance:
    """(1 - SSIM) + MSE, the output distortion of DMQ; Gaussian windows, as large as fit, inside the picture only.

    The dynamic range is that of each float output. Outputs that are no pictures (not 4-D) count their MSE alone.
    """

    def distance(self, reference: Tensor, output: Tensor) -> Tensor:
        """As of `Metric`."""
        squared = MeanSquaredError().distance(reference, output)
        if reference.ndim != 4:
            return squared
        found = _windows(reference)
        other, other_square = _local(output, found), _local(output.square(), found)
        covariance = _local(output * reference, found) - found.mean * other
        variance = other_square - other.square()
        luminance = (2 * found.mean * other + found.c1) / (found.mean.square() + other.square() + found.c1)
        structure = (2 * covariance + found.c2) / (found.variance + variance + found.c2)
        return 1.0 - (luminance * structure).flatten(1).mean(dim=1) + squared

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """As of `Metric`.

        To second order 1 - SSIM is, averaged over windows, Var(e)/(2σ²+c2) + mean(e)²/(2µ²+c1). Window by window, with
        weights w, the vectors √w∘ξ - w(√w·ξ) have covariance diag(w) - wwᵀ, whose quadratic form is Var(e).
        """
        total = MeanSquaredError().probe(reference, generator)
        if reference.ndim != 4:
            return total
        found = _windows(reference)
        entries, channels, count = found.mean.shape
        root = found.weights.sqrt().reshape(1, 1, -1, 1)
        noise = torch.randn((entries, channels, len(found.weights), count), generator=generator)
        centered = root * noise - root.square() * (root * noise).sum(dim=2, keepdim=True)
        flat = root.square() * torch.randn((entries, channels, 1, count), generator=generator)
        share = (channels * count) ** -0.5
        field = centered * (2 * found.variance + found.c2).rsqrt().unsqueeze(2)
        field = (field + flat * (2 * found.mean.square() + found.c1).rsqrt().unsqueeze(2)) * share
        columns = field.reshape(entries, channels * len(found.weights), count)
        return total + F.fold(columns, reference.shape[-2:], found.size)


#: Squared error of the guided prediction, each step by what it does to the picture: the caller's outputs are that.
PICTURE = "picture"
#: By the name that recipes use.
METRICS: dict[str, Metric] = {
    PICTURE: MeanSquaredError(),
    "ssim+mse": StructuralDistance(),
    "mse": MeanSquaredError(),
    "sqnr": NoiseToSignal(),
}


def metric_named(name: str) -> Metric:
    """The metric called `name`; raises RecipeError for another."""
    if name not in METRICS:
        raise RecipeError(f"metric {name!r} is not known", hint=f"one of {', '.join(METRICS)}")
    return METRICS[name]


def _windows(reference: Tensor) -> _Windows:
    side = min(_WINDOW, *reference.shape[-2:])
    size = side if side % 2 else side - 1
    offset = torch.arange(size, dtype=torch.float32) - size // 2
    line = torch.exp(-offset.square() / (2 * _SIGMA**2))
    weights = torch.outer(line, line).flatten()
    weights = weights / weights.sum()
    empty = torch.zeros(0)
    found = _Windows(weights, size, empty, empty, empty, empty)
    mean = _local(reference, found)
    variance = (_local(reference.square(), found) - mean.square()).clamp_min(0.0)
    flat = reference.flatten(1)
    extent = (flat.amax(dim=1) - flat.amin(dim=1)).clamp_min(_TINY**0.5).reshape(-1, 1, 1)
    return _Windows(weights, size, mean, variance, (_K1 * extent).square(), (_K2 * extent).square())


def _local(tensor: Tensor, found: _Windows) -> Tensor:
    """Weighted mean of every window, [entries, channels, windows]."""
    channels = tensor.shape[1]
    kernel = found.weights.to(tensor.dtype).reshape(1, 1, found.size, found.size).repeat(channels, 1, 1, 1)
    return F.conv2d(tensor, kernel, groups=channels).flatten(2)
