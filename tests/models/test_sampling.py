"""Sampling: every picture has its own noise, so that the batch size changes nothing but rounding."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from dmqexport.errors import CalibrationError, DmqExportError, EngineError, ModelError, RecipeError, ResourceError
from dmqexport.models.loading import LoadedModel, load_model
from dmqexport.models.sampling import SampleResult, sample_images, set_denoiser
from tests.models.tiny_pipelines import TOKENS, WIDTH, conditional_unet, save_unconditional

SEEDS = [11, 12, 13, 14, 15]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(loaded: LoadedModel, batch_size: int = 2, **options: Any) -> SampleResult:
    settings: dict[str, Any] = {"prompts": None, "seeds": SEEDS, "steps": 4, "guidance": 3.0, **options}
    return sample_images(loaded, settings.pop("prompts"), settings.pop("seeds"), batch_size=batch_size, **settings)


def assert_same(one: SampleResult, other: SampleResult) -> None:
    assert np.abs(one.images.astype(int) - other.images).max() <= 1
    assert one.calibration is not None
    assert other.calibration is not None
    assert torch.equal(one.calibration.trajectory, other.calibration.trajectory)
    assert torch.equal(one.calibration.step, other.calibration.step)
    for name, value in one.calibration.inputs.items():
        # Convolutions of other batch sizes round differently, and an untrained network amplifies that step by step.
        torch.testing.assert_close(value, other.calibration.inputs[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler", "euler-ancestral", "pndm", "lcm", "unipc", "heun"])
def test_batch_size_changes_nothing_with_text(text: Path, scheduler: str) -> None:
    loaded = load_model(str(text), scheduler=scheduler)
    assert_same(sample(loaded, 1, record=True), sample(loaded, 4, record=True))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm-solver"])
def test_batch_size_changes_nothing_without_text(plain: Path, scheduler: str) -> None:
    loaded = load_model(str(plain), scheduler=scheduler)
    assert_same(sample(loaded, 1, record=True), sample(loaded, 4, record=True))


def test_recorded_entries_carry_global_trajectories_in_order(text: Path) -> None:
    result = sample(load_model(str(text)), record=True).calibration
    assert result is not None
    # 5 pictures, 4 steps, two guidance halves.
    assert len(result) == 40
    assert result.trajectory.tolist() == [index // 8 for index in range(40)]
    assert result.step.tolist() == [index // 2 % 4 for index in range(40)]
    assert result.timesteps[:8].tolist() == [751, 751, 501, 501, 251, 251, 1, 1]
    assert result.inputs["encoder_hidden_states"].shape == (40, TOKENS, WIDTH)
    states = result.inputs["encoder_hidden_states"]
    # The unconditional half comes first and is the same for every picture; the prompts differ.
    assert torch.allclose(states[0], states[8])
    assert not torch.allclose(states[1], states[9])
    assert torch.equal(result.inputs["sample"][0], result.inputs["sample"][1])


def test_pictures(text: Path, plain: Path) -> None:
    for folder, size in ((text, 16), (plain, 8)):
        loaded = load_model(str(folder))
        seen: list[tuple[int, int]] = []
        result = sample(loaded, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert result.images.shape == (5, size, size, 3)
        assert result.images.dtype == np.uint8
        assert result.calibration is None
        assert seen == [(2, 5), (4, 5), (5, 5)]
        assert not np.array_equal(result.images[0], result.images[1])


def test_seed_decides_and_position_does_not(plain: Path) -> None:
    loaded = load_model(str(plain))
    forward, backward = sample(loaded, 5), sample(loaded, 5, seeds=SEEDS[::-1])
    assert np.abs(forward.images.astype(int) - backward.images[::-1]).max() <= 1


def test_prompts_decide(text: Path) -> None:
    loaded = load_model(str(text))
    first, second = (sample(loaded, seeds=[1], prompts=[words]) for words in ("red heart", "grinning cat"))
    again = sample(loaded, seeds=[1], prompts=["red heart"])
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, second.images)


def test_default_prompts_are_taken_in_turn(text: Path) -> None:
    loaded = load_model(str(text))
    explicit = sample(loaded, prompts=list(loaded.default_prompts[:5]))
    assert np.array_equal(sample(loaded).images, explicit.images)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channel_counts_become_rgb(tmp_path: Path, channels: int) -> None:
    images = sample(load_model(str(save_unconditional(tmp_path, channels)))).images
    assert images.shape == (5, 8, 8, 3)
    assert np.array_equal(images[..., 0], images[..., 2]) == (channels == 1)


def test_random_embeddings(tmp_path: Path) -> None:
    conditional_unet().save_pretrained(tmp_path)
    DDIMScheduler(clip_sample=False, steps_offset=1).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), embeddings="random")
    for guidance, halves in ((1.0, 1), (3.0, 2)):
        result = sample(loaded, 4, guidance=guidance, record=True)
        assert_same(result, sample(loaded, 1, guidance=guidance, record=True))
        assert result.images.shape == (5, 8, 8, 3)
        assert result.calibration is not None
        assert len(result.calibration) == 20 * halves
        states = result.calibration.inputs["encoder_hidden_states"]
        assert states.shape[1:] == (77, WIDTH)
        assert abs(float(states.std()) - 1) < 0.05
    with pytest.raises(RecipeError, match="takes no prompts"):
        sample(loaded, prompts=["x"] * 5)


# Drop-in denoisers


class DropIn:
    """Not a torch module: like an engine behind the denoiser's signature."""

    dtype = torch.float32

    def __init__(self, inner: nn.Module, error: Exception | None = None) -> None:
        self.inner, self.config, self.error, self.calls = inner, inner.config, error, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.inner(*args, **options)


