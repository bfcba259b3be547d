"""What a denoiser costs, counted without weights and without running it: parameters, multiplications, live memory."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmqexport.errors import ModelError
from dmqexport.models.family import Family

_BYTES = 4  # of float32


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer, for one sample.

    weight: shape of its weight; input_shape: without the batch; positions: outputs a channel; stride, padding: of a
    convolution.
    """

    name: str
    weight: tuple[int, ...]
    input_shape: tuple[int, ...]
    positions: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    @property
    def convolution(self) -> bool:
        """Whether it is one."""
        return len(self.weight) == 4

    @property
    def parameters(self) -> int:
        """Of the weight."""
        return math.prod(self.weight)

    @property
    def width(self) -> int:
        """Inputs of one output."""
        return math.prod(self.weight[1:])

    @property
    def inputs(self) -> int:
        """Values that it reads."""
        return math.prod(self.input_shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.positions * self.parameters

    @property
    def outputs(self) -> int:
        """Values of the result."""
        return self.positions * self.weight[0]


@dataclass(frozen=True)
class Footprint:
    """Costs of one denoiser, those of activations for one sample.

    parameters: all of them. macs: layers and attention. live_bytes: the most that is alive at once in a float32
    forward of torch, whose attention is one operation; graph_bytes: of exported graphs, which compute attention as two
    matrix products. calls: operators of a forward. entry_bytes: the inputs of one call, conditions included.
    """

    parameters: int
    macs: int
    live_bytes: int
    graph_bytes: int
    calls: int
    entry_bytes: int
    layers: tuple[LayerCost, ...]

    @property
    def weights(self) -> int:
        """Parameters of layers that can be quantized."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def output_bytes(self) -> int:
        """All layers' results together, float32."""
        return _BYTES * sum(layer.outputs for layer in self.layers)

    @property
    def input_values(self) -> int:
        """Values that all layers read, together."""
        return sum(layer.inputs for layer in self.layers)


def measure_footprint(denoiser: nn.Module, family: Family, tokens: int | None = None) -> Footprint:
    """Count the forward of `denoiser` on the meta device, wherever its weights lie: nothing is allocated or computed.

    Raises ModelError where a module cannot be traced so.
    """
    state = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    shadow = {name: value.detach().to("meta") for name, value in state.items()}
    inputs = {name: value.to("meta") for name, value in family.example_inputs(2, tokens).items()}

    def run(**arguments: Any) -> Any:
        return functional_call(denoiser, shadow, (), arguments, tie_weights=False, strict=False)

    layers: list[LayerCost] = []
    handles = [
        module.register_forward_hook(_counter(name, layers))
        for name, module in denoiser.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    memory = _LiveMemory(*shadow.values())
    attention = _Attention(memory)
    try:
        with torch.no_grad(), attention, memory:
            family.call(run, inputs)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ModelError(f"the forward of {family.class_name} cannot be counted: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return Footprint(
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        macs=sum(layer.macs for layer in layers) + attention.macs // 2,
        live_bytes=memory.most // 2,
        graph_bytes=max(memory.most, attention.most) // 2,
        calls=memory.calls,
        entry_bytes=sum(value.nbytes for value in inputs.values()) // 2,
        layers=tuple(layers),
    )


def count_macs(module: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of the layers of `module` for `example` [1, ...]; both on the meta device."""
    layers: list[LayerCost] = []
    parts = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    handles = [part.register_forward_hook(_counter("", layers)) for part in parts]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return sum(layer.macs for layer in layers)


def _counter(name: str, layers: list[LayerCost]) -> Callable[..., None]:
    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        weight: Any = module.weight  # a plain tensor while parameters are replaced
        samples, channels = int(output.shape[0]), int(weight.shape[0])
        stride: tuple[int, ...] = ()
        padding: tuple[int, ...] = ()
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
            stride, padding = tuple(module.stride), tuple(module.padding)
        layers.append(
            LayerCost(
                name=name,
                weight=tuple(int(size) for size in weight.shape),
                input_shape=tuple(int(size) for size in args[0].shape[1:]),
                positions=output.numel() // samples // channels,
                stride=stride,
                padding=padding,
            )
        )

    return count


class _LiveMemory(TorchDispatchMode):
    """Follows the bytes of all tensors that a forward makes, from birth to death of their storage."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.live = self.most = self.calls = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = int(storage.nbytes())
        self._known.add(storage)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


class _Attention(TorchFunctionMode):
    """Stands in for scaled_dot_product_attention: its result's shape, its cost, and what two products would hold."""

    def __init__(self, memory: _LiveMemory) -> None:
        super().__init__()
        self._memory = memory
        self.macs = self.most = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        query, key, value = (named[name] for name in ("query", "key", "value"))
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        self.macs += scores * (query.shape[-1] + value.shape[-1])
        self.most = max(self.most, self._memory.live + 2 * _BYTES * scores)
        return query.new_empty(*query.shape[:-1], value.shape[-1])
