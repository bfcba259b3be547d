"""Conversions are held against the original networks: the same weights must give the same answers."""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from dmqexport.errors import ModelError, RecipeError
from dmqexport.models.class_pipeline import ClassEmbedder, LdmClassPipeline
from dmqexport.models.convert import convert, convert_as
from dmqexport.models.fixed_heads_unet import FixedHeadsUNet2DModel
from dmqexport.models.originals import ORIGINALS, PROVENANCE, Autoencoder, DdimOriginal, LdmOriginal
from tests.models.original_networks import DdimNetwork, LdmModel, randomize

_STAGE = Autoencoder(multipliers=(1, 2, 2), latent_channels=3, codes=32, channels=8, blocks=1, groups=4)

DDIM = DdimOriginal(
    size=8, multipliers=(1, 2, 2), attention=(1,), variance="fixed_large", channels=8, blocks=2, groups=4
)
#: bedroom's kind: convolutions between levels, heads of one width.
PLAIN = LdmOriginal(
    size=8, channels=16, multipliers=(1, 2, 3), attention=(1, 2), first_stage=_STAGE, head_channels=8, groups=8
)
#: church's kind: residual blocks between levels, norms scaled by time, one number of heads, a KL first stage.
SHIFTED = LdmOriginal(
    size=8,
    channels=16,
    multipliers=(1, 2, 2, 3),
    attention=(0, 2),
    first_stage=replace(_STAGE, codes=None, latent_channels=4),
    heads=4,
    beta_end=0.0155,
    resample_in_blocks=True,
    scaled=True,
    blocks=1,
    groups=4,
)
#: ImageNet's kind: spatial transformers over class vectors.
CLASSES = replace(PLAIN, head_channels=None, heads=1, classes=11, context=12)


def _input(channels: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, channels, size, size, generator=generator), torch.tensor([0, 17, 999])


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _ddim(folder: Path, facts: DdimOriginal = DDIM) -> tuple[DdimNetwork, Path]:
    network = randomize(DdimNetwork(facts), 1)
    path = folder / "model.ckpt"
    torch.save(network.state_dict(), path)
    return network, path


def _ldm(folder: Path, facts: LdmOriginal) -> tuple[LdmModel, LdmModel, Path]:
    """(plain, moving average, checkpoint), saved as pytorch-lightning does."""
    plain, averaged = randomize(LdmModel(facts), 1), randomize(LdmModel(facts), 2)
    path = folder / "model.ckpt"
    torch.save({"epoch": 3, "global_step": 7, "state_dict": plain.checkpoint(averaged)}, path)
    return plain, averaged, path


