"""The networks of CompVis/latent-diffusion and ermongroup/ddim, written anew: same tensor names, same arithmetic.

What conversions are held against. Sizes are free, so that a test's network is a few thousand parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmqexport.models.originals import Autoencoder, DdimOriginal, LdmOriginal


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Weights that leave no layer idle: norms near one, matrices that keep their input's size, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.5)
    return module.eval()


# --- ermongroup/ddim models/diffusion.py; CompVis' autoencoders share its blocks ------------------------------------


def _ddpm_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class DdpmResnet(nn.Module):
    """`ResnetBlock`: without a time embedding when `embedding` is 0."""

    def __init__(self, inner: int, outer: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _ddpm_norm(inner, groups)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        if embedding:
            self.temb_proj = nn.Linear(embedding, outer)
        self.norm2 = _ddpm_norm(outer, groups)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if embedding is not None:
            h = h + self.temb_proj(F.silu(embedding))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DdpmAttention(nn.Module):
    """`AttnBlock`: one head over all positions, 1 × 1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _ddpm_norm(channels, groups)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (getattr(self, name)(h).flatten(2) for name in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


class DdpmDown(nn.Module):
    """Pads right and below by one, then convolves without padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DdpmUp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, embedding: int, groups: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = DdpmResnet(channels, channels, embedding, groups)
    middle.attn_1 = DdpmAttention(channels, groups)
    middle.block_2 = DdpmResnet(channels, channels, embedding, groups)
    return middle


def _run_middle(middle: Any, h: Tensor, embedding: Tensor | None) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(h, embedding)), embedding)


def _sine_first(timesteps: Tensor, width: int) -> Tensor:
    """Sines before cosines, frequencies down to 1/10000 inclusive."""
    half = width // 2
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class DdimNetwork(nn.Module):
    """`Model` of ermongroup/ddim."""

    def __init__(self, facts: DdimOriginal) -> None:
        super().__init__()
        self.facts = facts
        widths = [facts.channels * factor for factor in facts.multipliers]
        embedding = 4 * facts.channels
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(facts.channels, embedding), nn.Linear(embedding, embedding)])
        self.conv_in = nn.Conv2d(3, facts.channels, 3, padding=1)
        skips, width = [facts.channels], facts.channels
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, outer in enumerate(widths):
            place = nn.Module()
            place.block, place.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(facts.blocks):
                place.block.append(DdpmResnet(width, outer, embedding, facts.groups))
                width = outer
                if level in facts.attention:
                    place.attn.append(DdpmAttention(width, facts.groups))
                skips.append(width)
            if level < len(widths) - 1:
                place.downsample = DdpmDown(width)
                skips.append(width)
            self.down.append(place)
        self.mid = _middle(width, embedding, facts.groups)
        for level in reversed(range(len(widths))):
            place = nn.Module()
            place.block, place.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(facts.blocks + 1):
                place.block.append(DdpmResnet(width + skips.pop(), widths[level], embedding, facts.groups))
                width = widths[level]
                if level in facts.attention:
                    place.attn.append(DdpmAttention(width, facts.groups))
            if level > 0:
                place.upsample = DdpmUp(width)
            self.up.insert(0, place)
        self.norm_out = _ddpm_norm(width, facts.groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        embedding = _sine_first(timesteps, self.facts.channels)
        embedding = self.temb.dense[1](F.silu(self.temb.dense[0](embedding)))
        h = self.conv_in(x)
        skips = [h]
        for place in self.down:
            for index, block in enumerate(place.block):
                h = block(h, embedding)
                if len(place.attn):
                    h = place.attn[index](h)
                skips.append(h)
            if hasattr(place, "downsample"):
                h = place.downsample(h)
                skips.append(h)
        h = _run_middle(self.mid, h, embedding)
        for place in reversed(self.up):
            for index, block in enumerate(place.block):
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
                if len(place.attn):
                    h = place.attn[index](h)
            if hasattr(place, "upsample"):
                h = place.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# --- CompVis ldm/modules/diffusionmodules/model.py, ldm/models/autoencoder.py ---------------------------------------


class LdmAutoencoder(nn.Module):
    """`VQModelInterface` or, without codes, `AutoencoderKL`."""

    def __init__(self, facts: Autoencoder) -> None:
        super().__init__()
        widths = [facts.channels * factor for factor in facts.multipliers]
        moments = facts.latent_channels * (1 if facts.codes else 2)
        self.encoder = nn.Module()
        self.encoder.conv_in = nn.Conv2d(3, facts.channels, 3, padding=1)
        self.encoder.down, width = nn.ModuleList(), facts.channels
        for level, outer in enumerate(widths):
            place = nn.Module()
            place.block = nn.ModuleList()
            for _ in range(facts.blocks):
                place.block.append(DdpmResnet(width, outer, 0, facts.groups))
                width = outer
            if level < len(widths) - 1:
                place.downsample = DdpmDown(width)
            self.encoder.down.append(place)
        self.encoder.mid = _middle(width, 0, facts.groups)
        self.encoder.norm_out = _ddpm_norm(width, facts.groups)
        self.encoder.conv_out = nn.Conv2d(width, moments, 3, padding=1)
        self.decoder = nn.Module()
        self.decoder.conv_in = nn.Conv2d(facts.latent_channels, width, 3, padding=1)
        self.decoder.mid = _middle(width, 0, facts.groups)
        self.decoder.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            place = nn.Module()
            place.block = nn.ModuleList()
            for _ in range(facts.blocks + 1):
                place.block.append(DdpmResnet(width, widths[level], 0, facts.groups))
                width = widths[level]
            if level > 0:
                place.upsample = DdpmUp(width)
            self.decoder.up.insert(0, place)
        self.decoder.norm_out = _ddpm_norm(width, facts.groups)
        self.decoder.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(facts.latent_channels, facts.latent_channels, 1)
        if facts.codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(facts.codes, facts.latent_channels)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents before quantization, or means and log variances of the KL kind."""
        h = self.encoder.conv_in(pictures)
        for place in self.encoder.down:
            for block in place.block:
                h = block(h, None)
            if hasattr(place, "downsample"):
                h = place.downsample(h)
        h = _run_middle(self.encoder.mid, h, None)
        return self.quant_conv(self.encoder.conv_out(F.silu(self.encoder.norm_out(h))))

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1]; the vector-quantized kind takes the nearest code first."""
        if hasattr(self, "quantize"):
            codes = self.quantize.embedding.weight
            flat = latents.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
            nearest = torch.cdist(flat.double(), codes.double()).argmin(dim=1)
            latents = codes[nearest].reshape(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        h = self.decoder.conv_in(self.post_quant_conv(latents))
        h = _run_middle(self.decoder.mid, h, None)
        for place in reversed(self.decoder.up):
            for block in place.block:
                h = block(h, None)
            if hasattr(place, "upsample"):
                h = place.upsample(h)
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))


# --- CompVis ldm/modules/diffusionmodules/openaimodel.py, ldm/modules/attention.py -----------------------------------


class LdmResnet(nn.Module):
    """`ResBlock`; resample: halving or doubling between the first norm and its convolution, and of the skip."""

    def __init__(
        self,
        inner: int,
        outer: int,
        embedding: int,
        groups: int,
        shift: bool,
        resample: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.shift, self.resample = shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outer * (2 if shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, outer), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, embedding: Tensor, _: Tensor | None) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        time = self.emb_layers(embedding)[..., None, None]
        if self.shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + time)
        return self.skip_connection(x) + h


class LdmAttention(nn.Module):
    """`AttentionBlock` with `QKVAttentionLegacy`: heads are split first, and each holds its q, k and v in a row."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
        flat = x.flatten(2)
        per_head = self.qkv(self.norm(flat)).unflatten(1, (self.heads, -1))
        q, k, v = per_head.chunk(3, dim=2)
        weights = torch.softmax(torch.einsum("bhci,bhcj->bhij", q, k) / q.shape[2] ** 0.5, dim=-1)
        mixed = torch.einsum("bhij,bhcj->bhci", weights, v).flatten(1, 2)
        return (flat + self.proj_out(mixed)).reshape(x.shape)


