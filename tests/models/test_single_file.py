"""Whole checkpoints in one file load like folders: same network, no network access, and nothing left at random."""

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from dmqexport.errors import ModelError
from dmqexport.models import emoji
from dmqexport.models.loading import load_model
from dmqexport.models.presets import PRESETS
from tests.models.original_networks import LdmAutoencoder, LdmNetwork, randomize
from tests.models.test_convert import CLASSES, SHIFTED
from tests.models.tiny_pipelines import save_text

#: Stable Diffusion 1.x in miniature: transformers over text, and a KL first stage.
FACTS = replace(CLASSES, classes=None, context=16, heads=2, first_stage=SHIFTED.first_stage)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, LdmNetwork]:
    """(configuration without weights, single file, the original network)."""
    root = tmp_path_factory.mktemp("single")
    configs, stage = root / "configs", FACTS.first_stage
    parts = StableDiffusionPipeline.from_pretrained(save_text(root / "text"), safety_checker=None)
    levels = len(FACTS.multipliers)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=FACTS.size,
            in_channels=stage.latent_channels,
            out_channels=stage.latent_channels,
            block_out_channels=[FACTS.channels * factor for factor in FACTS.multipliers],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            layers_per_block=FACTS.blocks,
            norm_num_groups=FACTS.groups,
            attention_head_dim=FACTS.heads,
            cross_attention_dim=FACTS.context,
        ),
        vae=AutoencoderKL(
            block_out_channels=[stage.channels * factor for factor in stage.multipliers],
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            layers_per_block=stage.blocks,
            latent_channels=stage.latent_channels,
            norm_num_groups=stage.groups,
        ),
        text_encoder=parts.text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(str(emoji.pipeline_folder() / "tokenizer"), local_files_only=True),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(configs)
    for path in configs.rglob("*.safetensors"):
        path.unlink()
    network, autoencoder = randomize(LdmNetwork(FACTS), 1), randomize(LdmAutoencoder(stage), 2)
    assert isinstance(network, LdmNetwork)
    state = {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()}
    state |= {f"first_stage_model.{name}": value for name, value in autoencoder.state_dict().items()}
    text = parts.text_encoder.state_dict()
    state |= {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, root / "style.safetensors")
    return configs, root / "style.safetensors", network


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))


def _placed(made: tuple[Path, Path, LdmNetwork], place: Path, state: dict[str, Tensor] | None = None) -> Path:
    """The file in a copy of the configuration's folder."""
    configs, file, _ = made
    shutil.copytree(configs, place)
    if state is None:
        shutil.copy(file, place)
    else:
        save_file(state, place / file.name)
    return place / file.name


@torch.no_grad()
def test_a_file_in_its_models_folder_is_that_model(made: tuple[Path, Path, LdmNetwork], tmp_path: Path) -> None:
    path = _placed(made, tmp_path / "model")
    loaded = load_model(str(path))
    inputs = loaded.example_inputs(3)
    expected = made[2](inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    got = loaded.denoiser(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]).sample
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert (loaded.name, loaded.source) == ("style", str(path))
    # Made once: the same content elsewhere is the same folder.
    beside = tmp_path / "other" / "beside.safetensors"
    shutil.copytree(made[0], beside.with_suffix(""))
    shutil.copy(path, beside)
    again = load_model(str(beside))
    assert (again.folder, again.fingerprint) == (loaded.folder, loaded.fingerprint)
    assert len(list(loaded.folder.parent.iterdir())) == 1


def test_half_precision_stays_half_on_disk(made: tuple[Path, Path, LdmNetwork], tmp_path: Path) -> None:
    halves = {name: value.half() for name, value in load_file(made[1]).items()}
    loaded = load_model(str(_placed(made, tmp_path / "model", halves)))
    stored = load_file(loaded.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert loaded.denoiser.dtype == torch.float32


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("model.diffusion_model.out.2.bias", "lacks tensors of the StableDiffusionPipeline"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
            "lacks tensors of the StableDiffusionPipeline",
        ),
        ("first_stage_model.decoder.conv_in.bias", "lacks tensors of the StableDiffusionPipeline"),
        ("first_stage_model.", "cannot be opened|lacks"),
    ],
)
def test_files_that_lack_tensors_are_refused(
    lost: str, says: str, made: tuple[Path, Path, LdmNetwork], tmp_path: Path
) -> None:
    state = {name: value for name, value in load_file(made[1]).items() if not name.startswith(lost)}
    with pytest.raises(ModelError, match=says) as caught:
        load_model(str(_placed(made, tmp_path / "model", state)))
    assert caught.value.hint
    assert list((tmp_path / "home" / "dmqexport" / "single-files").iterdir()) == []


def test_without_a_configuration_here_the_download_is_spelled_out(
    made: tuple[Path, Path, LdmNetwork], tmp_path: Path
) -> None:
    alone = Path(shutil.copy(made[1], tmp_path / "alone.safetensors"))
    hub_id = PRESETS["sd15"].hub_id
    with pytest.raises(ModelError, match=f"its model, {hub_id}, are not here") as caught:
        load_model(str(alone))
    assert f"hf download {hub_id} --include 'model_index.json'" in str(caught.value.hint)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "some.safetensors")
    with pytest.raises(ModelError, match="no checkpoint of a whole model that diffusers knows"):
        load_model(str(tmp_path / "some.safetensors"))
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="expected a diffusers folder or a whole checkpoint") as caught:
        load_model(str(tmp_path / "old.ckpt"))
    assert "dmqexport convert" in str(caught.value.hint)
