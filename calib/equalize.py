"""Where a per-channel factor folds into the layer before, and the fold itself: float cannot tell the difference.

Dividing channel k of an activation by s_k and multiplying column k of the reader's weight by s_k changes nothing in
float (DilateQuant, Eq. 10; SmoothQuant, arXiv:2211.10438, Eq. 4) and is free where the division folds into the
producer: an affine norm, the value half of a GEGLU, the V projection of an attention, the modulation of an adaLN layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.rotation import Rotation
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import ChannelFold
from dmqexport.quant_types import FloatArray

_EXACT = 1e-5  # relative to the output's largest value; float32 rounding of a deep network stays well below


@dataclass(frozen=True)
class FoldSite:
    """Output channels 0 … `channels` - 1 of `producer` reach the input of every consumer unmixed, and nothing else.

    producer: an affine norm, or a linear layer; consumers: Linear or Conv2d layers that read the very same tensor.
    modulation: for an adaLN layer (norm(x) · (1 + scale) + shift), the chunks of the producer's output that are shift
    and scale; what is divided then is 1 + scale and shift.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: int
    modulation: tuple[int, int] | None = None


def fold_sites(denoiser: nn.Module) -> list[FoldSite]:
    """Every place where a factor folds exactly, found by the structure of diffusers' transformer blocks.

    Norm → q, k, v; norm → feed-forward; norm → proj_in; value half of a GEGLU → its output layer; V → out projection;
    adaLN modulation → q, k, v and feed-forward.
    """
    sites: list[FoldSite] = []
    for name, module in denoiser.named_modules():
        find = _SITES.get(type(module).__name__)
        if find is None:
            continue
        for local in find(module):
            layers = [_find(module, consumer) for consumer in local.consumers]
            source = _find(module, local.producer)
            if not layers or not all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers):
                continue
            if not isinstance(source, nn.Linear) and getattr(source, "weight", None) is None:
                continue
            channels = int(layers[0].get_parameter("weight").shape[1]) if layers[0] is not None else 0
            if local.modulation is not None and not _modulates(source, channels, max(local.modulation)):
                continue
            prefix = f"{name}." if name else ""
            consumers = tuple(prefix + consumer for consumer in local.consumers)
            sites.append(FoldSite(prefix + local.producer, consumers, channels, local.modulation))
    return sites


def _find(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _modulates(source: nn.Module | None, channels: int, last_chunk: int) -> bool:
    """Whether `source` can give away part of 1 + scale: that one lives in the bias, which it must have."""
    return (
        isinstance(source, nn.Linear) and source.bias is not None and source.out_features >= (last_chunk + 1) * channels
    )


def _site(producer: str, *consumers: str, modulation: tuple[int, int] | None = None) -> FoldSite:
    return FoldSite(producer, consumers, 0, modulation)


def _feed_forward(module: nn.Module) -> list[FoldSite]:
    gated = type(_find(module, "net.0")).__name__ == "GEGLU"
    # A rotation in between mixes the channels that a factor would have to stay with.
    return [_site("net.0.proj", "net.2")] if gated and not isinstance(_find(module, "net.1"), Rotation) else []


def _attention(module: nn.Module) -> list[FoldSite]:
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return []
    sites = [_site("to_v", "to_out.0")]
    if isinstance(_find(module, "group_norm"), nn.GroupNorm) and not getattr(module, "is_cross_attention", False):
        sites.append(_site("group_norm", "to_q", "to_k", "to_v"))
    return sites


def _transformer_block(module: nn.Module) -> list[FoldSite]:
    if getattr(module, "pos_embed", None) is not None:
        return []
    kind = getattr(module, "norm_type", None)
    cross_first = bool(getattr(module, "only_cross_attention", False))
    first = ("attn1.to_q",) if cross_first else ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    if kind == "ada_norm_zero":
        # AdaLayerNormZero.linear makes shift, scale, gate of the attention, then of the feed-forward.
        return [
            _site("norm1.linear", *first, modulation=(0, 1)),
            _site("norm1.linear", "ff.net.0.proj", modulation=(3, 4)),
        ]
    if kind != "layer_norm":
        return []
    return [_site("norm1", *first), _site("norm2", "attn2.to_q"), _site("norm3", "ff.net.0.proj")]


def _transformer(module: nn.Module) -> list[FoldSite]:
    return [_site("norm", "proj_in")] if isinstance(_find(module, "norm"), nn.GroupNorm) else []


_SITES: Mapping[str, Callable[[nn.Module], list[FoldSite]]] = {
    "FeedForward": _feed_forward,
    "Attention": _attention,
    "BasicTransformerBlock": _transformer_block,
    "Transformer2DModel": _transformer,
}


def folds_of(sites: Sequence[FoldSite], factors: Mapping[str, FloatArray]) -> tuple[ChannelFold, ...]:
    """The record of the sites that have a factor. factors: float32 [channels] by name of a site's first consumer."""
    return tuple(
        ChannelFold(site.producer, site.consumers, factors[site.consumers[0]])
        for site in sites
        if site.consumers[0] in factors
    )


def apply_folds(
    denoiser: nn.Module, sites: Sequence[FoldSite], folds: Sequence[ChannelFold], check: Callable[[], Tensor]
) -> None:
    """Scale the weights in place: the float model computes the same function as before, to rounding.

    sites: where the folds may go, matched by their first consumer. `check` runs the denoiser on fixed inputs. Raises
    CalibrationError for a fold without a site, and when the output changed: a model that only looks like the structure
    known here must not be altered unnoticed.
    """
    known = {site.consumers[0]: site for site in sites}
    before = check()
    with torch.no_grad():
        for fold in folds:
            site = known.get(fold.consumers[0])
            if site is None or site.channels != len(fold.factor):
                raise CalibrationError(f"scaling: no place to fold {len(fold.factor)} factors of {fold.consumers[0]}")
            factor = torch.from_numpy(fold.factor.copy())
            _divide(denoiser.get_submodule(site.producer), site, factor)
            for name in site.consumers:
                columns = denoiser.get_submodule(name).get_parameter("weight")
                columns.mul_(factor.reshape(1, -1, *([1] * (columns.ndim - 2))))
    change = float((check() - before).abs().max() / before.abs().max().clamp_min(1e-30))
    if not change <= _EXACT:
        raise CalibrationError(
            f"scaling: folding channel factors changed the float output by {change:.2g} of its range",
            hint="this architecture is not the one the folds know: --set scaling.method=none",
        )


def _divide(producer: nn.Module, site: FoldSite, factor: Tensor) -> None:
    """Divide what the producer puts out by `factor`, in its weight and bias."""
    weight, bias = producer.get_parameter("weight"), getattr(producer, "bias", None)
    spread = factor.reshape(-1, *([1] * (weight.ndim - 1)))
    count = site.channels
    for chunk in (0,) if site.modulation is None else site.modulation:
        rows = slice(chunk * count, (chunk + 1) * count)
        weight[rows] /= spread
        if bias is not None:
            one = 1.0 if site.modulation is not None and chunk == site.modulation[1] else 0.0
            bias[rows] = (bias[rows] + one) / factor - one