@torch.no_grad()
def test_ddim_unet_answers_as_the_original(tmp_path: Path) -> None:
    network, path = _ddim(tmp_path)
    convert_as(path, DDIM, "ddpm-cifar10", tmp_path / "out")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    sample, timestep = _input(3)
    assert _relative(unet(sample, timestep).sample, network(sample, timestep)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("facts", [PLAIN, SHIFTED, replace(SHIFTED, attention=(0, 1, 2), heads=2)])
def test_ldm_unet_and_autoencoder_answer_as_the_original(facts: LdmOriginal, tmp_path: Path) -> None:
    _, averaged, path = _ldm(tmp_path, facts)
    made = convert_as(path, facts, "ldm-church", tmp_path / "out")
    assert made.averaged
    kind = FixedHeadsUNet2DModel if facts.heads else diffusers.UNet2DModel
    unet = kind.from_pretrained(tmp_path / "out" / "unet").eval()
    sample, timestep = _input(facts.first_stage.latent_channels)
    assert _relative(unet(sample, timestep).sample, averaged.unet(sample, timestep)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("facts", [CLASSES, replace(CLASSES, heads=None, head_channels=8)])
def test_class_conditional_unet_answers_as_the_original(facts: LdmOriginal, tmp_path: Path) -> None:
    plain, averaged, path = _ldm(tmp_path, facts)
    convert_as(path, facts, "ldm-imagenet", tmp_path / "out")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").eval()
    embedder = ClassEmbedder.from_pretrained(tmp_path / "out" / "class_embedder")
    sample, timestep = _input(3)
    context = embedder(torch.tensor([0, 4, 10]))
    assert torch.equal(context[:, 0], plain.cond_stage_model.embedding.weight[[0, 4, 10]])
    got = unet(sample, timestep, context).sample
    assert _relative(got, averaged.unet(sample, timestep, context)) <= 1e-5


def test_names_agree_with_the_conversion_that_diffusers_ships(tmp_path: Path) -> None:
    plain, _, path = _ldm(tmp_path, CLASSES)
    convert_as(path, CLASSES, "ldm-imagenet", tmp_path / "out", averaged=False)
    ours = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    theirs = convert_ldm_unet_checkpoint(plain.checkpoint(), dict(ours.config))
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.state_dict().items())


@torch.no_grad()
def test_vector_quantized_autoencoder_answers_as_the_original(tmp_path: Path) -> None:
    plain, _, path = _ldm(tmp_path, PLAIN)
    convert_as(path, PLAIN, "ldm-bedroom", tmp_path / "out")
    stage, original = diffusers.VQModel.from_pretrained(tmp_path / "out" / "vqvae"), plain.first_stage_model
    latents, _ = _input(3)
    assert _relative(stage.decode(latents).sample, original.decode(latents)) <= 1e-5
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    assert _relative(stage.encode(pictures).latents, original.encode(pictures)) <= 1e-5
    assert stage.config.scaling_factor == 1.0


@torch.no_grad()
def test_kl_autoencoder_answers_as_the_original(tmp_path: Path) -> None:
    plain, _, path = _ldm(tmp_path, SHIFTED)
    convert_as(path, SHIFTED, "ldm-church", tmp_path / "out")
    stage, original = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / "vqvae"), plain.first_stage_model
    latents, _ = _input(4)
    assert _relative(stage.decode(latents).sample, original.decode(latents)) <= 1e-5
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    moments = original.encode(pictures)
    assert _relative(stage.encode(pictures).latent_dist.mean, moments.chunk(2, dim=1)[0]) <= 1e-5
    assert stage.config.scaling_factor == pytest.approx(0.23)


@torch.no_grad()
def _ddim_sampling(
    alphas: Tensor, timesteps: list[int], last: float, noise: Callable[..., Tensor], x: Tensor
) -> Tensor:
    """Equation 12 of DDIM without noise, from the largest timestep down."""
    for index in reversed(range(len(timesteps))):
        here, before = alphas[timesteps[index]], alphas[timesteps[index - 1]] if index else torch.tensor(last)
        e = noise(x, torch.full((len(x),), timesteps[index]))
        x = before.sqrt() * (x - (1 - here).sqrt() * e) / here.sqrt() + (1 - before).sqrt() * e
    return x


@torch.no_grad()
def test_ddim_pipeline_samples_as_the_original(tmp_path: Path) -> None:
    network, path = _ddim(tmp_path)
    convert_as(path, DDIM, "ddpm-cifar10", tmp_path / "out")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    got = pipeline(generator=torch.Generator().manual_seed(9), num_inference_steps=5, output_type="np").images
    # runners/diffusion.py: every 200th step from 0; the step before the first has no noise at all.
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    expected = _ddim_sampling(alphas, [0, 200, 400, 600, 800], 1.0, network, start)
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float(expected.std()) > 0.05
    assert float((torch.from_numpy(got) - expected).abs().max()) <= 1e-4


@torch.no_grad()
def test_ldm_pipeline_samples_as_the_original(tmp_path: Path) -> None:
    _, averaged, path = _ldm(tmp_path, SHIFTED)
    convert_as(path, SHIFTED, "ldm-church", tmp_path / "out")
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []
    pipeline.vqvae.decode = lambda latents: (
        seen.append(latents) or diffusers.AutoencoderKL.decode(pipeline.vqvae, latents)
    )
    pipeline(generator=torch.Generator().manual_seed(9), num_inference_steps=5, output_type="np")
    # ldm/models/diffusion/ddim.py: every 200th step from 1; the last ends on the first training step's level.
    alphas = averaged.alphas_cumprod
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    expected = _ddim_sampling(alphas, [1, 201, 401, 601, 801], float(alphas[0]), averaged.unet, start) / 0.23
    assert _relative(seen[0], expected) <= 1e-4