class _CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(source).unflatten(2, (self.heads, -1))
            for layer, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5, dim=-1)
        return self.to_out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class _Geglu(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = _CrossAttention(width, width, heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(_Geglu(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))
        self.attn2 = _CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff.net(self.norm3(x)) + x


class LdmTransformer(nn.Module):
    """`SpatialTransformer` of depth one."""

    def __init__(self, channels: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([_TransformerBlock(channels, context, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, _: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))


class _LdmDown(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
        return self.op(x)


class _LdmUp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _First(nn.Conv2d):
    def forward(self, x: Tensor, _: Tensor, __: Tensor | None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class LdmNetwork(nn.Module):
    """`UNetModel` of CompVis."""

    def __init__(self, facts: LdmOriginal) -> None:
        super().__init__()
        self.facts = facts
        base, embedding, latents = facts.channels, 4 * facts.channels, facts.first_stage.latent_channels
        widths = [base * factor for factor in facts.multipliers]
        last = len(widths) - 1
        self.time_embed = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.input_blocks = nn.ModuleList([nn.ModuleList([_First(latents, base, 3, padding=1)])])
        skips, width = [base], base
        for level, outer in enumerate(widths):
            for _ in range(facts.blocks):
                self.input_blocks.append(nn.ModuleList([self._resnet(width, outer), *self._attention(level, outer)]))
                width = outer
                skips.append(width)
            if level < last:
                halve: nn.Module = _LdmDown(width)
                if facts.resample_in_blocks:
                    halve = self._resnet(width, width, lambda x: F.avg_pool2d(x, 2))
                self.input_blocks.append(nn.ModuleList([halve]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [self._resnet(width, width), *self._attention(None, width), self._resnet(width, width)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for index in range(facts.blocks + 1):
                outer = widths[level]
                entry = [self._resnet(width + skips.pop(), outer), *self._attention(level, outer)]
                width = outer
                if level and index == facts.blocks:
                    double: nn.Module = _LdmUp(width)
                    if facts.resample_in_blocks:
                        double = self._resnet(width, width, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
                    entry.append(double)
                self.output_blocks.append(nn.ModuleList(entry))
        self.out = nn.Sequential(nn.GroupNorm(facts.groups, width), nn.SiLU(), nn.Conv2d(width, latents, 3, padding=1))

    def _resnet(self, inner: int, outer: int, resample: Callable[[Tensor], Tensor] | None = None) -> LdmResnet:
        facts = self.facts
        return LdmResnet(inner, outer, 4 * facts.channels, facts.groups, facts.resample_in_blocks, resample)

    def _attention(self, level: int | None, channels: int) -> list[nn.Module]:
        facts = self.facts
        if level is not None and level not in facts.attention:
            return []
        heads = facts.heads if facts.head_channels is None else channels // facts.head_channels
        assert heads is not None
        if facts.context is not None:
            return [LdmTransformer(channels, facts.context, heads, facts.groups)]
        return [LdmAttention(channels, heads, facts.groups)]

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        half = self.facts.channels // 2
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)[None]
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        skips = []
        for entry in self.input_blocks:
            x = _run(entry, x, embedding, context)
            skips.append(x)
        x = _run(self.middle_block, x, embedding, context)
        for entry in self.output_blocks:
            x = _run(entry, torch.cat([x, skips.pop()], dim=1), embedding, context)
        return self.out(x)


def _run(entry: Sequence[nn.Module] | nn.ModuleList, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
    for layer in entry:
        x = layer(x, embedding, context)
    return x


class LdmModel(nn.Module):
    """`LatentDiffusion` as its checkpoints name it: UNet, its moving average under names without dots, first stage."""

    def __init__(self, facts: LdmOriginal) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = LdmNetwork(facts)
        self.first_stage_model = LdmAutoencoder(facts.first_stage)
        if facts.classes is not None and facts.context is not None:
            self.cond_stage_model = nn.Module()
            self.cond_stage_model.embedding = nn.Embedding(facts.classes, facts.context)
        roots = torch.linspace(facts.beta_start**0.5, facts.beta_end**0.5, 1000, dtype=torch.float64)
        self.register_buffer("betas", (roots**2).float())
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - roots**2, 0).float())
        if facts.scaled:
            self.register_buffer("scale_factor", torch.tensor(0.23))

    def unet(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """The denoiser's answer."""
        output: Tensor = self.model.diffusion_model(x, timesteps, context)
        return output

    def checkpoint(self, averaged: "LdmModel | None" = None) -> dict[str, Tensor]:
        """The state dict, with another model's UNet as its moving average."""
        state = {**self.state_dict(), "first_stage_model.loss.logvar": torch.zeros(1)}
        if averaged is not None:
            for name, value in averaged.model.named_parameters():
                state["model_ema." + name.replace(".", "")] = value.detach()
            state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(7)
        return state
