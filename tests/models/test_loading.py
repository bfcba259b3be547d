"""Loading: what is accepted, what is refused and with which words, and that the terminal stays clean."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from dmqexport.errors import DmqExportError, ModelError, ResourceError
from dmqexport.models import emoji, locate
from dmqexport.models.loading import LoadedModel, load_model, pipeline_from_folder
from dmqexport.models.presets import PRESETS, emoji_prompts, text_prompts
from dmqexport.models.schedulers import SCHEDULERS, build_scheduler, scheduler_class
from tests.models.tiny_pipelines import TOKENS, WIDTH, conditional_unet, copy

UNET = "unet/diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_network")


def assert_ready(loaded: LoadedModel) -> None:
    assert not loaded.denoiser.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.denoiser.parameters())
    assert loaded.denoiser is getattr(loaded.pipeline, loaded.family.component)
    prediction = loaded.family.wrap(loaded.denoiser)(**loaded.example_inputs(2))
    assert prediction.shape == loaded.example_inputs(2)["sample"].shape


# Accepted


def test_bundled_model_loads_without_network() -> None:
    loaded = load_model("emoji")
    assert_ready(loaded)
    assert (loaded.name, loaded.source, loaded.tokens, loaded.num_train_timesteps) == ("emoji", "emoji", 16, 1000)
    assert (loaded.default_steps, loaded.default_guidance, loaded.preset) == (20, 3.0, PRESETS["emoji"])
    assert loaded.example_inputs(3)["encoder_hidden_states"].shape == (3, 16, 128)


def test_text_folder(text: Path) -> None:
    loaded = load_model(str(text))
    assert_ready(loaded)
    assert (loaded.name, loaded.tokens, loaded.default_steps, loaded.default_guidance) == ("tiny-text", TOKENS, 50, 7.5)
    assert loaded.default_prompts == text_prompts()
    assert loaded.preset is None


def test_unconditional_folder(plain: Path) -> None:
    loaded = load_model(str(plain))
    assert_ready(loaded)
    assert type(loaded.pipeline).__name__ == "DDPMPipeline"
    assert (loaded.tokens, loaded.num_train_timesteps, loaded.default_steps) == (None, 20, 20)
    assert loaded.default_prompts == ()


@pytest.mark.parametrize("place", ["unet/scheduler", "unet", "scheduler"])
def test_bare_unet_takes_the_scheduler_beside_it(plain: Path, tmp_path: Path, place: str) -> None:
    copy(plain / "unet", tmp_path / "unet")
    DDIMScheduler(num_train_timesteps=50).save_pretrained(tmp_path / place)
    loaded = load_model(str(tmp_path / "unet"))
    assert_ready(loaded)
    assert type(loaded.pipeline).__name__ == "DDIMPipeline"
    assert (loaded.num_train_timesteps, loaded.default_steps) == (50, 50)


def test_flat_hub_layout_of_early_models(plain: Path, tmp_path: Path) -> None:
    """google/ddpm-* keep network and scheduler beside model_index.json, and name attention layers the old way."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (plain / "model_index.json", *(plain / "unet").iterdir(), *(plain / "scheduler").iterdir()):
        shutil.copy(path, flat / path.name)
    weights = flat / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key: str) -> str:
        for new, former in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        return key

    renamed = {rename(key): value for key, value in load_file(weights).items()}
    assert any("proj_attn" in key for key in renamed)
    save_file(renamed, weights)
    loaded, expected = load_model(str(flat)), load_model(str(plain))
    state = loaded.denoiser.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in expected.denoiser.state_dict().items())


def test_bare_conditional_unet_needs_an_explicit_word(tmp_path: Path) -> None:
    conditional_unet().save_pretrained(tmp_path)
    DDIMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match='embeddings="random"'):
        load_model(str(tmp_path))
    loaded = load_model(str(tmp_path), embeddings="random")
    assert_ready(loaded)
    assert (loaded.random_embeddings, loaded.tokens, loaded.default_guidance) == (True, 77, 1.0)
    assert loaded.example_inputs()["encoder_hidden_states"].shape == (2, 77, WIDTH)


def test_half_precision_is_widened(text: Path, tmp_path: Path) -> None:
    folder = copy(text, tmp_path / "half")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        path = folder / f"{name}.safetensors"
        save_file({key: value.half() for key, value in load_file(path).items()}, folder / f"{name}.fp16.safetensors")
        path.unlink()
    loaded = load_model(str(folder))
    assert_ready(loaded)
    parts = (loaded.pipeline.vae, loaded.pipeline.text_encoder)
    assert all(p.dtype == torch.float32 for part in parts for p in part.parameters())


