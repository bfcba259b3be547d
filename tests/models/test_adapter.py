"""Denoisers of the user's own: what an adapter must say, what is refused, and a build of two of them."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from dmqexport.adapter import Adapter
from dmqexport.errors import ModelError
from dmqexport.models.adapter_family import AdapterFamily
from dmqexport.models.adapter_loading import adapter_config, adapter_digest, make_adapter
from dmqexport.models.loading import load_model
from dmqexport.models.sampling import sample_images
from dmqexport.pipeline import Build
from dmqexport.pipeline_bundle import run_build
from dmqexport.recipe import load_recipe
from dmqexport.runtime import load_denoiser
from dmqexport.workspace import SilentReporter, Workspace
from tests.models import hand_written

pytestmark = pytest.mark.usefixtures("one_torch_thread")

_MODULE = "tests.models.hand_written"


def test_an_adapter_is_loaded_by_reference() -> None:
    loaded = load_model(f"{_MODULE}:scheduled")
    assert loaded.family.input_names == ("sample", "timestep", "vector")
    assert (loaded.num_timesteps, loaded.default_steps, loaded.default_guidance) == (100, 3, 2.0)
    assert loaded.family.blocks == ("stages.0", "stages.1")
    assert not any(parameter.requires_grad for parameter in loaded.denoiser.parameters())
    inputs = loaded.example_inputs(3)
    assert loaded.family.call(loaded.denoiser, inputs).shape == inputs["sample"].shape


@pytest.mark.parametrize("factory", ["scheduled", "flowing"])
def test_trajectories_are_recorded_whatever_the_batch(factory: str) -> None:
    loaded = load_model(f"{_MODULE}:{factory}")
    guidance = loaded.default_guidance
    results = [
        sample_images(loaded, None, [3, 4, 5], steps=3, guidance=guidance, batch_size=size, record=True)
        for size in (1, 3)
    ]
    assert np.array_equal(results[0].images, results[1].images)
    assert results[0].images.shape == (3, 8, 8, 3)
    one, three = (result.calibration for result in results)
    assert one is not None
    assert three is not None
    assert len(three) == 3 * 3 * (2 if guidance > 1 else 1)
    for name, value in one.inputs.items():
        assert torch.allclose(value, three.inputs[name], atol=1e-5), name
    if factory == "flowing":
        assert three.timesteps.tolist() == [1000, 667, 333] * 3


def test_the_fingerprint_follows_weights_and_words() -> None:
    adapter = hand_written.scheduled()
    other = hand_written.scheduled()
    assert adapter_digest(adapter) == adapter_digest(other)
    with torch.no_grad():
        next(other.module.parameters()).view(-1)[0] += 1e-3
    assert adapter_digest(adapter) != adapter_digest(other)
    assert adapter_digest(adapter) != adapter_digest(dataclasses.replace(adapter, num_timesteps=50))


def test_the_family_is_made_again_from_its_config() -> None:
    config = adapter_config(hand_written.scheduled())
    family = AdapterFamily(config)
    assert adapter_config(hand_written.scheduled()) == config
    assert family.boundary == ("stem", "head", "time.*")
    assert family.dynamic_axes == {"sample": {2: "height", 3: "width"}}
    inputs = family.example_inputs(2)
    assert {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()} == {
        "sample": ((2, 3, 8, 8), torch.float32),
        "timestep": ((2,), torch.int64),
        "vector": ((2, 6), torch.float32),
    }


class Wrong:
    """Factories that are refused, and what the refusal says."""

    @staticmethod
    def change(**changes: Any) -> Adapter:
        """The good adapter with these fields."""
        return dataclasses.replace(hand_written.scheduled(), **changes)


_SAMPLE, _TIME = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
_REFUSED = {
    "no timestep": ({"inputs": {"sample": _SAMPLE}}, "timestep"),
    "one sample": ({"inputs": {"sample": _SAMPLE[:1], "timestep": _TIME[:1]}}, "at least 2"),
    "half precision": ({"inputs": {"sample": _SAMPLE.half(), "timestep": _TIME}}, "float32 or int64"),
    "unknown input": ({"inputs": {"sample": _SAMPLE, "timestep": _TIME, "mask": _SAMPLE}}, "'mask'"),
    "missing input": ({"inputs": {"sample": _SAMPLE, "timestep": _TIME}}, "forward fails"),
    "no boundary": ({"boundary": ("stem", "tail")}, "boundary pattern 'tail' matches no layer"),
    "no first layer": ({"first_layers": ("root",)}, "first_layers pattern 'root' matches no layer"),
    "no such block": ({"blocks": ("stages.7",)}, "'stages.7'"),
    "two samplers": ({"sample": hand_written.euler}, "either a scheduler or a sample function"),
    "no sampler": ({"scheduler": None}, "either a scheduler or a sample function"),
    "no module": ({"module": 3}, "torch module"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_an_adapter_lacks_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, words = _REFUSED[name]
    monkeypatch.setattr(hand_written, "broken", lambda: Wrong.change(**changes), raising=False)
    with pytest.raises(ModelError) as caught:
        make_adapter(f"{_MODULE}:broken")
    assert words in str(caught.value)
    assert f"{_MODULE}:broken" in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("no_such_package.there:make", "No module named 'no_such_package'"),
        (f"{_MODULE}:nothing", "nothing"),
        (f"{_MODULE}:Stage", "missing 1 required positional argument"),
        (f"{_MODULE}:HandWritten", "returned HandWritten, expected dmqexport.adapter.Adapter"),
    ],
)
def test_references_that_lead_nowhere(reference: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(reference)
    assert words in str(caught.value)


def test_a_forward_that_returns_no_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.stem(sample), timestep

    monkeypatch.setattr(
        hand_written,
        "pair",
        lambda: Wrong.change(
            module=Pair(), inputs={"sample": _SAMPLE, "timestep": _TIME}, boundary=("stem",), blocks=()
        ),
        raising=False,
    )
    with pytest.raises(ModelError, match="returned tuple, expected one tensor"):
        make_adapter(f"{_MODULE}:pair")


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["scheduled", "flowing"])
def test_an_adapted_denoiser_becomes_a_bundle(factory: str, tmp_path: Path) -> None:
    recipe = load_recipe(
        None,
        {"model": f"{_MODULE}:{factory}", "bits": "w4a8", "target": "onnx"},
        [
            "calibration.size=4", "calibration.rows=2", "validation.images=2", "validation.entries=6",
            "validation.layer_entries=2", "training.blocks.iterations=2", "training.blocks.entries=6",
            "training.blocks.held_out=2", "training.trajectories=4",
        ],
    )  # fmt: skip
    build = Build(recipe, tmp_path / "out", Workspace(tmp_path / "work", SilentReporter()))
    assert not run_build(build).failed_gates
    assert {layer.name for layer in build.plan.layers if layer.weight_bits == 8} >= {"stem", "head"}
    denoiser = load_denoiser(tmp_path / "out")
    inputs = build.calibration_set.select(torch.tensor([0, len(build.calibration_set) - 1]))
    expected, actual = build.model.denoiser(**inputs), denoiser(**inputs)
    assert isinstance(actual, torch.Tensor)
    assert 0 < float((actual - expected).square().sum() / expected.square().sum()) < 0.25
    if factory == "scheduled":
        # Height and width are free: the graph takes a size that calibration never saw.
        session = onnxruntime.InferenceSession(str(tmp_path / "out/denoiser/model.onnx"))
        wide = {
            "sample": np.zeros((1, 3, 8, 12), np.float32),
            "timestep": np.array([5]),
            "vector": np.zeros((1, 6), np.float32),
        }
        assert session.run(None, wide)[0].shape == (1, 3, 8, 12)
    build.workspace.close()


def test_the_example_in_the_readme_is_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = next(part for part in readme.split("```python\n") if "Adapter(" in part).partition("```")[0]
    (tmp_path / "mine.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    loaded = load_model("mine:factory")
    assert loaded.family.input_names == ("sample", "timestep")
    pictures = sample_images(loaded, None, [0], steps=2, guidance=1.0, batch_size=1).images
    assert pictures.shape == (1, 32, 32, 3)
