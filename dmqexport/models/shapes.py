"""Shapes and random inputs that every family reads from a denoiser's config."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from dmqexport.errors import ModelError

#: tokens of a text condition where no text encoder tells: CLIP's.
CLIP_TOKENS: Final = 77
_TRAIN_TIMESTEPS: Final = 1000


def sample_shape(config: Mapping[str, Any], size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(channels, height, width) of the sample; `size` goes before the config's own.

    Raises ModelError when neither tells.
    """
    own: Any = config.get("sample_size")
    if size is None and own is None:
        raise ModelError(
            "the denoiser's config.json has no sample_size, so its input has no known shape",
            hint='add the height and width it was trained on, like "sample_size": 64, or choose it with '
            "--set sampling.latent_size=[64,64]",
        )
    height, width = size or ((own, own) if isinstance(own, int) else tuple(own))
    return int(config["in_channels"]), int(height), int(width)


class ExampleInputs:
    """Seeded random inputs, in the order in which they are asked for."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """float32 [batch, *shape], unit normal."""
        return torch.randn((self._batch, *shape), generator=self._generator)

    def timesteps(self) -> Tensor:
        """int64 [batch] in [0, 1000)."""
        return self.integers(_TRAIN_TIMESTEPS)

    def integers(self, end: int) -> Tensor:
        """int64 [batch] in [0, end)."""
        return torch.randint(0, end, (self._batch,), generator=self._generator)

    def uniform(self, end: float) -> Tensor:
        """float32 [batch] in [0, end)."""
        return torch.rand((self._batch,), generator=self._generator) * end

    def full(self, value: float, *shape: int) -> Tensor:
        """float32 [batch, *shape], constant."""
        return torch.full((self._batch, *shape), value)