def test_shards(plain: Path, tmp_path: Path) -> None:
    folder = copy(plain, tmp_path / "sharded")
    whole = load_model(str(plain)).denoiser
    (folder / UNET).unlink()
    whole.save_pretrained(folder / "unet", max_shard_size="40KB")
    assert not (folder / UNET).exists()
    state = load_model(str(folder)).denoiser.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    shard = sorted((folder / "unet").glob("*-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load_model(str(folder))


def test_fingerprint_follows_content_and_scheduler_but_not_the_place(plain: Path, tmp_path: Path) -> None:
    moved = copy(plain, tmp_path / "elsewhere")
    config = moved / "unet" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "_name_or_path": "/home/me", "_diffusers_version": "0.1"}))
    reference = load_model(str(plain)).fingerprint
    assert len(reference) == 64
    assert load_model(str(moved)).fingerprint == reference
    assert load_model(str(plain), scheduler="ddpm").fingerprint == reference
    assert load_model(str(plain), scheduler="ddim").fingerprint != reference
    tensors = load_file(moved / UNET)
    tensors["conv_in.bias"] += 1
    save_file(tensors, moved / UNET)
    assert load_model(str(moved)).fingerprint != reference


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("flow-")])
def test_scheduler_by_short_name(text: Path, name: str) -> None:
    scheduler = load_model(str(text), scheduler=name).pipeline.scheduler
    assert type(scheduler).__name__ == SCHEDULERS[name]
    # The noise schedule stays the model's.
    assert scheduler.config.steps_offset == 1 or not hasattr(scheduler.config, "steps_offset")
    assert scheduler_class(SCHEDULERS[name]) == SCHEDULERS[name]


def test_schedulers_of_flow_matching_and_of_noise_do_not_mix(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="DDIMScheduler is for noise prediction, FlowMatchEulerDiscreteScheduler for"):
        load_model(str(text), scheduler="flow-euler")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="would misread what the network predicts") as caught:
        build_scheduler(tmp_path, "euler")
    assert caught.value.hint == "choose one of the model's own kind with --scheduler: flow-euler, flow-heun"
    assert type(build_scheduler(tmp_path, "flow-heun")).__name__ == "FlowMatchHeunDiscreteScheduler"


def test_unconditional_pipelines_follow_the_scheduler(plain: Path) -> None:
    assert type(load_model(str(plain), scheduler="ddim").pipeline).__name__ == "DDIMPipeline"
    assert type(load_model(str(plain), scheduler="dpm-solver").pipeline).__name__ == "DDPMPipeline"
    with pytest.raises(ModelError, match="ddim, ddpm, dpm-solver"):
        load_model(str(plain), scheduler="euler")


def test_pipeline_from_folder_takes_a_replacement_without_weights(text: Path, tmp_path: Path) -> None:
    folder = copy(text, tmp_path / "bundle")
    (folder / UNET).unlink()
    denoiser = load_model(str(text)).denoiser
    assert pipeline_from_folder(folder, {"unet": denoiser}).unet is denoiser
    with pytest.raises(ModelError, match="unet"):
        pipeline_from_folder(folder, {})


# Refused


def test_bare_unet_without_scheduler_is_taught(plain: Path, tmp_path: Path) -> None:
    bare = copy(plain / "unet", tmp_path / "bare")
    with pytest.raises(ModelError, match=r"DDPMScheduler.*save_pretrained"):
        load_model(str(bare))


def test_unet_inside_a_pipeline_points_to_the_pipeline(text: Path) -> None:
    with pytest.raises(ModelError, match="give the pipeline's folder"):
        load_model(str(text / "unet"))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("emojii", "did you mean 'emoji'"),
        ("SD14", "did you mean 'sd14'"),
        ("zzz", "presets: emoji"),
        ("", "no model given"),
        ("./nowhere", "./nowhere does not exist"),
        ("~/nowhere/at/all", "does not exist"),
        ("a/b/c", "a/b/c does not exist"),
    ],
)
def test_names_that_lead_nowhere(model: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(model)
    assert says in str(caught.value)


def test_paths_that_are_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"neither model_index\.json nor config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ModelError, match="dmqexport convert"):
        load_model(str(tmp_path / "model.ckpt"))
    # Looks like a hub id, but its first part is a folder here: a typing mistake must not become a download.
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="the folder models/mine does not exist"):
        load_model("models/mine")
    with pytest.raises(ModelError):
        load_model("x" * 5000)


def test_unknown_scheduler_lists_the_known(plain: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(plain), scheduler="dim")
    assert "did you mean 'ddim'" in str(caught.value)
    assert all(name in str(caught.value) for name in SCHEDULERS)


