"""Folders of models that are damaged, or of a kind that is not supported, are refused with their reason."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmqexport.errors import ModelError
from dmqexport.models import emoji
from dmqexport.models.loading import load_model
from tests.models.tiny_pipelines import WIDTH, copy

UNET = "unet/diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_network")


@dataclass(frozen=True)
class Damage:
    name: str
    harm: Callable[[Path], Any]
    says: tuple[str, ...]
    model: str = "text"


def _edit(path: Path, **changes: Any) -> None:
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = UNET) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def _pickle(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGES = [
    Damage("no weights", lambda f: (f / UNET).unlink(), ("unet", "no weights", "diffusion_pytorch_model.safetensors")),
    Damage("only pickles", _pickle, ("diffusion_pytorch_model.bin", "pickle", "safe_serialization")),
    Damage("truncated weights", _bytes(UNET, lambda b: b[:-100]), (UNET, "truncated", "expected")),
    Damage("truncated header", _bytes(UNET, lambda b: b[:50]), (UNET, "truncated")),
    Damage("empty file", _bytes(UNET, lambda b: b""), (UNET, "0 bytes")),
    Damage("bytes appended", _bytes(UNET, lambda b: b + b"xx"), (UNET, "damaged", "expected")),
    Damage("header of garbage", _bytes(UNET, lambda b: b[:8] + b"\xff" * (len(b) - 8)), (UNET, "damaged", "header")),
    Damage("header of a list", _bytes(UNET, lambda b: (2).to_bytes(8, "little") + b"[]"), (UNET, "damaged")),
    Damage("lfs pointer", _bytes(UNET, lambda b: b"version https://git-lfs.github.com/spec/v1\n"), (UNET, "lfs pull")),
    Damage(
        "truncated autoencoder",
        _bytes("vae/diffusion_pytorch_model.safetensors", lambda b: b[:-1]),
        ("vae/diffusion_pytorch_model.safetensors", "truncated"),
    ),
    Damage(
        "NaN weights",
        lambda f: _tensors(f, lambda t: t["conv_in.weight"].view(-1)[3].fill_(float("nan"))),
        ("conv_in.weight", "1 NaN", "unet"),
    ),
    Damage(
        "infinite text encoder",
        lambda f: _tensors(
            f, lambda t: t[sorted(t)[0]].view(-1)[:2].fill_(float("inf")), "text_encoder/model.safetensors"
        ),
        ("text_encoder", "2 NaN or infinite"),
    ),
    Damage("tensor missing", lambda f: _tensors(f, lambda t: t.pop("conv_out.bias")), ("lack 1 ", "conv_out.bias")),
    Damage(
        "tensor unknown",
        lambda f: _tensors(f, lambda t: t.update(extra=torch.zeros(1))),
        ("does not know", "first extra"),
    ),
    Damage(
        "wrong shape",
        lambda f: _tensors(f, lambda t: t.update({"conv_in.weight": torch.zeros(8, 5, 3, 3)})),
        ("unet", "conv_in.weight"),
    ),
    Damage(
        "text encoder tensor missing",
        lambda f: _tensors(f, lambda t: t.pop(sorted(t)[0]), "text_encoder/model.safetensors"),
        ("text_encoder", "lack 1 "),
    ),
    Damage("no scheduler", lambda f: shutil.rmtree(f / "scheduler"), ("scheduler",)),
    Damage(
        "no scheduler file", lambda f: (f / "scheduler/scheduler_config.json").unlink(), ("scheduler_config", "guessed")
    ),
    Damage(
        "unknown scheduler",
        lambda f: _edit(f / "scheduler/scheduler_config.json", _class_name="MagicScheduler"),
        ("MagicScheduler", "--scheduler"),
    ),
    Damage(
        "scheduler is no scheduler",
        lambda f: _edit(f / "scheduler/scheduler_config.json", _class_name="UNet2DModel"),
        ("UNet2DModel", "no scheduler"),
    ),
    Damage(
        "bad noise schedule",
        lambda f: _edit(f / "scheduler/scheduler_config.json", beta_schedule="magic"),
        ("refuses this configuration",),
    ),
    Damage("index is no JSON", _bytes("model_index.json", lambda b: b[:-5]), ("model_index.json", "JSON")),
    Damage("index is a list", _bytes("model_index.json", lambda b: b"[]"), ("model_index.json", "list")),
    Damage("config is no JSON", _bytes("unet/config.json", lambda b: b"{"), ("unet/config.json", "JSON")),
    Damage(
        "other pipeline",
        lambda f: _edit(f / "model_index.json", _class_name="KandinskyPipeline"),
        ("KandinskyPipeline", "StableDiffusionPipeline"),
    ),
    Damage(
        "other denoiser",
        lambda f: _edit(f / "model_index.json", unet=["diffusers", "UNet1DModel"]),
        ("UNet1DModel", "supported"),
    ),
    Damage(
        "custom code",
        lambda f: _edit(f / "model_index.json", vae=["my_vae", "MyVae"]),
        ("my_vae.MyVae", "not run"),
    ),
    Damage(
        "class that does not exist",
        lambda f: _edit(f / "model_index.json", vae=["diffusers", "AutoencoderMagic"]),
        ("AutoencoderMagic", "vae"),
    ),
    Damage("no tokenizer named", lambda f: _edit(f / "model_index.json", tokenizer=...), ("names no tokenizer",)),
    Damage("tokenizer folder gone", lambda f: shutil.rmtree(f / "tokenizer"), ("no folder tokenizer",)),
    Damage("tokenizer damaged", _bytes("tokenizer/tokenizer.json", lambda b: b[:-9]), ("tokenizer", "loaded")),
    Damage(
        "text encoder of another model",
        lambda f: shutil.copytree(emoji.pipeline_folder() / "text_encoder", f / "text_encoder", dirs_exist_ok=True),
        ("128", str(WIDTH)),
    ),
    Damage(
        "class-conditional",
        lambda f: (
            _edit(f / "unet/config.json", class_embed_type="timestep"),
            _tensors(f, lambda t: t.update({"class_embedding.weight": torch.zeros(10, 32)})),
        ),
        ("class",),
        "plain",
    ),
    Damage("no sample size", lambda f: _edit(f / "unet/config.json", sample_size=None), ("sample_size",), "plain"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damaged_folder_is_refused_with_its_reason(damage: Damage, tmp_path: Path, request: Any) -> None:
    folder = copy(request.getfixturevalue(damage.model), tmp_path / "model")
    damage.harm(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    for word in damage.says:
        assert word in str(caught.value)
