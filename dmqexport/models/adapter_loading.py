"""From `-m package.module:factory` to a model that can be sampled, quantized and exported."""

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from dmqexport.adapter import Adapter
from dmqexport.errors import DmqExportError, ModelError
from dmqexport.models.adapter_family import AdapterFamily

_REFERENCE: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_DTYPES: Final = {torch.float32: "float32", torch.int64: "int64"}


def is_reference(model: str) -> bool:
    """Whether `model` has the form package.module:factory."""
    return _REFERENCE.fullmatch(model) is not None and not Path(model).exists()


def make_adapter(reference: str) -> Adapter:
    """Import the module (the working directory is searched too), call the factory and check what it returns.

    Raises ModelError that names what is wrong with the module, the factory or the adapter.
    """
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m package.module` does
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        adapter = factory()
    except DmqExportError:
        raise
    except ModuleNotFoundError as error:
        hint = f"it is looked for in {here} and in the installed packages" if error.name == module_name else None
        raise ModelError(f"{reference}: {error}", hint=hint) from error
    except AttributeError as error:
        raise ModelError(f"{reference}: {error}", hint="give package.module:factory") from error
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(f"{reference} failed: {type(error).__name__}: {error}") from error
    if not isinstance(adapter, Adapter):
        raise ModelError(
            f"{reference} returned {type(adapter).__name__}, expected dmqexport.adapter.Adapter",
            hint="`python -m pydoc dmqexport.adapter` is the manual",
        )
    _check(reference, adapter)
    return adapter


def _check(reference: str, adapter: Adapter) -> None:
    """Everything that would otherwise fail after calibration, or never."""

    def refuse(what: str, hint: str | None = None) -> ModelError:
        return ModelError(f"{reference}: {what}", hint=hint)

    if not isinstance(adapter.module, nn.Module):
        raise refuse(f"module is {type(adapter.module).__name__}, expected a torch module")
    names = list(adapter.inputs)
    if not names or names[0] == "timestep" or "timestep" not in names:
        raise refuse(f"inputs are {names}; expected the sample first and one called 'timestep'")
    batches = {name: tuple(value.shape)[:1] for name, value in adapter.inputs.items()}
    if len(set(batches.values())) != 1 or batches[names[0]] < (2,):
        raise refuse(f"example inputs have batches {batches}; expected one batch of at least 2")
    for name, value in adapter.inputs.items():
        if value.dtype not in _DTYPES:
            raise refuse(f"input {name!r} is {value.dtype}, expected float32 or int64")
    if adapter.inputs["timestep"].ndim != 1:
        raise refuse(f"timestep has shape {tuple(adapter.inputs['timestep'].shape)}, expected [batch]")
    if (adapter.scheduler is None) == (adapter.sample is None):
        raise refuse("give either a scheduler or a sample function", "a scheduler of diffusers drives the usual loop")
    accepted = inspect.signature(adapter.module.forward).parameters
    missing = [name for name in names if name not in accepted]
    if missing:
        raise refuse(f"forward takes {list(accepted)}, it has no {', '.join(map(repr, missing))}")
    layers = [name for name, part in adapter.module.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    for field, patterns in (("boundary", adapter.boundary), ("first_layers", adapter.first_layers)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise refuse(f"{field} pattern {pattern!r} matches no layer", f"layers are named like {layers[:3]}")
    modules = {name for name, _ in adapter.module.named_modules()}
    unknown = [name for name in adapter.blocks if name not in modules]
    if unknown:
        raise refuse(f"blocks names {unknown[0]!r}, which is no module")
    with torch.no_grad():
        try:
            output = adapter.module.eval()(**adapter.inputs)
        except Exception as error:  # the user's own code may raise anything
            raise refuse(f"forward fails on the example inputs: {type(error).__name__}: {error}") from error
    if not isinstance(output, Tensor) or output.shape[:1] != adapter.inputs[names[0]].shape[:1]:
        raise refuse(f"forward returned {_describe(output)}, expected one tensor [batch, ...]")


def _describe(output: object) -> str:
    return f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """The JSON from which `AdapterFamily` is made again."""
    return {
        "inputs": [
            {"name": name, "shape": list(value.shape[1:]), "dtype": _DTYPES[value.dtype]}
            for name, value in adapter.inputs.items()
        ],
        "boundary": list(adapter.boundary),
        "blocks": list(adapter.blocks),
        "first_layers": list(adapter.first_layers),
        "dynamic_axes": {
            name: {str(axis): label for axis, label in axes.items()} for name, axes in adapter.dynamic_axes.items()
        },
        "num_timesteps": adapter.num_timesteps,
        "timestep_scale": adapter.timestep_scale,
    }


def adapter_digest(adapter: Adapter) -> str:
    """sha256 over every parameter and buffer, and what the adapter says of them."""
    total = hashlib.sha256(repr(adapter_config(adapter)).encode())
    for name, tensor in adapter.module.state_dict().items():
        total.update(f"{name}\0{tensor.dtype}{tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    scheduler = adapter.scheduler
    total.update(("" if scheduler is None else f"{type(scheduler).__name__}{dict(scheduler.config)}").encode())
    return total.hexdigest()


class AdapterPipeline:
    """What sampling calls: the adapter's own sampler, or the usual loop with its scheduler and conditions."""

    def __init__(self, adapter: Adapter, family: AdapterFamily) -> None:
        self.denoiser: Any = adapter.module
        self.scheduler = adapter.scheduler
        self._adapter, self._family = adapter, family

    def register_modules(self, **modules: Any) -> None:
        """Replace the denoiser."""
        for name, module in modules.items():
            setattr(self, name, module)

    def set_progress_bar_config(self, **options: Any) -> None:
        """There is no progress bar."""

    def __call__(self, seeds: Sequence[int], num_inference_steps: int, guidance_scale: float) -> Any:
        """An object whose `.images` are pictures or samples, [n, C, H, W]."""
        from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

        adapter = self._adapter
        if adapter.sample is not None:
            samples = adapter.sample(
                lambda **inputs: self._family.call(self.denoiser, inputs), seeds, num_inference_steps, guidance_scale
            )
        else:
            samples = self._loop(seeds, num_inference_steps, guidance_scale)
        return ImagePipelineOutput(images=samples if adapter.decode is None else adapter.decode(samples))

    @property
    def decodes(self) -> bool:
        """Whether what comes out are pictures in [0, 1]."""
        return self._adapter.decode is not None

    def _loop(self, seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
        from dmqexport.models.denoising_loop import DenoisingLoop

        adapter, family = self._adapter, self._family
        loop = DenoisingLoop(family, self.denoiser, self.scheduler)
        loop.set_progress_bar_config(disable=True)
        samples: Tensor = loop(
            conditions=self._conditions(adapter.conditions, seeds),
            null_conditions=None if guidance <= 1 else self._conditions(adapter.null_conditions, [0] * len(seeds)),
            shape=tuple(adapter.inputs[family.input_names[0]].shape[1:]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance,
        ).images
        return samples

    def _conditions(self, given: Any, seeds: Sequence[int]) -> Mapping[str, Tensor]:
        names = [name for name in self._family.input_names[1:] if name != "timestep"]
        if given is not None:
            conditions: Mapping[str, Tensor] = given(seeds)
            missing = [name for name in names if name not in conditions]
            if missing:
                raise ModelError(f"the adapter's conditions lack {missing}: got {sorted(conditions)}")
            return {name: conditions[name] for name in names}
        shapes = self._family.example_inputs(1)
        return {name: torch.cat([self._draw(shapes[name], name, seed) for seed in seeds]) for name in names}

    def _draw(self, like: Tensor, name: str, seed: int) -> Tensor:
        if not like.is_floating_point():
            return like
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed ^ stream))
