"""What the pipeline must know of a denoiser family, and the registry that finds it by diffusers class name."""

from typing import Any, Protocol

from torch import Tensor, nn

from dmqexport.errors import ModelError


class Family(Protocol):
    """One denoiser architecture. A new family is one file and one line in `families()`."""

    #: diffusers class name of the denoiser.
    class_name: str
    #: folder of the component in a pipeline and in the bundle.
    component: str
    #: names of the forward's tensor inputs, in order; the graph's input names.
    input_names: tuple[str, ...]
    #: glob patterns of the layers that stay at 8 bit (first, last, time embedding).
    boundary: tuple[str, ...]

    def example_inputs(self, denoiser: nn.Module, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Random inputs of the right shapes, seeded, `timestep` int64 [batch]; `tokens` long where text enters.

        Raises ModelError for a variant of the architecture that needs other inputs.
        """
        ...

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """A module whose forward takes `input_names` and returns the prediction tensor alone; keeps `denoiser`."""
        ...


def families() -> tuple[Family, ...]:
    """Every supported family."""
    from dmqexport.models.unet2d import UNet2DFamily
    from dmqexport.models.unet2d_condition import UNet2DConditionFamily

    return (UNet2DFamily(), UNet2DConditionFamily())


def family_of(class_name: str) -> Family:
    """Return the family of a diffusers class; raises ModelError when it is not supported."""
    for family in families():
        if family.class_name == class_name:
            return family
    known = ", ".join(sorted(family.class_name for family in families()))
    raise ModelError(f"denoiser class {class_name!r} is not supported", hint=f"supported: {known}")


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
