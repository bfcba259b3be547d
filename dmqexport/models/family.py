"""What the pipeline must know of a denoiser family, and the registry that finds it by diffusers class name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from calib.sampling import timestep_keys
from dmqexport.errors import ModelError
from dmqexport.models.own_classes import model_class

Config = Mapping[str, Any]
"""A denoiser's diffusers config."""

ADAPTER: Final = "Adapter"
"""What stands where a diffusers denoiser has its class name, for a module that its user adapted."""

NOT_NESTED: Final[Mapping[str, str]] = MappingProxyType({})
"""`nested` of a family whose inputs are all arguments of their own."""


class Family(Protocol):
    """One denoiser architecture, as one config makes it. A new family is one file and one line in `_REGISTRY`.

    A family is made with (config, size): size is the (height, width) of the latents, None for the config's own. Making
    it raises ModelError for a variant of the architecture that is not supported.
    """

    #: diffusers class name of the denoiser.
    class_name: str
    #: folder of the component in a pipeline and in the bundle.
    component: str
    #: names of the forward's tensor inputs, in order, the sample first; the graph's input names.
    input_names: tuple[str, ...]
    #: the parameters of the diffusers forward in the order in which they may be passed by position.
    positional: tuple[str, ...]
    #: input → keyword argument of the diffusers forward, a dictionary, that holds it.
    nested: Mapping[str, str]
    #: arguments that pipelines pass and the graph does not take, since they follow from the shapes.
    implied: frozenset[str]
    #: condition inputs that seeded noise can stand in for, where nothing encodes a prompt.
    embeddings: tuple[str, ...]
    #: whether timesteps are floats (flow matching) rather than indices.
    float_timestep: bool
    #: what a timestep is multiplied by before it is rounded to its key in the timestep table.
    timestep_scale: float
    #: modules that are distilled as one unit; empty: found by their class names.
    blocks: tuple[str, ...]
    #: input → axis → name, of axes beside the batch that may vary at run time.
    dynamic_axes: Mapping[str, Mapping[int, str]]
    #: whether the forward returns its prediction alone, not as diffusers does.
    returns_tensor: bool
    #: glob patterns of the layers that stay at 8 bit (first, last, time embedding).
    boundary: tuple[str, ...]
    #: glob patterns of those of them that project the time embedding, for all blocks or one: what they read is a curve.
    time_projections: tuple[str, ...]
    #: glob patterns of the layers that read what is denoised.
    first_layers: tuple[str, ...]
    #: channels of the prediction that steer sampling; what exceeds them is a learned variance.
    prediction_channels: int | None
    #: the condition that means none, in models conditioned on a class; None without classes.
    null_class: int | None

    def planes(self, sample: Tensor) -> Tensor:
        """`sample` [n, ...] as pictures [n, C, H, W]."""
        ...

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Random inputs of the right shapes, seeded, `timestep` [batch]; `tokens` long where text enters."""
        ...

    def is_index(self, name: str) -> bool:
        """Whether input `name` holds integers (int64); the others are float32."""
        ...

    def call(self, denoiser: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call `denoiser`, float or not, with `inputs` by name as a pipeline would; returns the prediction tensor."""
        ...

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """A module whose forward takes `input_names` and returns the prediction tensor alone; keeps `denoiser`."""
        ...