@pytest.mark.parametrize("model", ["text", "plain"])
def test_drop_in_denoiser(model: str, request: pytest.FixtureRequest) -> None:
    loaded = load_model(str(request.getfixturevalue(model)))
    expected = sample(loaded).images
    drop_in = DropIn(loaded.denoiser)
    set_denoiser(loaded.pipeline, drop_in)
    assert np.array_equal(sample(loaded).images, expected)
    assert drop_in.calls == 12
    with pytest.raises(ModelError, match="no torch module"):
        sample(loaded, record=True)
    set_denoiser(loaded.pipeline, loaded.denoiser)
    assert np.array_equal(sample(loaded, record=True).images, expected)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (EngineError("broken engine"), EngineError),
        (CalibrationError("bad"), CalibrationError),
        (RuntimeError("shapes differ"), ModelError),
        (MemoryError(), ResourceError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ResourceError),
    ],
)
def test_failures_while_sampling(plain: Path, raised: Exception, expected: type[DmqExportError]) -> None:
    loaded = load_model(str(plain))
    set_denoiser(loaded.pipeline, DropIn(loaded.denoiser, raised))
    with pytest.raises(expected):
        sample(loaded)


def test_nan_pictures_are_refused_by_seed(plain: Path) -> None:
    loaded = load_model(str(plain))
    with torch.no_grad():
        loaded.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="seed 11"):
        sample(loaded)


def test_unfit_drop_ins_are_refused(plain: Path) -> None:
    loaded = load_model(str(plain))
    with pytest.raises(ModelError, match="`config`"):
        set_denoiser(loaded.pipeline, nn.Identity())
    with pytest.raises(ModelError, match="no component 'unet'"):
        set_denoiser(object(), loaded.denoiser)


# Arguments


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": []}, "no seeds"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "expected 1 to 1000"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"prompts": ["one"]}, "1 prompts for 5 seeds"),
    ],
)
def test_arguments_that_cannot_be_used(text: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        sample(load_model(str(text)), **options)


def test_prompts_for_an_unconditional_model(plain: Path) -> None:
    with pytest.raises(RecipeError, match="no text encoder"):
        sample(load_model(str(plain)), prompts=["x"] * 5)