@torch.no_grad()
def test_class_pipeline_guides_as_the_original(tmp_path: Path) -> None:
    plain, averaged, path = _ldm(tmp_path, CLASSES)
    convert_as(path, CLASSES, "ldm-imagenet", tmp_path / "out")
    pipeline = LdmClassPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (9, 10)]
    got = pipeline([2, 5], 3.0, generators, num_inference_steps=4, output_type="latent").images
    vectors = plain.cond_stage_model.embedding.weight

    def noise(x: Tensor, timestep: Tensor) -> Tensor:
        without = averaged.unet(x, timestep, vectors[[10, 10]][:, None])
        return without + 3.0 * (averaged.unet(x, timestep, vectors[[2, 5]][:, None]) - without)

    start = torch.cat([torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (9, 10)])
    alphas = averaged.alphas_cumprod
    expected = _ddim_sampling(alphas, [1, 251, 501, 751], float(alphas[0]), noise, start)
    assert _relative(got, expected) <= 1e-4
    with pytest.raises(ValueError, match="class 10 does not exist, this model has 0 to 9"):
        pipeline([10])


def test_plain_weights_are_taken_when_asked(tmp_path: Path) -> None:
    plain, _, path = _ldm(tmp_path, PLAIN)
    made = convert_as(path, PLAIN, "ldm-bedroom", tmp_path / "out", averaged=False)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert torch.equal(unet.conv_in.weight, plain.model.diffusion_model.input_blocks[0][0].weight)
    assert not made.averaged
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text())["averaged"] is False


def test_training_state_of_ddim_gives_its_average(tmp_path: Path) -> None:
    plain, averaged = randomize(DdimNetwork(DDIM), 1), randomize(DdimNetwork(DDIM), 2)
    states = [{f"module.{key}": value for key, value in each.state_dict().items()} for each in (plain, averaged)]
    torch.save([states[0], {"state": {}, "param_groups": []}, 3, 700, states[1]], tmp_path / "ckpt.pth")
    for flag, source in ((True, averaged), (False, plain)):
        convert_as(tmp_path / "ckpt.pth", DDIM, "ddpm-cifar10", tmp_path / "out", averaged=flag)
        unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
        assert torch.equal(unet.conv_in.weight, source.conv_in.weight)


def test_trainers_bookkeeping_is_read_as_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = randomize(LdmModel(PLAIN), 1)
    name = "pytorch_lightning.callbacks.model_checkpoint"
    kind = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[name].ModelCheckpoint = kind  # type: ignore[attr-defined]
    torch.save({"callbacks": {kind: {"best": 1}}, "state_dict": plain.checkpoint()}, tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert convert_as(tmp_path / "last.ckpt", PLAIN, "ldm-bedroom", tmp_path / "out").parameters > 0


def test_safetensors_and_half_precision_are_taken(tmp_path: Path) -> None:
    network, _ = _ddim(tmp_path)
    save_file({key: value.half() for key, value in network.state_dict().items()}, tmp_path / "model.safetensors")
    convert_as(tmp_path / "model.safetensors", DDIM, "ddpm-cifar10", tmp_path / "out")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert torch.equal(unet.conv_in.weight, network.conv_in.weight.half().float())


def test_full_size_original_converts(tmp_path: Path) -> None:
    """The preset's own numbers, not a test's: ddpm-cifar10 has 35,746,307 parameters, as Ho et al. report 35.7 M."""
    facts = ORIGINALS["ddpm-cifar10"]
    assert isinstance(facts, DdimOriginal)
    torch.save(DdimNetwork(facts).state_dict(), tmp_path / "model-790000.ckpt")
    made = convert(tmp_path / "model-790000.ckpt", "ddpm-cifar10", tmp_path / "out")
    assert made.parameters == 35_746_307
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text())["preset"] == "ddpm-cifar10"


