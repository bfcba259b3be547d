"""Run only what lies downstream of one module: everything that finished before it gives back what it gave before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calib.probe import removing


class Replay:
    """The module outputs of one forward, and forwards that start in its middle.

    Modules that run several times a forward, or whose output is changed in place afterwards, are always run anew; so
    are functional calls between modules. What comes out is bit for bit what a whole forward gives.
    """

    def __init__(self, denoiser: nn.Module, run: Callable[[], Tensor]) -> None:
        """Record one forward, `run()`. Memory: every module output once."""
        self._denoiser = denoiser
        self._run = run
        self._outputs: dict[str, Any] = {}
        self._started: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        clock = 0
        calls: dict[str, int] = {}
        versions: dict[str, list[int]] = {}

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                nonlocal clock
                clock += 1
                self._started.setdefault(name, clock)

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                nonlocal clock
                clock += 1
                calls[name] = calls.get(name, 0) + 1
                self._ended[name] = clock
                self._outputs[name] = output
                versions[name] = [tensor._version for tensor in _tensors(output)]

            return hook

        modules = [(name, module) for name, module in denoiser.named_modules() if name]
        handles: list[Any] = [module.register_forward_pre_hook(before(name)) for name, module in modules]
        handles += [module.register_forward_hook(after(name)) for name, module in modules]
        with removing(handles), torch.no_grad():
            self.output = run()
        for name, output in list(self._outputs.items()):
            changed = versions[name] != [tensor._version for tensor in _tensors(output)]
            if changed or calls[name] > 1:
                del self._outputs[name]

    def downstream_of(self, name: str) -> Tensor:
        """The model's output, run from module `name` on; whatever now sits at `name` (a swapped module) is run."""
        with self._cached(self._started[name]), torch.no_grad():
            return self._run()

    @contextmanager
    def _cached(self, start: int) -> Iterator[None]:
        patched: list[nn.Module] = []
        try:
            for name, output in self._outputs.items():
                if self._ended[name] < start:
                    module = self._denoiser.get_submodule(name)
                    # An instance attribute hides the method of the class until it is deleted.
                    module.forward = _constant(output)
                    patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward


def _constant(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor in a module's output, which may be nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in _tensors(value)]
    return []
