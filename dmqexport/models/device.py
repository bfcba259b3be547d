"""Where the float model runs while it is calibrated, and in which precision; everywhere else it lies on the CPU.

Callers hand tensors in and get them back on whatever device theirs are; only what hooks inside the denoiser see lies on
its device.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dmqexport.errors import BackendMissingError

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` names; auto: the first CUDA device, else the CPU.

    Raises BackendMissingError for a CUDA device that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(re.fullmatch(r"cuda(?::(\d+))?", name)[1] or 0)  # type: ignore[index]  # the recipe checked it
    if number < count:
        return torch.device("cuda", number)
    built = "was built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) sees {count}"
    raise BackendMissingError(
        f"--device (calibration.device) is {name!r}, and torch {torch.__version__} {built}",
        hint="--device cpu, or install the CUDA build of torch: https://pytorch.org/get-started/locally",
    )


@contextmanager
def on_device(denoiser: nn.Module, pipeline: Any, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Have `denoiser` and the other networks of `pipeline` on `device` inside the block, and on the CPU again after it.

    A block within a block changes nothing. dtype: what the denoiser's matrix products and convolutions compute in, by
    torch.autocast; its weights, inputs and outputs stay float32 whatever that is. The caller's tensors may lie
    anywhere.
    """
    moved = device.type != "cpu"
    inside = moved and next(denoiser.parameters()).device == device  # a block within a block
    if inside or (not moved and dtype == torch.float32):
        yield
        return
    open_casts: list[Any] = []
    origins: list[torch.device] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        origins.append(device if first is None else first.device)
        if dtype != torch.float32:
            cast = torch.autocast(device.type, dtype=dtype)
            cast.__enter__()  # type: ignore[no-untyped-call]  # torch's own
            open_casts.append(cast)
        arguments, named = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return arguments, named

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        origin = origins.pop()
        if open_casts:
            open_casts.pop().__exit__(None, None, None)
        return tree_map(lambda leaf: _returned(leaf, origin) if isinstance(leaf, Tensor) else leaf, output)

    networks = {part for part in getattr(pipeline, "components", {}).values() if isinstance(part, nn.Module)}
    networks.add(denoiser)
    handles = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        denoiser.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    try:
        for network in networks if moved else ():
            network.to(device)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for network in networks if moved else ():
            network.to("cpu")


def _returned(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.to(device)
    return tensor.float() if tensor.is_floating_point() else tensor
