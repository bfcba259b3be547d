"""Fold per-channel factors between a layer and the one that reads it, where float cannot tell the difference.

A per-tensor activation scale is as wide as its widest channel. Dividing channel k of the activation by s_k and
multiplying column k of the reader's weight by s_k changes nothing in float (DilateQuant, Eq. 5; SmoothQuant,
arXiv:2211.10438, Eq. 4) and is free where the division folds into the producer's weight: an affine norm, the value
half of a GEGLU, the V projection of an attention. Measured on the bundled model at W4A4: predicted noise
+0.3 and +0.5 dB on two sets of trajectories.
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
_EXACT = 1e-4  # relative; float32 rounding of a deep network stays two orders below


@dataclass(frozen=True)
class FoldSite:
    """Output channels 0 … `channels` - 1 of `producer` reach the input of every consumer unmixed, and nothing else.

    producer: an affine norm, or a linear layer; consumers: Linear or Conv2d layers that read the very same tensor.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: int


def fold_sites(denoiser: nn.Module) -> list[FoldSite]:
    """Every place where a factor folds exactly, found by the structure of diffusers' transformer blocks.

    Norm → q, k, v; norm → feed-forward; norm → proj_in; value half of a GEGLU → its output layer; V → out projection.
    """
    sites: list[FoldSite] = []
    for name, module in denoiser.named_modules():
        find = _SITES.get(type(module).__name__)
        if find is None:
            continue
        for producer, consumers in find(module):
            layers = [_find(module, consumer) for consumer in consumers]
            source = _find(module, producer)
            if not layers or not all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers):
                continue
            if not isinstance(source, nn.Linear) and getattr(source, "weight", None) is None:
                continue
            prefix = f"{name}." if name else ""
            channels = int(layers[0].get_parameter("weight").shape[1]) if layers[0] is not None else 0
            sites.append(FoldSite(prefix + producer, tuple(prefix + consumer for consumer in consumers), channels))
    return sites


def _find(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _feed_forward(module: nn.Module) -> list[tuple[str, list[str]]]:
    gated = type(_find(module, "net.0")).__name__ == "GEGLU"
    return [("net.0.proj", ["net.2"])] if gated else []


def _attention(module: nn.Module) -> list[tuple[str, list[str]]]:
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return []
    sites = [("to_v", ["to_out.0"])]
    if isinstance(_find(module, "group_norm"), nn.GroupNorm) and not getattr(module, "is_cross_attention", False):
        sites.append(("group_norm", ["to_q", "to_k", "to_v"]))
    return sites


def _transformer_block(module: nn.Module) -> list[tuple[str, list[str]]]:
    if getattr(module, "norm_type", None) != "layer_norm" or getattr(module, "pos_embed", None) is not None:
        return []
    cross_first = bool(getattr(module, "only_cross_attention", False))
    return [
        ("norm1", ["attn1.to_q"] if cross_first else ["attn1.to_q", "attn1.to_k", "attn1.to_v"]),
        ("norm2", ["attn2.to_q"]),
        ("norm3", ["ff.net.0.proj"]),
    ]


def _transformer(module: nn.Module) -> list[tuple[str, list[str]]]:
    return [("norm", ["proj_in"])] if isinstance(_find(module, "norm"), nn.GroupNorm) else []


_SITES: Mapping[str, Callable[[nn.Module], list[tuple[str, list[str]]]]] = {
    "FeedForward": _feed_forward,
    "Attention": _attention,
    "BasicTransformerBlock": _transformer_block,
    "Transformer2DModel": _transformer,
}


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
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            found = args[0].abs().movedim(axis, -1).flatten(0, -2).amax(dim=0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return observe

    readers = [site.consumers[0] for site in sites]
    handles = [denoiser.get_submodule(name).register_forward_pre_hook(hook(name)) for name in readers]
    with removing(handles), torch.no_grad():
        for index, batch in calibration.batches(batch_size):
            run(batch)
            if progress is not None:
                progress(int(index[-1]) + 1, len(calibration))
    folds = []
    for site, reader in zip(sites, readers, strict=True):
        if reader not in largest:
            raise CalibrationError(f"equalize: {reader} never ran")
        weights = [denoiser.get_submodule(name).get_parameter("weight").detach() for name in site.consumers]
        columns = torch.stack([weight.abs().movedim(1, 0).flatten(1).amax(dim=1) for weight in weights]).amax(dim=0)
        factor = largest[reader].clamp_min(_SMALLEST) ** strength / columns.clamp_min(_SMALLEST) ** (1 - strength)
        factor = (factor / factor.log().mean().exp()).clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
        folds.append(ChannelFold(site.producer, site.consumers, factor.numpy().astype(np.float32)))
    return tuple(folds)


def apply_folds(denoiser: nn.Module, folds: Sequence[ChannelFold], check: Callable[[], Tensor]) -> None:
    """Scale the weights in place: the float model computes the same function as before, to rounding.

    `check` runs the denoiser on fixed inputs. Raises CalibrationError when its output changed: a model that only looks
    like the structure known here must not be altered unnoticed.
    """
    before = check()
    with torch.no_grad():
        for fold in folds:
            factor = torch.from_numpy(fold.factor.copy())
            count = factor.numel()
            producer = denoiser.get_submodule(fold.producer)
            weight = producer.get_parameter("weight")
            weight[:count] /= factor.reshape(-1, *([1] * (weight.ndim - 1)))
            if producer.bias is not None:
                producer.get_parameter("bias")[:count] /= factor
            for name in fold.consumers:
                columns = denoiser.get_submodule(name).get_parameter("weight")
                columns.mul_(factor.reshape(1, -1, *([1] * (columns.ndim - 2))))
    change = float((check() - before).abs().max() / before.abs().max().clamp_min(1e-30))
    if not change <= _EXACT:
        raise CalibrationError(
            f"equalize: folding channel factors changed the float output by {change:.2g} of its range",
            hint="this architecture is not the one the folds know: --set quantization.equalize=null",
        )
