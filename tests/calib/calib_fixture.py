"""A denoiser whose quantizable layers read elementwise functions of its inputs: the same bits at any batch size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.sampling import CalibrationSet

TIMESTEPS = 40


class ParallelDenoiser(nn.Module):
    """One layer of each kind, none behind another, an attention, and a concat with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.conv_shared = nn.Conv2d(3, 4, 1)
        self.scaled = nn.Conv2d(3, 4, 1)
        self.joined = nn.Conv2d(5, 4, 1)
        self.time = nn.Linear(3, 4)
        self.text = nn.Linear(6, 4)
        self.attention = Attention()
        self.never = nn.Linear(2, 2)
        self.twice = nn.Linear(6, 6)
        self.lookup = nn.Embedding(4, 4)
        self.volume = nn.Conv1d(3, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        timestep = timestep.expand(sample.shape[0])  # pipelines pass a scalar, diffusers' UNets spread it
        factor = (timestep.float() / TIMESTEPS).reshape(-1, 1, 1, 1)
        joined = torch.cat([sample, sample[:, :2].abs()], dim=1)
        image = self.conv(sample) + self.conv_shared(sample) + self.scaled(sample * factor) + self.joined(joined)
        image = image + self.time(factor.flatten(1) * torch.ones(3))[:, :, None, None]
        text = self.text(encoder_hidden_states).mean(dim=1) + self.attention(encoder_hidden_states)
        text = text + self.twice(self.twice(encoder_hidden_states)).mean(dim=1)[:, :4]
        return image + text[:, :, None, None] + self.lookup(timestep % 4)[:, :, None, None]


class Attention(nn.Module):
    """Attention straight from the input."""

    def forward(self, tokens: Tensor) -> Tensor:
        heads = torch.stack([tokens, tokens * 0.5], dim=1)
        return F.scaled_dot_product_attention(heads, heads - 1.0, heads * 2.0).mean(dim=(1, 2))[:, :4]


def random_calibration(entries: int, seed: int = 0, timesteps: Tensor | None = None) -> CalibrationSet:
    """`entries` entries of random inputs over all timesteps."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.arange(entries) * TIMESTEPS // entries if timesteps is None else timesteps
    return CalibrationSet(
        {
            "sample": torch.randn((entries, 3, 9, 7), generator=generator),
            "timestep": chosen,
            "encoder_hidden_states": torch.randn((entries, 5, 6), generator=generator),
        },
        trajectory=torch.arange(entries) % 2,
        step=torch.arange(entries) // 2,
    )


def run_on(denoiser: nn.Module, calibration: CalibrationSet, index: int) -> object:
    """One forward of entry 0 whose timestep and sample are those of the first (0) or the last (1) entry."""
    inputs = calibration.select(torch.tensor([0]))
    other = calibration.select(torch.tensor([0 if index == 0 else len(calibration) - 1]))
    inputs["sample"], inputs["timestep"] = other["sample"], other["timestep"]
    return denoiser(**inputs)
