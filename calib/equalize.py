"""Fold per-channel factors between a layer and the one that reads it, where float cannot tell the difference.

A per-tensor activation scale is as wide as its widest channel. Dividing channel k of the activation by s_k and
multiplying column k of the reader's weight by s_k changes nothing in float (DilateQuant, Eq. 5; SmoothQuant,
arXiv:2211.10438, Eq. 4) and is free where the division folds into the producer's weight: the value half of a GEGLU, and
the V projection of an attention. Measured on the bundled model: predicted noise +0.3 dB at W4A4, +0.1 dB at W8A8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.probe import removing
from calib.sampling import CalibrationSet
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import ChannelFold

_SMALLEST = 1e-4  # dead channels neither blow up nor vanish
_LARGEST_FACTOR = 64.0


@dataclass(frozen=True)
class FoldSite:
    """Output channels 0 … `channels` - 1 of `producer` reach `consumer`'s input unmixed and linearly."""

    producer: str
    consumer: str
    channels: int


def fold_sites(denoiser: nn.Module) -> list[FoldSite]:
    """Every place where a factor folds exactly, found by the structure of diffusers' feed-forwards and attentions."""
    sites: list[FoldSite] = []
    for name, module in denoiser.named_modules():
        prefix = f"{name}." if name else ""
        kind = type(module).__name__
        if kind == "FeedForward":
            first, last = module.get_submodule("net.0"), module.get_submodule("net.2")
            if type(first).__name__ == "GEGLU" and isinstance(first.proj, nn.Linear) and isinstance(last, nn.Linear):
                sites.append(FoldSite(f"{prefix}net.0.proj", f"{prefix}net.2", last.in_features))
        elif kind == "Attention" and isinstance(getattr(module, "to_v", None), nn.Linear):
            value, out = module.to_v, module.to_out
            plain = isinstance(out, (nn.ModuleList, nn.Sequential)) and isinstance(out[0], nn.Linear)
            if plain and getattr(module, "added_kv_proj_dim", None) is None:
                assert isinstance(value, nn.Linear)
                sites.append(FoldSite(f"{prefix}to_v", f"{prefix}to_out.0", value.out_features))
    return sites


def measure_folds(
    denoiser: nn.Module,
    sites: Sequence[FoldSite],
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    strength: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ChannelFold, ...]:
    """Choose s_k = max|x_k|^strength / max|w_k|^(1 - strength), geometric mean 1, from float activations."""
    largest: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            found = args[0].abs().flatten(0, -2).amax(dim=0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return observe

    handles = [denoiser.get_submodule(site.consumer).register_forward_pre_hook(hook(site.consumer)) for site in sites]
    with removing(handles), torch.no_grad():
        for index, batch in calibration.batches(batch_size):
            run(batch)
            if progress is not None:
                progress(int(index[-1]) + 1, len(calibration))
    folds = []
    for site in sites:
        if site.consumer not in largest:
            raise CalibrationError(f"equalize: {site.consumer} never ran")
        weight = denoiser.get_submodule(site.consumer).get_parameter("weight").detach()
        activation = largest[site.consumer].clamp_min(_SMALLEST)
        factor = activation**strength / weight.abs().amax(dim=0).clamp_min(_SMALLEST) ** (1 - strength)
        factor = factor / factor.log().mean().exp()
        factor = factor.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
        folds.append(ChannelFold(site.producer, site.consumer, factor.float().numpy().astype(np.float32)))
    return tuple(folds)


def apply_folds(denoiser: nn.Module, folds: Sequence[ChannelFold]) -> None:
    """Scale the weights in place: the float model computes the same function as before (to rounding)."""
    with torch.no_grad():
        for fold in folds:
            factor = torch.from_numpy(fold.factor.copy())
            producer = denoiser.get_submodule(fold.producer)
            count = factor.numel()
            producer.get_parameter("weight")[:count] /= factor.unsqueeze(1)
            if producer.bias is not None:
                producer.get_parameter("bias")[:count] /= factor
            denoiser.get_submodule(fold.consumer).get_parameter("weight").mul_(factor)
