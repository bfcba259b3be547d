"""Small denoisers whose layers cover every form of the canonical operator, and inputs for them."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

TIMESTEPS = 60


class DeepDenoiser(nn.Module):
    """A UNet in miniature: every layer form behind others, odd sizes everywhere (packed 4-bit weights need padding)."""

    def __init__(self) -> None:
        super().__init__()
        self.time_1 = nn.Linear(6, 9)
        self.time_2 = nn.Linear(9, 9)
        self.conv_in = nn.Conv2d(3, 7, 3, padding=1)
        self.down = nn.Conv2d(7, 10, 3, stride=2, padding=1)
        self.time_proj = nn.Linear(9, 10)
        self.pointwise = nn.Conv2d(10, 10, 1, bias=False)
        self.norm = nn.LayerNorm(10)
        self.self_attention = SelfAttention(10, 2)
        self.cross_attention = CrossAttention(10, 5, 2)
        self.feed_1 = nn.Linear(10, 13)
        self.feed_2 = nn.Linear(13, 10)
        self.grouped = nn.Conv2d(10, 6, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(1, 1), groups=2)
        self.dilated = nn.Conv2d(6, 5, 3, padding=2, dilation=2)
        self.skip_conv = nn.Conv2d(12, 6, 3, padding=1)
        self.skip_shortcut = nn.Conv2d(12, 6, 1)
        self.conv_out = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = self.time_2(F.silu(self.time_1(timestep_features(timestep))))
        first = self.conv_in(sample)
        hidden = self.down(F.silu(first)) + self.time_proj(F.silu(time))[:, :, None, None]
        hidden = hidden + self.pointwise(F.silu(hidden))
        batch, channels, height, width = hidden.shape
        tokens = hidden.flatten(2).transpose(1, 2)
        tokens = tokens + self.self_attention(self.norm(tokens))
        tokens = tokens + self.cross_attention(self.norm(tokens), encoder_hidden_states)
        tokens = tokens + self.feed_2(F.gelu(self.feed_1(self.norm(tokens))))
        hidden = tokens.transpose(1, 2).reshape(batch, channels, height, width)
        hidden = self.dilated(F.silu(self.grouped(hidden)))
        hidden = F.interpolate(hidden, size=(8, 8), mode="nearest")
        joined = torch.cat([hidden, first], dim=1)
        hidden = F.silu(self.skip_conv(joined)) + self.skip_shortcut(joined)
        return self.conv_out(F.silu(hidden))


class RotatedDenoiser(nn.Module):
    """Two feed-forwards that read the denoiser's inputs, in blocks of 16 and of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = FeedForward(5, 3, inner_dim=48)
        self.rows = FeedForward(8, inner_dim=20, activation_fn="gelu")
        self.plain = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        tokens = self.tokens(encoder_hidden_states).mean(dim=1)
        return self.rows(sample) + self.plain(sample) + tokens[:, :, None, None] + timestep[:, None, None, None] * 0


class ShallowDenoiser(nn.Module):
    """Every layer reads the denoiser's inputs, so that no rounding of one layer can move the codes of another."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(3, 5, 3, padding=1),
                nn.Conv2d(3, 5, 1, bias=False),
                nn.Conv2d(3, 4, 3, stride=2, padding=(0, 1)),
                nn.Conv2d(3, 6, (1, 3), padding=(0, 2), dilation=(1, 2), groups=3),
            ]
        )
        self.joined = nn.Conv2d(6, 3, 3, padding=1)
        self.joined_unbiased = nn.Conv2d(6, 3, 1, bias=False)
        self.flat = nn.Linear(6, 5)
        self.flat_unbiased = nn.Linear(6, 3, bias=False)
        self.tokens = nn.Linear(5, 7)
        self.tokens_unbiased = nn.Linear(5, 3, bias=False)
        self.attention = PlainAttention()

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        joined = torch.cat([sample, sample.abs()], dim=1)
        features = timestep_features(timestep)
        parts = [layer(sample) for layer in self.convolutions]
        parts += [self.joined(joined), self.joined_unbiased(joined)]
        parts += [self.flat(features), self.flat_unbiased(features)]
        parts += [self.tokens(encoder_hidden_states), self.tokens_unbiased(encoder_hidden_states)]
        parts += [self.attention(encoder_hidden_states)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)


class PlainAttention(nn.Module):
    """Two heads straight from the input."""

    def forward(self, tokens: Tensor) -> Tensor:
        heads = torch.stack([tokens, tokens * 0.5 + 0.25], dim=1)
        return F.scaled_dot_product_attention(heads, heads * 1.5, heads - 0.5)


class SelfAttention(nn.Module):
    """q, k, v read one tensor."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (split_heads(layer(tokens), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class CrossAttention(nn.Module):
    """k and v read the text, which does not depend on the timestep."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, channels, bias=False) for _ in range(2))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        query = split_heads(self.to_q(tokens), self.heads)
        key, value = (split_heads(layer(context), self.heads) for layer in (self.to_k, self.to_v))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class Wrapped(nn.Module):
    """What the exporter is given."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.denoiser(sample, timestep, encoder_hidden_states)
        return output


def timestep_features(timestep: Tensor) -> Tensor:
    """float32 [batch, 6] that both runtimes compute to the same bits (no sine: its last bit is a library's choice)."""
    scaled = timestep.to(torch.float32).unsqueeze(1) * torch.tensor([[0.5, 0.25, 0.125, -0.0625, 0.03125, 1.0]])
    return scaled * 0.0625 - 1.0


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[batch, tokens, channels] → [batch, heads, tokens, channels / heads]."""
    batch, count, channels = tokens.shape
    return tokens.view(batch, count, heads, channels // heads).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """Undo `split_heads`."""
    batch, count, tokens, channels = heads.shape
    return heads.transpose(1, 2).reshape(batch, tokens, count * channels)


def random_inputs(batch: int, seed: int) -> dict[str, Tensor]:
    """Inputs of both small denoisers, timesteps mixed within the batch."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn((batch, 3, 8, 8), generator=generator),
        "timestep": torch.randint(0, TIMESTEPS, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn((batch, 3, 5), generator=generator),
    }
