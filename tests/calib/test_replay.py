"""A forward that starts in the middle gives bit for bit what a whole one gives."""

import pytest
import torch
from torch import Tensor, nn

from calib.replay import Replay


class Chain(nn.Module):
    """Blocks in blocks, a skip, a module that runs twice, and one whose output is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.twice = nn.Linear(4, 4)
        self.spoilt = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 4)))
        self.last = nn.Linear(4, 4)
        self.runs: list[str] = []
        for name, module in self.named_children():
            module.register_forward_pre_hook(lambda module, args, name=name: self.runs.append(name))

    def forward(self, sample: Tensor) -> Tensor:
        skip = self.first(sample)
        hidden = self.twice(torch.tanh(self.twice(skip)))
        hidden = self.spoilt(hidden).add_(1.0)
        return self.last(self.block(hidden) + skip)


NAMES = ("first.0", "first", "spoilt", "block", "block.0", "block.1.1", "last")


@pytest.mark.parametrize("name", NAMES)
def test_replaying_with_a_changed_module_is_running_it_all(name: str) -> None:
    torch.manual_seed(0)
    model, sample = Chain(), torch.randn(3, 4)
    replay = Replay(model, lambda: model(sample))
    assert torch.equal(replay.downstream_of(name), replay.output)
    original = model.get_submodule(name)
    replacement = nn.Sequential(original, nn.Hardtanh(-0.1, 0.1))
    model.set_submodule(name, replacement)
    found = replay.downstream_of(name)
    with torch.no_grad():
        expected = model(sample)
    assert torch.equal(found, expected)
    assert not torch.equal(found, replay.output)
    model.set_submodule(name, original)
    assert torch.equal(replay.downstream_of(name), replay.output)


def test_only_what_lies_downstream_runs_and_nothing_stays_patched() -> None:
    model, sample = Chain(), torch.randn(3, 4)
    replay = Replay(model, lambda: model(sample))
    model.runs.clear()
    calls: list[str] = []
    handle = model.block[0].register_forward_hook(lambda *_: calls.append("block.0"))
    replay.downstream_of("last")
    assert calls == []
    assert not [module for module in model.modules() if "forward" in vars(module)]
    replay.downstream_of("block.0")
    assert calls == ["block.0"]
    handle.remove()


def test_patches_go_when_the_forward_fails() -> None:
    model, sample = Chain(), torch.randn(3, 4)
    replay = Replay(model, lambda: model(sample))
    original, model.last = model.last, nn.Linear(5, 5)
    with pytest.raises(RuntimeError):
        replay.downstream_of("last")
    model.last = original
    assert not [module for module in model.modules() if "forward" in vars(module)]
