"""A second device for machines that have none: tensors that compute on the CPU and mix with its own as CUDA's would.

What must not meet does not: an operator on tensors of both devices raises as torch does, but for zero-dimensional CPU
tensors; so does reading the memory of one in numpy. Values are real, so that results can be compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # torch runs on it without a driver; here it holds values
_COPY = torch.ops.aten._to_copy.default
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")


class PretendTensor(Tensor):
    """A tensor of the pretended device; `held` holds its values."""

    held: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor) -> "PretendTensor":
        made = Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = real
        return made

    def tolist(self) -> Any:
        """Of every device."""
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"pretend({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made on the pretended device, or moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if given.get("device") is not None or any(
            isinstance(leaf, PretendTensor) for leaf in tree_leaves((args, given))
        ):
            return _computed(func, args, given)
        return func(*args, **given)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = any(isinstance(leaf, PretendTensor) for leaf in leaves)
    target = kwargs.get("device")
    name = func.__name__.partition(".")[0]
    if here and func is not _COPY and name not in ("copy_", *_INDEXING):
        strangers = [leaf for leaf in leaves if not isinstance(leaf, PretendTensor) and leaf.ndim > 0]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found the pretended one and cpu, in {func}: "
                f"{[tuple(leaf.shape) for leaf in strangers]}"
            )
    if name in _INDEXING and not isinstance(args[0], PretendTensor) and here:
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor, in {func}")
    stays = here if target is None else torch.device(target) == DEVICE
    plain = {**kwargs, **({"device": torch.device("cpu")} if target is not None else {})}
    real_args, real_kwargs = tree_map(
        lambda leaf: leaf.held if isinstance(leaf, PretendTensor) else leaf, (args, plain)
    )
    result = func(*real_args, **real_kwargs)
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Tensor):
        return args[0]
    by_real = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, PretendTensor)}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not stays:
            return leaf
        return by_real.get(id(leaf)) if id(leaf) in by_real else PretendTensor(leaf)

    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(wrapped, result)


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """The pretended device, inside the block."""
    with _Factories():
        yield DEVICE
