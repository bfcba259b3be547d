"""The blocks of a denoiser in execution order: the units that block-wise distillation trains one after another.

A block is the innermost module that calls itself one (`ResnetBlock2D`, `BasicTransformerBlock`, a DiT's `...Block`), an
attention outside of any, or a lone layer between them (`conv_in`, a down- or upsampling convolution, `proj_in`, the
layers of the time embedding). It needs no list of model families: class names and one observed forward decide.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calib.probe import removing
from dmqexport.errors import CalibrationError

_BLOCK = re.compile(r"Block|Resnet|ResNet")
_ATTENTION = re.compile(r"Attention|Attn")
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Block:
    """A module that runs once in every forward. layers: the planned layers that run within it, in execution order."""

    name: str
    layers: tuple[str, ...]


def find_blocks(
    denoiser: nn.Module, run: Callable[[], object], planned: Collection[str], units: Collection[str] = ()
) -> tuple[Block, ...]:
    """Return the blocks of `denoiser` in the order in which `run()`, one forward, reaches them.

    units: names of the modules that are blocks, where class names do not tell. Blocks never nest; one without planned
    layers is listed too, since its output can be replayed. Raises CalibrationError when a layer of `planned` does not
    run, or runs outside of every block more than once.
    """
    names = {id(module): name for name, module in denoiser.named_modules()}
    events: list[tuple[str, bool]] = []

    def enter(module: nn.Module, args: Any) -> None:
        events.append((names[id(module)], True))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        events.append((names[id(module)], False))

    handles: list[Any] = []
    for module in denoiser.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with removing(handles), torch.no_grad():
        run()
    calls: dict[str, int] = {}
    for name, entered in events:
        calls[name] = calls.get(name, 0) + entered
    once = {name for name, count in calls.items() if count == 1}
    candidates = _candidates(denoiser, once, set(planned), set(units))
    found = _outermost(events, candidates, set(planned))
    _check(found, planned, calls)
    return tuple(Block(name, tuple(layers)) for name, layers in found.items())


def _candidates(denoiser: nn.Module, once: set[str], planned: set[str], units: set[str]) -> set[str]:
    """Modules that may be a block: they ran once, and hold no block of their own."""
    modules = {name: module for name, module in denoiser.named_modules() if name in once and name}
    layers = {name for name, module in modules.items() if name in planned or isinstance(module, _LAYERS)}
    if units:
        return (units & once) | layers
    composite = {name: type(module).__name__ for name, module in modules.items() if name not in layers}
    blocks = {name for name, kind in composite.items() if _BLOCK.search(kind)}
    blocks -= _ancestors(blocks)
    attentions = {name for name, kind in composite.items() if _ATTENTION.search(kind)}
    attentions -= _ancestors(blocks | attentions)
    # `Transformer2DModel` holds a block, `TimestepEmbedding` is none: their layers stand alone.
    holding = {name for name in blocks | attentions if any(layer.startswith(f"{name}.") for layer in layers)}
    return holding | layers


def _ancestors(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return found


def _outermost(events: list[tuple[str, bool]], candidates: set[str], planned: set[str]) -> dict[str, list[str]]:
    """Candidates that no other one was running around, with the planned layers that ran inside them."""
    found: dict[str, list[str]] = {}
    active: str | None = None
    for name, entered in events:
        if not entered:
            active = None if name == active else active
            continue
        if active is None and name in candidates:
            active = name
            found[name] = []
        if active is not None and name in planned:
            found[active].append(name)
    return found


def _check(found: dict[str, list[str]], planned: Collection[str], calls: dict[str, int]) -> None:
    owners: dict[str, set[str]] = {}
    for block, layers in found.items():
        for layer in layers:
            owners.setdefault(layer, set()).add(block)
        if len(set(layers)) != len(layers):
            repeated = next(layer for layer in layers if layers.count(layer) > 1)
            raise CalibrationError(
                f"layer {repeated!r} runs {calls[repeated]} times in block {block!r}, a quantized layer must run once",
                hint="leave it in float: quantization.keep_float",
            )
    for layer in planned:
        count = len(owners.get(layer, ()))
        if count != 1:
            times = calls.get(layer, 0)
            where = f"in {count} blocks" if count else "outside of every block"
            raise CalibrationError(
                f"layer {layer!r} runs {times} times in one forward, {where}; expected once, in one block",
                hint="leave it in float (quantization.keep_float), or train without blocks",
            )
