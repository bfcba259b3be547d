"""What the pipeline must know of a denoiser family, and the registry that finds it by diffusers class name."""

from typing import Protocol

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
