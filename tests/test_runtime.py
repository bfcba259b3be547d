"""The bundle as a diffusers component: every scheduler, mixed batches, and inputs it must refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from dmqexport.bundle import open_bundle
from dmqexport.errors import BundleError, EngineError
from dmqexport.models.loading import load_model
from dmqexport.runtime import QuantizedDenoiser, load_denoiser, load_pipeline
from tests.conftest import Built
from tests.models.tiny_pipelines import copy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture(scope="module")
def denoiser(text_bundle: Built) -> QuantizedDenoiser:
    return load_denoiser(text_bundle.path, threads=1)


def inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.full((batch,), 501),
        "encoder_hidden_states": torch.randn(batch, 16, 16, generator=generator),
    }


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_every_scheduler_draws(text_bundle: Built, scheduler: Any) -> None:
    pipeline = load_pipeline(text_bundle.path, threads=1)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a", "b"], num_inference_steps=4, output_type="np").images
    assert images.shape[0] == 2
    assert np.isfinite(images).all()


def test_drops_into_a_pipeline_of_ones_own(text_bundle: Built, denoiser: QuantizedDenoiser) -> None:
    pipeline = load_model(str(text_bundle.model)).pipeline
    original = pipeline("a", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0)).images
    pipeline.unet = denoiser
    quantized = pipeline("a", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0)).images
    error = ((quantized - original) ** 2).sum() / (original**2).sum()
    assert 0 < float(error) < 1


def test_unconditional_pipelines(plain_bundle: Built) -> None:
    pipeline = load_pipeline(plain_bundle.path, threads=1)
    assert type(pipeline).__name__ == "DDPMPipeline"
    assert pipeline(batch_size=3, num_inference_steps=3, output_type="np").images.shape[0] == 3


def test_mixed_timesteps_equal_one_by_one(denoiser: QuantizedDenoiser) -> None:
    given = inputs(5)
    given["timestep"] = torch.tensor([1, 999, 501, 250, 0])
    together = denoiser(**given).sample
    for index in range(5):
        alone = denoiser(**{name: value[index : index + 1] for name, value in given.items()}).sample
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)


def test_call_signatures_of_diffusers(denoiser: QuantizedDenoiser) -> None:
    given = inputs(2)
    expected = denoiser(**given).sample
    sample, text = given["sample"], given["encoder_hidden_states"]
    assert expected.dtype == torch.float32
    for timestep in (
        501,
        501.0,
        torch.tensor(501),
        torch.tensor([501]),
        torch.tensor(501.4),
        torch.tensor([500.6] * 2),
    ):
        assert torch.equal(denoiser(sample, timestep, text).sample, expected)
        assert torch.equal(denoiser(sample, timestep, encoder_hidden_states=text, return_dict=False)[0], expected)
    nothing = {"class_labels": None, "cross_attention_kwargs": None, "added_cond_kwargs": None, "timestep_cond": None}
    assert torch.equal(denoiser(sample, 501, text, **nothing).sample, expected)
    half = denoiser(sample.half(), 501, text.half()).sample
    assert half.dtype == torch.float16
    assert denoiser(sample.transpose(2, 3), 501, text).sample.shape == sample.shape


def test_looks_like_a_denoiser(denoiser: QuantizedDenoiser) -> None:
    assert denoiser.config.in_channels == denoiser.config["in_channels"] == 4
    assert denoiser.dtype == torch.float32
    assert denoiser.device == torch.device("cpu")
    assert not hasattr(denoiser.config, "no_such_key")
    assert list(denoiser.parameters()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep": 1000}, ("1000", "0 to 999", "num_train_timesteps")),
        ({"timestep": -1}, ("-1", "0 to 999")),
        ({"timestep": torch.tensor([1, 2, 3])}, ("3 timesteps for a batch of 2",)),
        ({"timestep": float("nan")}, ("timestep", "nan")),
        ({"timestep": None}, ("'timestep' is missing",)),
        ({"sample": None}, ("'sample' is missing",)),
        ({"encoder_hidden_states": None}, ("'encoder_hidden_states' is missing",)),
        ({"added_cond_kwargs": {"x": 1}}, ("added_cond_kwargs", "no input for")),
    ],
)
def test_refuses_what_it_was_not_built_for(
    denoiser: QuantizedDenoiser, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(BundleError) as caught:
        denoiser(**{**inputs(2), **change})
    for word in words:
        assert word in str(caught.value)


def test_refuses_wrong_shapes(denoiser: QuantizedDenoiser) -> None:
    for change in ({"sample": torch.zeros(2, 3, 8, 8)}, {"encoder_hidden_states": torch.zeros(2, 16, 15)}):
        with pytest.raises(EngineError, match="onnxruntime failed on inputs"):
            denoiser(**{**inputs(2), **change})


def test_too_many_positional_arguments(denoiser: QuantizedDenoiser) -> None:
    given = inputs(2)
    with pytest.raises(BundleError, match="positional"):
        denoiser(*given.values(), torch.zeros(2))
    with pytest.raises(BundleError, match="twice"):
        denoiser(*given.values(), sample=given["sample"])


def test_damaged_graph_is_named(plain_bundle: Built, tmp_path: Path) -> None:
    bundle = copy(plain_bundle.path, tmp_path / "bundle")
    graph = bundle / "unet" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[1000:1100] = b"\xff" * 100
    graph.write_bytes(content)
    with pytest.raises(BundleError, match=r"unet/model\.onnx: content differs"):
        load_denoiser(bundle)
    with pytest.raises(BundleError, match=r"unet/model\.onnx: content differs"):
        load_denoiser(bundle, verify=True)


def test_other_cpus_are_told(text_bundle: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    features = open_bundle(text_bundle.path).manifest["session"]["cpu_features"]
    monkeypatch.setattr("dmqexport.runtime.cpu_has_vnni", lambda: False)
    if "vnni" in features:
        with pytest.raises(BundleError, match=r"VNNI.*\n.*--rebuild"):
            load_denoiser(text_bundle.path)
    else:
        load_denoiser(text_bundle.path)
