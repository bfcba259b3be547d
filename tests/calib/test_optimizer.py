"""The optimizers of training: which parameters Muon moves, how far, and that its state can be saved."""

import copy

import pytest
import torch
from torch import nn

from calib.optimizer import ParameterGroup, StepOptimizer


def parameter(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    found = nn.Parameter(torch.randn(shape, generator=generator))
    # Nearly of rank one, as gradients are: Adam's step would be too.
    strong = torch.outer(torch.randn(shape[0], generator=generator), torch.randn(shape[-1], generator=generator))
    found.grad = 10 * strong.reshape(shape) + torch.randn(shape, generator=generator)
    return found


def moved(optimizer: StepOptimizer, one: nn.Parameter) -> torch.Tensor:
    before = one.detach().clone()
    optimizer.step()
    return one.detach() - before


def test_muon_moves_every_direction_of_a_matrix_alike() -> None:
    weight, other = parameter(24, 60), parameter(24, 60)
    step = moved(StepOptimizer([ParameterGroup([weight], 0.01, matrices=True)], [], 10, "muon"), weight)
    adam = moved(StepOptimizer([ParameterGroup([other], 0.01, matrices=True)], [], 10), other)
    found, usual = torch.linalg.svdvals(step), torch.linalg.svdvals(adam)
    assert found[0] < 2.5 * found[-1]
    assert usual[0] > 20 * usual[-1]
    # One rate serves both: the root mean square of a step is a part of it that does not depend on the shape.
    assert float(step.square().mean().sqrt()) == pytest.approx(0.4 * 0.01, rel=0.3)


@pytest.mark.parametrize("shape", [(24, 1), (1, 60)], ids=["depthwise", "one channel"])
def test_what_has_no_directions_is_moved_by_adam(shape: tuple[int, int]) -> None:
    weight, other = parameter(*shape), parameter(*shape)
    step = moved(StepOptimizer([ParameterGroup([weight], 0.01, matrices=True)], [], 10, "muon"), weight)
    assert torch.equal(step, moved(StepOptimizer([ParameterGroup([other], 0.01)], [], 10), other))


def test_biases_and_scales_are_moved_by_adam() -> None:
    weight, other = parameter(8, 8), parameter(8, 8)
    step = moved(StepOptimizer([ParameterGroup([weight], 0.01)], [], 10, "muon"), weight)
    assert torch.equal(step, moved(StepOptimizer([ParameterGroup([other], 0.01)], [], 10), other))


def test_a_saved_state_goes_on_where_it_was() -> None:
    def made() -> tuple[StepOptimizer, nn.Parameter]:
        weight = parameter(6, 9)
        groups = [ParameterGroup([weight], 0.01, matrices=True), ParameterGroup([parameter(6, 1)], 0.01)]
        return StepOptimizer(groups, [], 5, "muon"), weight

    optimizer, weight = made()
    optimizer.step()
    again, other = made()
    again.load_state(copy.deepcopy(optimizer.state()))
    other.data.copy_(weight.data)
    assert torch.equal(moved(again, other), moved(optimizer, weight))