@pytest.mark.parametrize(("name", "millions"), [("ldm-bedroom", 274.1), ("ldm-church", 295.0), ("ldm-imagenet", 400.9)])
def test_full_size_networks_have_the_published_parameters(name: str, millions: float) -> None:
    """Rombach et al., tables 12 and 14: 274 M, 295 M and 400 M parameters."""
    facts = ORIGINALS[name]
    assert isinstance(facts, LdmOriginal)
    with torch.device("meta"):
        model = LdmModel(facts)
    assert sum(p.numel() for p in model.model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


@dataclass
class Refusal:
    """What is broken about a checkpoint, and what the message must say."""

    name: str
    words: str
    make: Callable[[Path, dict[str, Tensor]], None]


_REFUSALS = [
    Refusal("none.ckpt", "does not exist", lambda path, _: None),
    Refusal("model.onnx", "checkpoints end in", lambda path, state: path.write_bytes(b"x")),
    Refusal("short.ckpt", "truncated or no checkpoint", lambda path, _: path.write_bytes(b"PK\x03\x04 and then")),
    Refusal("text.pth", "truncated or no checkpoint|holds more than tensors", lambda p, _: p.write_bytes(b"hello")),
    Refusal("evil.ckpt", "can run any code", lambda p, s: torch.save({"state_dict": s, "x": _Harmful()}, p)),
    Refusal("old.ckpt", "can run any code", lambda p, _: p.write_bytes(pickle.dumps({"x": _Harmful()}))),
    Refusal("list.ckpt", "expected a dictionary", lambda path, _: torch.save([1, 2], path)),
    Refusal("opt.ckpt", "a dictionary of optimizer", lambda path, _: torch.save({"optimizer": {}}, path)),
    Refusal("more.ckpt", "first new.weight", lambda p, s: torch.save({**s, "new.weight": torch.zeros(1)}, p)),
    Refusal(
        "less.ckpt",
        r"lacks conv_in.bias \(1 missing, 0 too many\)",
        lambda p, s: torch.save({k: v for k, v in s.items() if k != "conv_in.bias"}, p),
    ),
    Refusal(
        "wide.ckpt",
        r"first conv_in.bias: got \(9,\), expected \(8,\)",
        lambda p, s: torch.save({**s, "conv_in.bias": torch.zeros(9)}, p),
    ),
    Refusal(
        "nan.ckpt",
        "conv_in.bias holds NaN",
        lambda p, s: torch.save({**s, "conv_in.bias": torch.full((8,), torch.nan)}, p),
    ),
]


@pytest.mark.parametrize("case", _REFUSALS, ids=lambda case: case.name)
def test_broken_checkpoints_are_refused_and_nothing_is_written(
    case: Refusal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.make(tmp_path / case.name, randomize(DdimNetwork(DDIM), 1).state_dict())
    with pytest.raises(ModelError, match=case.words) as caught:
        convert_as(tmp_path / case.name, DDIM, "ddpm-cifar10", tmp_path / "out")
    assert caught.value.hint
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != case.name] == []


@pytest.mark.parametrize(
    ("facts", "change", "words"),
    [
        (PLAIN, {"betas": torch.linspace(1e-4, 0.02, 1000)}, "another noise schedule: betas from 0.000100 to 0.020000"),
        (SHIFTED, {"scale_factor": None}, "holds no scale_factor"),
        (CLASSES, {"cond_stage_model.embedding.weight": None}, "not conditioned on classes"),
        (PLAIN, {"model_ema.diffusion_modeloutbias": 0, "model_ema.diffusion_modelout2bias": None}, "average lacks 1"),
        (PLAIN, {"first_stage_model.": None}, "no pictures can be decoded"),
        (PLAIN, {"model.diffusion_model.": None}, "no latent diffusion model"),
    ],
)
def test_checkpoints_of_other_latent_models_are_refused(
    facts: LdmOriginal, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    state = randomize(LdmModel(facts), 1).checkpoint(randomize(LdmModel(facts), 2))
    for name, value in change.items():
        state = {key: tensor for key, tensor in state.items() if not key.startswith(name)}
        state.update({name: value} if isinstance(value, Tensor) else {})
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=words):
        convert_as(tmp_path / "model.ckpt", facts, "ldm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    _, path = _ddim(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RecipeError, match="holds no earlier conversion; nothing was touched"):
        convert_as(path, DDIM, "ddpm-cifar10", tmp_path / "mine")
    with pytest.raises(RecipeError, match="there is nothing to convert") as caught:
        convert(path, "sd14", tmp_path / "out")
    assert "ldm-bedroom" in str(caught.value)
