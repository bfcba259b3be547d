"""From the tensor names of authors' checkpoints to those of diffusers; every name is known, or it is an error."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from dmqexport.errors import ModelError

Renamed = Iterator[tuple[str, Tensor]]

_DENSE = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_DDPM_RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_LDM_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def rename_ddpm(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Names of ermongroup/ddim's `Model`, and of the encoder and decoder of CompVis' autoencoders, which share them.

    levels: resolutions of the network; `up` counts them from the finest, diffusers from the coarsest. 1 × 1
    convolutions of attention become matrices. Raises ModelError for a name that none of these networks has.
    """
    return _collect(weights, lambda name, tensor: _ddpm(name, tensor, levels))


def _ddpm(name: str, tensor: Tensor, levels: int) -> Renamed:
    if match := re.fullmatch(r"temb\.dense\.([01])\.(\w+)", name):
        yield f"time_embedding.linear_{int(match[1]) + 1}.{match[2]}", tensor
    elif match := re.fullmatch(r"(conv_in|conv_out|norm_out)\.(\w+)", name):
        yield f"{match[1].replace('norm_out', 'conv_norm_out')}.{match[2]}", tensor
    elif match := re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)\.(\w+)", name):
        block = f"{match[1]}_blocks.{_level(match, levels)}"
        yield _part(f"{block}.{_kind(match[3])}.{match[4]}", match[3], match[5], match[6], tensor)
    elif match := re.fullmatch(r"(down|up)\.(\d+)\.(?:down|up)sample\.conv\.(\w+)", name):
        yield f"{match[1]}_blocks.{_level(match, levels)}.{match[1]}samplers.0.conv.{match[3]}", tensor
    elif match := re.fullmatch(r"mid\.(block|attn)_([12])\.(\w+)\.(\w+)", name):
        yield _part(f"mid_block.{_kind(match[1])}.{int(match[2]) - 1}", match[1], match[3], match[4], tensor)


def _level(match: re.Match[str], levels: int) -> int:
    return int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])


def _kind(name: str) -> str:
    return "resnets" if name == "block" else "attentions"


def _part(place: str, kind: str, layer: str, leaf: str, tensor: Tensor) -> tuple[str, Tensor]:
    if kind == "block":
        return f"{place}.{_DDPM_RESNET.get(layer, layer)}.{leaf}", tensor
    return f"{place}.{_DENSE.get(layer, layer)}.{leaf}", _matrix(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    """A 1 × 1 convolution as a matrix; vectors stay."""
    return tensor.flatten(1) if tensor.dim() > 2 else tensor


def rename_autoencoder(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Names of CompVis' `VQModel` and `AutoencoderKL`; raises ModelError for a name that they do not have."""

    def rename(name: str, tensor: Tensor) -> Renamed:
        half, _, rest = name.partition(".")
        if half in ("encoder", "decoder"):
            for inner, value in _ddpm(rest, tensor, levels):
                yield f"{half}.{inner}", value
        elif half in ("quant_conv", "post_quant_conv") or name == "quantize.embedding.weight":
            yield name, tensor

    return _collect(weights, rename)


def rename_ldm(weights: Mapping[str, Tensor], blocks: int, heads: Callable[[int], int] | None) -> dict[str, Tensor]:
    """Names of CompVis' `UNetModel`.

    blocks: residual blocks a level. heads: channels → attention heads of its own attention, which interleaves q, k
    and v head by head in one convolution (`QKVAttentionLegacy`) where diffusers has a matrix for each; None when
    attention is in spatial transformers. Raises ModelError for a name that the network does not have.
    """
    return _collect(weights, lambda name, tensor: _ldm(name, tensor, blocks, heads))


def _ldm(name: str, tensor: Tensor, blocks: int, heads: Callable[[int], int] | None) -> Renamed:
    if match := re.fullmatch(r"time_embed\.([02])\.(\w+)", name):
        yield f"time_embedding.linear_{int(match[1]) // 2 + 1}.{match[2]}", tensor
    elif match := re.fullmatch(r"input_blocks\.0\.0\.(\w+)", name):
        yield f"conv_in.{match[1]}", tensor
    elif match := re.fullmatch(r"out\.([02])\.(\w+)", name):
        yield f"{'conv_norm_out' if match[1] == '0' else 'conv_out'}.{match[2]}", tensor
    elif match := re.fullmatch(r"input_blocks\.(\d+)\.[01]\.(.+)", name):
        level, index = divmod(int(match[1]) - 1, blocks + 1)
        # The last entry of a level halves the resolution.
        place = f"resnets.{index}" if index < blocks else "downsamplers.0"
        yield from _ldm_module(f"down_blocks.{level}", place, index, match[2].replace("op.", "conv."), tensor, heads)
    elif match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        yield from _ldm_module("mid_block", f"resnets.{int(match[1]) // 2}", 0, match[2], tensor, heads)
    elif match := re.fullmatch(r"output_blocks\.(\d+)\.([012])\.(.+)", name):
        level, index = divmod(int(match[1]), blocks + 1)
        # Behind the first module of an entry comes attention, upsampling, or one after the other.
        place = f"resnets.{index}" if match[2] == "0" else "upsamplers.0"
        yield from _ldm_module(f"up_blocks.{level}", place, index, match[3], tensor, heads)


def _ldm_module(
    block: str, place: str, index: int, rest: str, tensor: Tensor, heads: Callable[[int], int] | None
) -> Renamed:
    """One tensor of a residual block or resampling at `place`, or of attention `index`, within `block`."""
    layer, _, leaf = rest.rpartition(".")
    attention = f"{block}.attentions.{index}"
    if layer in _LDM_RESNET:
        yield f"{block}.{place}.{_LDM_RESNET[layer]}.{leaf}", tensor
    elif layer == "conv":
        yield f"{block}.{place}.conv.{leaf}", tensor
    elif heads is None:
        if layer in ("norm", "proj_in", "proj_out") or layer.startswith("transformer_blocks."):
            yield f"{attention}.{rest}", tensor
    elif layer == "qkv":
        parts = tensor.reshape(heads(tensor.shape[0] // 3), 3, -1, *tensor.shape[1:]).unbind(1)
        for target, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
            yield f"{attention}.{target}.{leaf}", _matrix(part.flatten(0, 1))
    elif layer in ("norm", "proj_out"):
        yield f"{attention}.{_DENSE[layer]}.{leaf}", _matrix(tensor)


def _collect(
    weights: Mapping[str, Tensor], rename: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        found = dict(rename(name, tensor))
        if not found:
            unknown.append(name)
        renamed.update({key: value.to(torch.float32).contiguous() for key, value in found.items()})
    if unknown:
        raise ModelError(
            f"{len(unknown)} tensors have names that this kind of checkpoint does not know, first {sorted(unknown)[0]}",
            hint="is this the checkpoint of another model? -m names the preset it belongs to",
        )
    return renamed
