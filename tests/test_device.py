"""Calibration on another device and in another precision: nothing is left behind, and integers stay what they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmqexport.errors import BackendMissingError
from dmqexport.models.device import find_device, on_device
from dmqexport.pipeline import Build
from dmqexport.recipe import load_recipe
from dmqexport.workspace import SilentReporter, Workspace
from tests.command_line import dmqexport, refused
from tests.models.tiny_pipelines import save_text
from tests.pretend_device import PretendTensor, pretended_device

pytestmark = pytest.mark.usefixtures("one_torch_thread")

_TINY = ("sampling.steps=3", "calibration.size=2", "calibration.rows=2", "calibration.batch_size=4")


def build_of(model: Path, folder: Path, *options: str) -> Build:
    recipe = load_recipe(None, {"model": str(model), "bits": "w4a4", "target": "onnx"}, [*_TINY, *options])
    return Build(recipe, folder / "bundle", Workspace(folder / "work", SilentReporter()))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("device") / "text")


def test_the_pretended_device_refuses_what_cuda_refuses() -> None:
    with pretended_device() as device:
        there = torch.arange(6.0).reshape(2, 3).to(device)
        assert there.device == device
        assert torch.equal((there @ there.T).cpu(), torch.tensor([[5.0, 14.0], [14.0, 50.0]]))
        assert float(there.sum() * torch.tensor(2.0)) == 30.0
        assert torch.zeros(2, device=device).add_(1).tolist() == [1.0, 1.0]
        assert there[torch.tensor([1])].device == device
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, 3)[torch.tensor([0]).to(device)]
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        layer = nn.Linear(3, 1).to(device)
        assert layer(there).device == device
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(2, 3))
        assert layer.to("cpu")(torch.ones(2, 3)).device.type == "cpu"


def test_callers_never_see_the_device() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    sample = torch.ones(2, 3)
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    with torch.no_grad(), pretended_device() as device:
        expected = model(sample)
        with on_device(model, None, device, torch.float32), on_device(model, None, device, torch.float32):
            assert torch.equal(model(sample), expected)
        assert torch.equal(model(sample), expected)
    assert seen == [Tensor, PretendTensor, Tensor]
    assert not model._forward_hooks


def test_bfloat16_trajectories_differ_a_little_and_statistics_are_exact(text_model: Path, tmp_path: Path) -> None:
    plain, reduced = (
        build_of(text_model, tmp_path / dtype, f"calibration.dtype={dtype}") for dtype in ("float32", "bfloat16")
    )
    seen: list[torch.dtype] = []
    layer = next(part for part in reduced.model.denoiser.modules() if isinstance(part, nn.Conv2d))

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.is_meta:  # costs are counted there
            seen.append(output.dtype)

    layer.register_forward_hook(look)
    exact, rough = plain.calibration_set, reduced.calibration_set
    assert set(seen) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for name, value in rough.inputs.items() if name != "timestep")
    last = exact.step == exact.step.max()
    error = float((rough.inputs["sample"][last] - exact.inputs["sample"][last]).square().mean())
    power = float(exact.inputs["sample"][last].square().mean())
    assert 0 < error < 1e-2 * power
    seen.clear()
    assert reduced.plan.rows == plain.plan.rows
    assert set(seen) == {torch.float32}, "statistics and the fit of weights are not reduced"
    assert reduced.trajectories.fingerprint != plain.trajectories.fingerprint


def test_a_failing_forward_leaves_nothing_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, sample: Tensor) -> Tensor:
            result: Tensor = self.layer(sample)
            if bool(result.isnan().any()):
                raise ValueError("not a number")
            return result

    model = Failing()
    with on_device(model, None, torch.device("cpu"), torch.bfloat16):
        with pytest.raises(ValueError, match="not a number"):
            model(torch.full((1, 2), torch.nan))
        assert not torch.is_autocast_enabled("cpu")
        assert model(torch.ones(1, 2)).dtype == torch.float32
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_here_is_refused_at_once(tmp_path: Path) -> None:
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(BackendMissingError, match=r"'cuda:1'.*torch"):
        find_device("cuda:1")
    answer = dmqexport("build", "-m", "emoji", "--device", "cuda", "-o", tmp_path / "o")
    refused(answer, 7, ["--device", "'cuda'", "hint: --device cpu"])
    assert not (tmp_path / "o.work").exists()


@pytest.mark.parametrize(("option", "value"), [("--device", "gpu"), ("--device", "cuda:x"), ("--dtype", "fp16")])
def test_misspelt_devices_and_dtypes(option: str, value: str, tmp_path: Path) -> None:
    refused(dmqexport("build", "-m", "emoji", option, value, "-o", tmp_path / "o"), 2, [option, repr(value)])