class DiffusersFamily:
    """What most families have in common."""

    nested: Mapping[str, str] = NOT_NESTED
    implied: frozenset[str] = frozenset()
    embeddings: tuple[str, ...] = ()
    float_timestep = False
    timestep_scale = 1.0
    prediction_channels: int | None = None
    null_class: int | None = None
    blocks: tuple[str, ...] = ()
    dynamic_axes: Mapping[str, Mapping[int, str]] = MappingProxyType({})
    returns_tensor = False
    time_projections: tuple[str, ...] = ()
    first_layers: tuple[str, ...] = ()

    def planes(self, sample: Tensor) -> Tensor:
        """The sample itself: it is a picture, or latents laid out as one."""
        return sample

    def implied_arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments named in `implied`: none."""
        return {}

    def is_index(self, name: str) -> bool:
        """Classes and timesteps are indices, unless time is continuous."""
        return name == "class_labels" or (name == "timestep" and not self.float_timestep)

    def call(self, denoiser: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """With nested inputs in their dictionary and implied arguments computed."""
        plain = {name: value for name, value in inputs.items() if name not in self.nested}
        containers: dict[str, dict[str, Tensor]] = {}
        for name, container in self.nested.items():
            if name in inputs:
                containers.setdefault(container, {})[name] = inputs[name]
        implied = self.implied_arguments(inputs)
        prediction: Tensor = denoiser(**plain, **containers, **implied, return_dict=False)[0]
        return prediction


def _registry() -> dict[str, Callable[[Config, tuple[int, int] | None], Family]]:
    from dmqexport.models.adapter_family import AdapterFamily
    from dmqexport.models.dit import DiTFamily
    from dmqexport.models.flux import FluxFamily
    from dmqexport.models.pixart import PixArtFamily
    from dmqexport.models.sd3 import SD3Family
    from dmqexport.models.unet2d import FixedHeadsUNet2DFamily, UNet2DFamily
    from dmqexport.models.unet2d_condition import UNet2DConditionFamily

    return {
        ADAPTER: AdapterFamily,
        "UNet2DModel": UNet2DFamily,
        "FixedHeadsUNet2DModel": FixedHeadsUNet2DFamily,
        "UNet2DConditionModel": UNet2DConditionFamily,
        "DiTTransformer2DModel": DiTFamily,
        "Transformer2DModel": DiTFamily,  # the name under which DiT and PixArt were first published
        "PixArtTransformer2DModel": PixArtFamily,
        "SD3Transformer2DModel": SD3Family,
        "FluxTransformer2DModel": FluxFamily,
    }


def family_names() -> tuple[str, ...]:
    """The diffusers class names that are supported."""
    return tuple(name for name in _registry() if name != ADAPTER)


def check_family(class_name: str) -> None:
    """Raise ModelError when the diffusers class `class_name` is not supported."""
    if class_name not in _registry():
        known = ", ".join(sorted(family_names()))
        raise ModelError(
            f"denoiser class {class_name!r} is not supported",
            hint=f"supported: {known}; any other torch module through an adapter, -m package.module:factory",
        )


def family_of(class_name: str, config: Config, size: tuple[int, int] | None = None) -> Family:
    """The family of a diffusers class with this config; raises ModelError when it is not supported."""
    check_family(class_name)
    if class_name != ADAPTER:
        config = {**_defaults(class_name), **config}
    if class_name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        class_name = "PixArtTransformer2DModel"
    return _registry()[class_name](config, size)


@cache
def _defaults(class_name: str) -> Config:
    """What diffusers takes for the keys that a config.json leaves out."""
    parameters = inspect.signature(model_class(class_name).__init__).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}


def bind_call(family: Family, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The family's inputs out of a call of the diffusers forward, one-element vectors spread over the batch.

    Optional arguments may be there as long as they are None or implied by the shapes. Raises ModelError for an input
    that is missing or given twice and for an argument that the graph has no input for.
    """
    given = dict(zip(family.positional, args, strict=False))
    twice = [name for name in kwargs if name in given]
    # Optional arguments may follow by position too, as long as they are not used.
    if twice or any(value is not None for value in args[len(family.positional) :]):
        what = f"{twice} is given twice" if twice else f"{len(args)} positional arguments"
        raise ModelError(f"{what}; the inputs of this denoiser are {list(family.input_names)}")
    given.update(kwargs)
    for container in set(family.nested.values()):
        given.update(given.pop(container, None) or {})
    named = {name: given.pop(name) for name in family.input_names if given.get(name) is not None}
    implied = family.implied | {"return_dict"}
    extra = [name for name, value in given.items() if not _is_none(value) and name not in implied]
    if extra:
        raise ModelError(
            f"this denoiser has no input for {extra}; its inputs are {list(family.input_names)}",
            hint="ControlNet residuals, added conditions and the like need a graph exported with them",
        )
    missing = [name for name in family.input_names if name not in named]
    if missing:
        raise ModelError(f"input {', '.join(map(repr, missing))} is missing, got {sorted(named)}")
    batch = named[family.input_names[0]].shape[0]
    return {name: _typed(family, name, _spread(name, value, batch)) for name, value in named.items()}


def _is_none(value: Any) -> bool:
    """Pipelines also pass dictionaries of nothing (`added_cond_kwargs`, `cross_attention_kwargs`)."""
    return value is None or (isinstance(value, Mapping) and all(_is_none(item) for item in value.values()))


def table_keys(family: Family, timestep: Tensor) -> Tensor:
    """int64 [batch], the keys of the timestep table for the family's timesteps."""
    return timestep_keys(timestep, family.timestep_scale)


def _spread(name: str, value: Any, batch: int) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.ndim <= 1 and tensor.numel() == 1:
        tensor = tensor.reshape(1).expand(batch)
    if tensor.shape[0] != batch:
        raise ModelError(f"{tensor.shape[0]} {name}s for a batch of {batch}")
    return tensor


def _typed(family: Family, name: str, tensor: Tensor) -> Tensor:
    """Timesteps as the family counts them, masks as floats; every other tensor as it came."""
    if name == "timestep" and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ModelError(f"timestep {tensor.tolist()} is not finite")
    if family.is_index(name):
        return (tensor.round() if tensor.is_floating_point() else tensor).to(torch.int64)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)