def test_unknown_embeddings(plain: Path) -> None:
    with pytest.raises(ModelError, match="random"):
        load_model(str(plain), embeddings="zeros")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [UNET, "unet/config.json", "scheduler/scheduler_config.json"])
def test_unreadable_files(plain: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Not by chmod: whoever runs the tests as root may read everything.
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self == plain / name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match=f"{name} cannot be read: permission"):
        load_model(str(plain))


# The model hub


def _answered(kind: type[Exception]) -> Exception:
    """A hub error as raised, without the HTTP client's response object, whose package differs between releases."""
    return kind.__new__(kind, kind.__name__)


@dataclass(frozen=True)
class HubFailure:
    error: Exception
    kind: type[DmqExportError]
    says: str


@pytest.mark.parametrize(
    "failure",
    [
        HubFailure(_answered(hub_errors.GatedRepoError), ModelError, "accept them"),
        HubFailure(_answered(hub_errors.RepositoryNotFoundError), ModelError, "no model org/name"),
        HubFailure(_answered(hub_errors.RevisionNotFoundError), ModelError, "no revision 'v9'"),
        HubFailure(hub_errors.LocalEntryNotFoundError("offline"), ModelError, "cannot be reached"),
        HubFailure(hub_errors.OfflineModeIsEnabled("offline"), ModelError, "HF_HUB_OFFLINE"),
        HubFailure(ConnectionResetError("reset"), ModelError, "cannot be reached"),
        HubFailure(hub_errors.HFValidationError("bad id"), ModelError, "valid hub id"),
        HubFailure(OSError(28, "No space left on device"), ResourceError, "HF_HOME"),
        HubFailure(PermissionError(13, "denied"), ResourceError, "HF_HOME"),
        HubFailure(RuntimeError("odd"), ModelError, "RuntimeError: odd"),
    ],
    ids=lambda failure: type(failure.error).__name__,
)
def test_hub_failures_say_what_to_do(failure: HubFailure, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> str:
        raise failure.error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(failure.kind, match=failure.says) as caught:
        load_model("org/name", revision="v9")
    assert caught.value.__cause__ is failure.error


def test_hub_model_fetches_only_what_is_needed(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(hub_id=hub_id, revision=revision, patterns=allow_patterns)
        return str(text)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = load_model("sd15", revision="main")
    assert asked["hub_id"] == PRESETS["sd15"].hub_id
    assert (loaded.name, loaded.source, loaded.preset) == ("sd15", "sd15", PRESETS["sd15"])
    offered = {
        "model_index.json": True,
        "unet/config.json": True,
        "unet/diffusion_pytorch_model.safetensors": True,
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": True,
        "text_encoder/model.safetensors": True,
        "tokenizer/merges.txt": True,
        "scheduler/scheduler_config.json": True,
        "unet/diffusion_pytorch_model.bin": False,
        "unet/diffusion_pytorch_model.fp16.safetensors": False,
        "unet/diffusion_pytorch_model.non_ema.safetensors": False,
        "safety_checker/model.safetensors": False,
        "v1-5-pruned.safetensors": False,
        "v1-5-pruned.ckpt": False,
    }
    from huggingface_hub.utils import filter_repo_objects

    assert set(filter_repo_objects(offered, allow_patterns=asked["patterns"])) == {k for k, v in offered.items() if v}
    # The same model by its hub id is the same preset.
    assert load_model("google/ddpm-cifar10-32".replace("google/ddpm-cifar10-32", PRESETS["sd14"].hub_id or "")).preset


def test_hub_id_without_cache_and_network_is_a_teaching_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not in the local cache"):
        locate.download("org/name", None)


# Prompts


def test_prompts() -> None:
    assert len(set(text_prompts())) == 64
    judged = {emoji.captions()[row] for row in emoji.retrieval_indices(200)}
    assert len(emoji_prompts()) == 1155
    assert not judged & set(emoji_prompts())


def test_nothing_is_written_to_the_terminal(text: Path, plain: Path) -> None:
    code = """
import sys
from dmqexport.models.loading import load_model
from dmqexport.models.sampling import sample_images
for name in sys.argv[1:]:
    loaded = load_model(name)
    sample_images(loaded, None, [1], steps=2, guidance=3.0, batch_size=1, record=True)
    long = ["word " * 100] if loaded.default_prompts else None
    sample_images(loaded, long, [1], steps=2, guidance=3.0, batch_size=1)
"""
    command = [sys.executable, "-c", code, "emoji", str(text), str(plain)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (answer.stdout, answer.stderr) == ("", "")
