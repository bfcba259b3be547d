"""An architecture at full size with seeded random weights: the same code after loading, and no model hub.

What can be judged on such a model is time, memory, disk, exactness and precision, not pictures.
"""

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dmqexport.errors import BackendMissingError, ModelError, ResourceError
from dmqexport.models.locate import Located
from dmqexport.models.own_classes import model_class
from dmqexport.models.presets import PRESETS

CONFIG: Final = "config.json"
#: Part of a model's fingerprint: raise it when the same seed gives other weights.
VERSION: Final = f"random weights 1, torch {torch.__version__}"
_NORM_SPREAD: Final = 0.1
_BIAS_SPREAD: Final = 0.02
_LARGE: Final = 2**18  # values; smaller weights are kept in memory whatever is asked for


def locate_architecture(model: str) -> Located:
    """Where the configs of denoiser and scheduler lie: those of a preset, or the folder `model`.

    Raises ModelError where there is neither, and for the folder of a whole pipeline, whose parts would not all be
    random.
    """
    place, preset = Path(str(files("dmqexport.models"))) / "configs" / model, PRESETS.get(model)
    if preset is not None and (place / CONFIG).is_file():
        return Located(preset.name, place, preset)
    folder = Path(model)
    if (folder / CONFIG).is_file():
        return Located(folder.resolve().name, folder, None)
    what = "is a whole pipeline" if (folder / "model_index.json").is_file() else "is not at hand as a configuration"
    raise ModelError(
        f"{model!r} {what}, so it cannot be given random weights",
        hint=f"--weights random works with {', '.join(architectures())}, and with the folder of a denoiser's config",
    )


def architectures() -> tuple[str, ...]:
    """Names of the presets whose architecture ships with the package."""
    root = Path(str(files("dmqexport.models"))) / "configs"
    return tuple(sorted(path.parent.name for path in root.glob(f"*/{CONFIG}")))


def random_denoiser(config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The denoiser of a diffusers config with weights drawn from `seed`, float32, eval, without gradients.

    Raises BackendMissingError where the installed diffusers lacks its class, ResourceError where memory does not hold
    the weights.
    """
    try:
        denoiser = build_denoiser(config)
        fill_randomly(denoiser, seed)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise ResourceError("not enough memory for the weights of this model", hint="close other programs") from error
    return denoiser


def absent_denoiser(config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """As `random_denoiser`, but the large weights of layers take no memory: they lie on the meta device.

    `drawn_weight` makes any of them when it is needed, and the same as `random_denoiser` has. Such a module can be
    exported, counted and quantized layer by layer, not run. Raises as `random_denoiser` does.
    """
    with _Absent():
        denoiser = _made(config)
    for name, parameter in list(denoiser.named_parameters()):
        owner, leaf = _place(denoiser, name)
        if not (isinstance(owner, nn.Conv2d | nn.Linear) and leaf == "weight" and parameter.numel() >= _LARGE):
            owner.register_parameter(leaf, nn.Parameter(drawn_weight(denoiser, name, seed), requires_grad=False))
    return denoiser.eval().requires_grad_(requires_grad=False)


def drawn_weight(module: nn.Module, name: str, seed: int = 0) -> Tensor:
    """Parameter `name` of `module` as `fill_randomly` draws it, float32, wherever its own lies."""
    parameter = torch.empty(module.get_parameter(name).shape)
    _draw(module, name, parameter, seed)
    return parameter


def build_denoiser(config: Mapping[str, Any], device: str = "cpu") -> nn.Module:
    """The module of a diffusers config, float32, eval, without gradients, weights as its class initialises them.

    device: "meta" allocates nothing: parameters and shapes can be counted. Raises BackendMissingError where the
    installed diffusers has no such class, ModelError where the class refuses the config.
    """
    with torch.device(device):
        return _made(config).eval().requires_grad_(False)


def _made(config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    name = str(config.get("_class_name"))
    kind: Any = model_class(name)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise BackendMissingError(
            f"diffusers {diffusers.__version__} has no denoiser class {name!r}", hint="pip install --upgrade diffusers"
        )
    try:
        module: nn.Module = kind.from_config(dict(config))  # type: ignore[attr-defined]  # every ModelMixin has it
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name} refuses its configuration: {error}") from error
    return module


class _Absent(TorchFunctionMode):
    """Modules made meanwhile have their weights on the meta device, and buffers, which are computed, in memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.empty and given.get("device") is None:  # how torch's layers make their parameters
            given = {**given, "device": "meta"}
        return func(*args, **given)


def fill_randomly(module: nn.Module, seed: int) -> None:
    """Draw every parameter of `module` anew, in place; each from a stream of its own, so that order does not matter.

    Matrices and kernels are normal with variance 1 / fan_in, which hands a layer's input variance on to its output;
    norms scale by about one. Networks that normalise ahead of every branch, as all of these do, then neither explode
    nor die.
    """

    def draw(item: tuple[str, Tensor]) -> None:
        _draw(module, item[0], item[1].detach(), seed)  # threads have a gradient mode of their own

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, module.named_parameters()))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf


def _draw(module: nn.Module, name: str, parameter: Tensor, seed: int) -> None:
    """Fill `parameter`, in the role of parameter `name` of `module`, from a stream of its own."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))  # it takes 32 bits
    owner, leaf = _place(module, name)
    if isinstance(owner, nn.Embedding) and leaf == "weight":
        parameter.normal_(0.0, 1.0, generator=generator)
    elif parameter.ndim >= 2:
        parameter.normal_(0.0, (parameter.numel() / parameter.shape[0]) ** -0.5, generator=generator)
    elif leaf.endswith("weight"):
        parameter.normal_(1.0, _NORM_SPREAD, generator=generator)
    else:
        parameter.normal_(0.0, _BIAS_SPREAD, generator=generator)
