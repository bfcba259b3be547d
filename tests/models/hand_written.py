"""A denoiser written by hand, as a user of no library would: U-shaped, with a time embedding and skips by addition."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from dmqexport.adapter import Adapter, Denoise


class Stage(nn.Module):
    """Two convolutions, the second with the time added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """[batch, C, H, W], [batch, C] → [batch, C, H, W]."""
        hidden = nn.functional.silu(self.norm(self.first(features))) + time[:, :, None, None]
        return features + self.second(hidden)


class HandWritten(nn.Module):
    """stem, two stages, head; continuous time in [0, 1]; conditioned on a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 16))
        self.condition = nn.Linear(6, 16)
        self.stages = nn.ModuleList([Stage(16), Stage(16)])
        self.head = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, vector: Tensor) -> Tensor:
        """[batch, 3, H, W], [batch], [batch, 6] → [batch, 3, H, W]."""
        time = self.time(timestep[:, None].to(sample.dtype)) + self.condition(vector)
        features = self.stem(sample)
        for stage in self.stages:
            features = stage(features, time)
        prediction: Tensor = self.head(features)
        return prediction


def _denoiser() -> HandWritten:
    torch.manual_seed(0)
    return HandWritten()


def _inputs(timestep: Tensor) -> dict[str, Tensor]:
    return {"sample": torch.randn(2, 3, 8, 8), "timestep": timestep, "vector": torch.randn(2, 6)}


def scheduled() -> Adapter:
    """Integer timesteps, the usual loop, height and width free."""
    return Adapter(
        module=_denoiser(),
        inputs=_inputs(torch.tensor([0, 99])),
        boundary=("stem", "head", "time.*"),
        scheduler=DDIMScheduler(num_train_timesteps=100, clip_sample=False),
        num_timesteps=100,
        steps=3,
        guidance=2.0,
        null_conditions=lambda seeds: {"vector": torch.zeros(len(seeds), 6)},
        blocks=("stages.0", "stages.1"),
        dynamic_axes={"sample": {2: "height", 3: "width"}},
    )


def euler(denoise: Denoise, seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
    """Rectified flow from time 1 to 0; the vector is the seed's."""
    noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    sample = torch.stack(noise)
    vector = torch.stack([torch.full((6,), float(seed % 5)) for seed in seeds])
    for index in range(steps):
        timestep = torch.full((len(seeds),), 1.0 - index / steps)
        sample = sample - denoise(sample=sample, timestep=timestep, vector=vector) / steps
    return sample


def flowing() -> Adapter:
    """Continuous time, a sampler of one's own."""
    return Adapter(
        module=_denoiser(),
        inputs=_inputs(torch.tensor([0.0, 1.0])),
        boundary=("stem", "head", "time.*"),
        sample=euler,
        decode=lambda samples: (samples / 4 + 0.5).clamp(0, 1),
        num_timesteps=1001,
        timestep_scale=1000.0,
        steps=3,
    )
