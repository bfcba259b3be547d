"""Random weights: the published sizes, the same weights for the same seed, signals that neither explode nor die."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dmqexport.errors import ModelError
from dmqexport.models.family import family_of
from dmqexport.models.loading import load_model
from dmqexport.models.presets import PRESETS
from dmqexport.models.random_weights import (
    CONFIG,
    architectures,
    build_denoiser,
    fill_randomly,
    locate_architecture,
    random_denoiser,
)
from dmqexport.models.sampling import sample_images
from dmqexport.models.schedulers import build_scheduler
from dmqexport.models.weight_files import read_json

#: As the published weight files hold them.
PARAMETERS = {
    "ddpm-bedroom-256": 113_673_219,
    "ddpm-celebahq-256": 113_673_219,
    "ddpm-church-256": 113_673_219,
    "ddpm-cifar10": 35_746_307,
    "dit-xl-2-256": 749_826_464,
    "flux-dev": 11_901_408_320,
    "flux-schnell": 11_891_178_560,
    "ldm-bedroom": 274_056_163,
    "ldm-celebahq-256": 274_056_163,
    "ldm-church": 294_966_916,
    "ldm-imagenet": 400_920_579,
    "pixart-sigma": 610_856_096,
    "sd14": 859_520_964,
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sd3-medium": 2_028_328_000,
    "sd35-medium": 2_243_171_520,
    "sdxl": 2_567_463_684,
    "sdxl-turbo": 2_567_463_684,
}
SMALL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}


def folder_of(path: Path, config: dict[str, object]) -> Path:
    (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}
    (path / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    return path


def test_every_preset_has_an_architecture_and_the_bundled_one_its_weights() -> None:
    assert set(architectures()) == set(PARAMETERS) == set(PRESETS) - {"emoji"}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_architectures_have_the_published_size(name: str) -> None:
    folder = locate_architecture(name).folder
    config = read_json(folder / CONFIG)
    denoiser = build_denoiser(config, "meta")
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == PARAMETERS[name]
    preset = PRESETS[name]
    assert config["_class_name"] == preset.denoiser
    assert preset.latent[0] in (config["in_channels"], config["in_channels"] // 4)  # FLUX packs two by two
    assert build_scheduler(folder, None).config.num_train_timesteps == 1000


def test_the_same_seed_draws_the_same_weights_in_any_order() -> None:
    first, second, other = (random_denoiser(SMALL, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])
    part = nn.ModuleDict({"conv_in": nn.Conv2d(4, 32, 3, padding=1)})
    fill_randomly(part, 3)
    assert torch.equal(part.state_dict()["conv_in.weight"], first["conv_in.weight"])


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_signals_neither_explode_nor_die(noise: float) -> None:
    denoiser = random_denoiser(SMALL)
    inputs = family_of("UNet2DConditionModel", SMALL).example_inputs(2)
    spreads = {}

    def observe(name: str) -> None:
        denoiser.get_submodule(name).register_forward_hook(
            lambda _, args, out: spreads.update({name: float(out.std())})
        )

    for name, module in denoiser.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            observe(name)
    with torch.no_grad():
        denoiser(**{**inputs, "sample": inputs["sample"] * noise})
    assert len(spreads) > 50
    assert 0.05 < min(spreads.values()) <= max(spreads.values()) < 20


def test_a_model_of_random_weights_is_sampled_like_any_other(tmp_path: Path) -> None:
    loaded = load_model(str(folder_of(tmp_path, SMALL)), weights="random")
    assert loaded.random_weights
    assert loaded.random_embeddings
    result = sample_images(loaded, None, [0, 1], steps=2, guidance=1.0, batch_size=2, record=True)
    assert result.calibration is not None
    assert len(result.calibration) == 4
    again = load_model(str(tmp_path), weights="random")
    assert again.fingerprint == loaded.fingerprint
    assert torch.equal(again.denoiser.state_dict()["conv_in.weight"], loaded.denoiser.state_dict()["conv_in.weight"])


def test_another_architecture_is_another_model(tmp_path: Path) -> None:
    first = load_model(str(folder_of(tmp_path, SMALL)), weights="random").fingerprint
    second = load_model(str(folder_of(tmp_path, {**SMALL, "norm_eps": 1e-4})), weights="random").fingerprint
    assert first != second


def test_what_has_no_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    for model, reason in ((str(tmp_path), "is a whole pipeline"), ("nobody/nothing", "is not at hand")):
        with pytest.raises(ModelError, match=reason) as caught:
            load_model(model, weights="random")
        assert "sd14" in str(caught.value)
