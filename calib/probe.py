"""One float forward that finds what can be quantized: layers, shared inputs, concat readers, attentions."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerOp


@dataclass(frozen=True)
class LayerInfo:
    """A quantizable layer as the probe saw it.

    segments: slices of the input channels, more than one where the layer reads a concat; source: name of the first
    layer that reads the very same tensor (itself if none); macs: multiply-accumulates for one sample.
    """

    name: str
    op: LayerOp
    segments: tuple[tuple[int, int], ...]
    source: str
    timestep_dependent: bool
    parameters: int
    macs: int


@dataclass(frozen=True)
class ProbeResult:
    """Layers and attentions in execution order, and why each other parametric layer stays in float."""

    layers: tuple[LayerInfo, ...]
    attentions: tuple[str, ...]
    unsupported: Mapping[str, str]


def layer_op(module: nn.Module) -> LayerOp | None:
    """Return the operator a module becomes, None if this toolchain does not quantize it."""
    if isinstance(module, nn.Conv2d):
        return LayerOp.CONV
    if isinstance(module, nn.Linear):
        return LayerOp.LINEAR
    return None


class ModuleStack:
    """Knows, during a forward, which module is running (for functional calls that carry no name)."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.names: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "ModuleStack":
        for name, module in self._root.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._push(name)))
            self._handles.append(module.register_forward_hook(self._pop, always_call=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _push(self, name: str) -> Callable[[nn.Module, Any], None]:
        def push(module: nn.Module, args: Any) -> None:
            self.names.append(name)

        return push

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.names:
            self.names.pop()

    @property
    def current(self) -> str:
        """Name of the innermost running module."""
        return self.names[-1] if self.names else ""


class AttentionMode(TorchFunctionMode):
    """Hands every scaled_dot_product_attention to `replace(name, query, key, value, kwargs)`.

    A function mode sees the call whatever attention processor the model uses.
    """

    def __init__(self, stack: ModuleStack, replace: "AttentionFunction") -> None:
        super().__init__()
        self._stack = stack
        self._replace = replace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            bound = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            query, key, value = (bound.pop(name) for name in names[:3])
            return self._replace(self._stack.current, query, key, value, bound)
        return func(*args, **(kwargs or {}))


AttentionFunction = Callable[[str, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


class _Identities:
    """Tells whether two tensors hold the same values, without keeping either: memory that is freed and taken again is
    another one."""

    def __init__(self) -> None:
        self._serial: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._count = 0

    def of(self, tensor: Tensor) -> tuple[Any, ...]:
        """Equal for two tensors of one memory, with the same order and count of in-place changes."""
        storage = tensor.untyped_storage()
        if storage not in self._serial:
            self._count += 1
            self._serial[storage] = self._count
        place = self._serial[storage], tensor.storage_offset()
        return *place, tuple(tensor.shape), tensor.stride(), tensor._version


class _ConcatMode(TorchFunctionMode):
    """Remembers the channel sizes of every channel concat."""

    def __init__(self, identities: _Identities) -> None:
        super().__init__()
        self._identities = identities
        self.concats: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat):
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            parts = args[0] if args else (kwargs or {})["tensors"]
            if result.ndim == 4 and dim in (1, -3):
                self.concats[self._identities.of(result)] = tuple(int(part.shape[1]) for part in parts)
        return result


def _checksum(tensor: Tensor, index: int) -> int:
    """Not torch.hash_tensor: values that repeat, as an upsampler's do, cancel in its exclusive or."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).cpu().numpy().data)


def probe(
    denoiser: nn.Module, run: Callable[[int], Any], checksum: Callable[[Tensor, int], int] = _checksum
) -> ProbeResult:
    """Run the float denoiser twice and report what can be quantized.

    `run(index)` must run one forward; index 0 and 1 must differ in timestep and sample and in nothing else, so that a
    tensor equal in both does not depend on the timestep. checksum: (tensor, index) → what equal tensors have in common.
    Raises CalibrationError when nothing quantizable ran.
    """
    checksums: list[dict[str, int]] = [{}, {}]
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    attentions: list[str] = []
    unsupported: dict[str, str] = {}
    known = _Identities()
    concat_mode = _ConcatMode(known)
    calls: dict[str, int] = {}
    identities: dict[str, tuple[Any, ...]] = {}
    attended: dict[str, int] = {}

    def observe(name: str, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            checksums[index][name] = checksum(args[0], index)
            if index == 0:
                identities[name] = known.of(args[0])
                shapes[name] = (args[0].shape, output.shape)
                calls[name] = calls.get(name, 0) + 1

        return hook

    def attend(name: str, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        attended[name] = attended.get(name, 0) + 1
        if extra.get("attn_mask") is not None or extra.get("is_causal"):
            unsupported[name] = "masked attention stays in float"
        elif name not in attentions:
            attentions.append(name)
        return F.scaled_dot_product_attention(query, key, value, **extra)

    names = {name: op for name, module in denoiser.named_modules() if (op := layer_op(module)) is not None}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            del names[name]
            unsupported[name] = f"padding_mode {module.padding_mode!r}: quantized convolutions pad with zeros"
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Embedding):
            unsupported[name] = "embedding lookup: no multiplication to quantize"
        elif isinstance(module, (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d)):
            unsupported[name] = f"{type(module).__name__} is not a supported operator"
    for index in (0, 1):
        handles = [denoiser.get_submodule(name).register_forward_hook(observe(name, index)) for name in names]
        with removing(handles), torch.no_grad(), ModuleStack(denoiser) as stack:
            if index == 0:
                with concat_mode, AttentionMode(stack, attend):
                    run(index)
            else:
                run(index)
    for name in sorted(set(names) - set(shapes)):
        unsupported[name] = "never ran during the forward"
    for name, count in attended.items():
        if count > 1 and name in attentions:
            attentions.remove(name)
            unsupported[name] = f"attends {count} times in one forward: its uses may need different ranges"
    repeated = [name for name, count in calls.items() if count > 1]
    for name in repeated:
        unsupported[name] = f"called {calls[name]} times in one forward: its uses may need different ranges"
    layers = _layers(denoiser, names, shapes, checksums, identities, concat_mode, set(repeated))
    if not layers:
        raise CalibrationError("the model has no Conv2d or Linear that ran: nothing to quantize")
    return ProbeResult(tuple(layers), tuple(attentions), unsupported)


def _layers(
    denoiser: nn.Module,
    names: Mapping[str, LayerOp],
    shapes: Mapping[str, tuple[torch.Size, torch.Size]],
    checksums: list[dict[str, int]],
    identities: Mapping[str, tuple[Any, ...]],
    concat_mode: _ConcatMode,
    skip: set[str],
) -> list[LayerInfo]:
    first_reader: dict[tuple[Any, ...], str] = {}
    layers = []
    for name, (shape, output) in shapes.items():
        if name in skip:
            continue
        weight = denoiser.get_submodule(name).get_parameter("weight")
        channels = int(shape[1] if names[name] is LayerOp.CONV else shape[-1])
        segments: tuple[tuple[int, int], ...] = ((0, channels),)
        module = denoiser.get_submodule(name)
        grouped = isinstance(module, nn.Conv2d) and module.groups != 1
        identity = identities[name]
        if identity in concat_mode.concats and not grouped and names[name] is LayerOp.CONV:
            sizes = concat_mode.concats[identity]
            edges = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
            segments = tuple(pairwise(edges))
        positions = output.numel() // output[0] // weight.shape[0]
        layers.append(
            LayerInfo(
                name=name,
                op=names[name],
                segments=segments,
                source=first_reader.setdefault((identity, segments), name),
                timestep_dependent=checksums[0][name] != checksums[1][name],
                parameters=weight.numel(),
                macs=positions * weight.numel(),
            )
        )
    return layers


@contextmanager
def removing(handles: list[Any]) -> Iterator[None]:
    """Remove hook handles when the block ends, however it ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
