"""Shapes that every family reads from a denoiser's config."""

from typing import Any

from torch import nn

from dmqexport.errors import ModelError


def sample_shape(denoiser: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the denoiser's sample, from its config; raises ModelError when it has no size."""
    config: Any = denoiser.config
    size = config.sample_size
    if size is None:
        raise ModelError(
            "the denoiser's config.json has no sample_size, so its input has no known shape",
            hint='add the height and width it was trained on, like "sample_size": 64',
        )
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(config.in_channels), int(height), int(width)
