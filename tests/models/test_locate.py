"""From what the user wrote to a folder: presets without one, gated ones, converted ones, and what is downloaded."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from dmqexport.errors import ModelError, RecipeError
from dmqexport.models.convert import convert_as
from dmqexport.models.loading import load_model
from dmqexport.models.locate import download, locate
from dmqexport.models.presets import PRESETS
from dmqexport.models.sampling import sample_images
from tests.models.original_networks import LdmModel, randomize
from tests.models.test_convert import CLASSES, PLAIN, SHIFTED, LdmOriginal
from tests.models.tiny_pipelines import save_unconditional


@pytest.mark.parametrize("name", [preset.name for preset in PRESETS.values() if preset.source == "convert"])
def test_presets_without_a_folder_say_how_to_make_one(name: str) -> None:
    with pytest.raises(ModelError, match="has no folder in diffusers' format") as caught:
        locate(name, None)
    assert caught.value.hint is not None
    assert str(PRESETS[name].checkpoint) in caught.value.hint
    assert f"dmqexport convert CHECKPOINT -m {name} -o FOLDER" in caught.value.hint


@pytest.mark.parametrize("name", ["flux-dev", "sd3-medium"])
def test_gated_presets_say_terms_and_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise hub_errors.GatedRepoError.__new__(hub_errors.GatedRepoError, "gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match="is gated") as caught:
        load_model(name)
    assert PRESETS[name].licence in caught.value.message
    assert PRESETS[name].forbids in caught.value.message
    assert f"https://huggingface.co/{PRESETS[name].hub_id}" in str(caught.value.hint)


def test_every_component_of_every_kind_is_downloaded_and_no_copy_of_it() -> None:
    offered = {
        "model_index.json": True,
        "transformer/config.json": True,
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": True,
        "transformer/diffusion_pytorch_model.safetensors.index.json": True,
        "text_encoder_2/model-00002-of-00002.safetensors": True,
        "text_encoder_3/model.safetensors.index.json": True,
        "text_encoder_3/model.safetensors.index.fp16.json": False,
        "tokenizer_2/spiece.model": True,
        "tokenizer_3/tokenizer.json": True,
        "vqvae/diffusion_pytorch_model.safetensors": True,
        "flux1-dev.safetensors": False,
        "text_encoders/t5xxl_fp16.safetensors": False,
        "transformer/diffusion_pytorch_model.fp16.safetensors": False,
    }
    patterns: list[str] = []

    def fetch(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        raise ConnectionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", fetch)
        with pytest.raises(ModelError):
            download("org/name", None)
    assert set(filter_repo_objects(offered, allow_patterns=patterns)) == {
        name for name, kept in offered.items() if kept
    }


def test_half_precision_is_taken_where_nothing_else_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Component by component, and from the same commit."""
    offered = {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bf16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bf16.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
    }
    revisions = []

    def fetch(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        revisions.append(revision)
        for name in filter_repo_objects(offered, allow_patterns=allow_patterns):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).touch()
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for variant, expected in (
        (None, {"unet/bf16", "vae/", "text_encoder/"}),
        ("fp16", {"unet/bf16", "vae/", "text_encoder/fp16"}),
        ("bf16", {"unet/bf16", "vae/bf16", "text_encoder/"}),
    ):
        place = tmp_path / str(variant)
        revisions.clear()
        assert download("org/name", "v2", variant) == place
        found = {
            f"{path.parent.name}/{path.name.partition('.')[2].removesuffix('safetensors').strip('.')}"
            for path in place.rglob("*.safetensors")
        }
        assert found == expected
        assert revisions[0] == "v2"
        assert set(revisions[1:]) == {place.name}


def test_the_variant_of_a_folder_is_the_users_choice(tmp_path: Path) -> None:
    folder = save_unconditional(tmp_path / "plain")
    plain = load_model(str(folder))
    plain.denoiser.half().save_pretrained(folder / "unet", variant="fp16")
    assert load_model(str(folder)).fingerprint == load_model(str(folder)).fingerprint == plain.fingerprint
    half = load_model(str(folder), variant="fp16")
    assert half.fingerprint != plain.fingerprint
    assert half.denoiser.dtype == torch.float32
    weight = load_model(str(folder)).denoiser.conv_in.weight
    assert torch.equal(half.denoiser.conv_in.weight, weight.half().float())
    with pytest.raises(ModelError, match="has no bf16 weights of its unet, only plain ones") as caught:
        load_model(str(folder), variant="bf16")
    assert caught.value.hint == "leave --variant out"


def test_a_repository_of_pickles_points_to_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match="offers no safetensors") as caught:
        load_model("ldm-celebahq-256")
    assert "dmqexport convert CHECKPOINT -m ldm-celebahq-256" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("facts", "name", "prompts"),
    [(PLAIN, "ldm-bedroom", 0), (SHIFTED, "ldm-church", 0), (CLASSES, "ldm-imagenet", 10)],
    ids=["bedroom", "church", "imagenet"],
)
def test_converted_folders_load_sample_and_keep_their_presets_defaults(
    facts: LdmOriginal, name: str, prompts: int, tmp_path: Path
) -> None:
    torch.save({"state_dict": randomize(LdmModel(facts), 1).checkpoint()}, tmp_path / "model.ckpt")
    convert_as(tmp_path / "model.ckpt", facts, name, tmp_path / "mine")
    loaded = load_model(str(tmp_path / "mine"))
    assert (loaded.name, loaded.preset) == ("mine", PRESETS[name])
    assert (loaded.default_steps, loaded.default_guidance) == (PRESETS[name].steps, PRESETS[name].guidance)
    assert loaded.family.class_name == PRESETS[name].denoiser
    assert len(set(loaded.default_prompts)) == prompts
    sampled = sample_images(loaded, None, [1, 2], steps=2, guidance=3.0, batch_size=2, record=True)
    assert sampled.images.shape == (2, 32, 32, 3) if name == "ldm-bedroom" else sampled.images.ndim == 4
    assert sampled.calibration is not None
    assert set(sampled.calibration.inputs) == set(loaded.family.input_names)


def test_classes_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": randomize(LdmModel(CLASSES), 1).checkpoint()}, tmp_path / "model.ckpt")
    convert_as(tmp_path / "model.ckpt", CLASSES, "ldm-imagenet", tmp_path / "mine")
    loaded = load_model(str(tmp_path / "mine"))
    for text, words in (("10", "there is no class 10"), ("cat", "'cat' is no class of this model")):
        with pytest.raises(RecipeError, match=words) as caught:
            sample_images(loaded, [text], [1], steps=1, guidance=1.0, batch_size=1)
        assert "class" in str(caught.value.hint)


def test_latents_of_vector_quantized_autoencoders_are_not_scaled_by_default(tmp_path: Path) -> None:
    """The hub's ldm-celebahq-256 says nothing of a factor, and diffusers would take Stable Diffusion's."""
    torch.save({"state_dict": randomize(LdmModel(PLAIN), 1).checkpoint()}, tmp_path / "model.ckpt")
    convert_as(tmp_path / "model.ckpt", PLAIN, "ldm-celebahq-256", tmp_path / "mine")
    path = tmp_path / "mine" / "vqvae" / "config.json"
    for stored, expected in ((None, 1.0), (0.5, 0.5)):
        config = {**json.loads(path.read_text()), "scaling_factor": stored}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        assert load_model(str(tmp_path / "mine")).pipeline.vqvae.config.scaling_factor == expected
