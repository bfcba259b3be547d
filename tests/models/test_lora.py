"""Adapters are added to the weights exactly, whatever their layout, or refused in words that help."""

import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from diffusers.utils import USE_PEFT_BACKEND
from safetensors.torch import save_file
from torch import Tensor, nn

from dmqexport.errors import BackendMissingError, ModelError, RecipeError
from dmqexport.models.loading import LoadedModel, load_model
from dmqexport.models.lora import fuse_loras, parse_lora
from dmqexport.pipeline_bundle import _copy_companions
from tests.models import tiny_families
from tests.models.tiny_pipelines import save_text, save_unconditional

#: a linear layer of attention, one with a list index in its name, a 1 × 1 and a 3 × 3 convolution.
LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
)
RANK = 3

assert USE_PEFT_BACKEND, "these tests need the lora extra: pip install -e '.[lora]'"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("lora") / "tiny-text")


@pytest.fixture(scope="module")
def plain(text: Path) -> LoadedModel:
    return load_model(str(text))


def _factors(layer: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """(A, B) of a linear layer or a convolution, as adapters store them."""
    generator = torch.Generator().manual_seed(seed)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    first = torch.randn((RANK, *weight.shape[1:]), generator=generator)
    second = torch.randn((weight.shape[0], RANK, *(1 for _ in weight.shape[2:])), generator=generator)
    return first, second


def _product(first: Tensor, second: Tensor) -> Tensor:
    return (second.flatten(1).double() @ first.flatten(1).double()).reshape(second.shape[0], *first.shape[1:])


def _diffusers(name: str, first: Tensor, second: Tensor, alpha: float | None) -> dict[str, Tensor]:
    assert alpha is None
    return {f"unet.{name}.lora.down.weight": first, f"unet.{name}.lora.up.weight": second}


def _peft(name: str, first: Tensor, second: Tensor, alpha: float | None) -> dict[str, Tensor]:
    assert alpha is None
    return {f"unet.{name}.lora_A.weight": first, f"unet.{name}.lora_B.weight": second}


def _kohya(name: str, first: Tensor, second: Tensor, alpha: float | None) -> dict[str, Tensor]:
    stem = "lora_unet_" + name.replace(".", "_")
    pair = {f"{stem}.lora_down.weight": first, f"{stem}.lora_up.weight": second}
    return pair if alpha is None else {**pair, f"{stem}.alpha": torch.tensor(alpha)}


def _save(path: Path, model: LoadedModel, layout: Callable[..., dict[str, Tensor]], alpha: float | None = None) -> Path:
    state: dict[str, Tensor] = {}
    for seed, name in enumerate(LAYERS):
        state |= layout(name, *_factors(model.denoiser.get_submodule(name), seed), alpha)
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("layout", "alpha"),
    [(_diffusers, None), (_peft, None), (_kohya, None), (_kohya, 2.0)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_weights_are_w_plus_scaled_product(
    layout: Callable[..., dict[str, Tensor]],
    alpha: float | None,
    scale: float,
    text: Path,
    plain: LoadedModel,
    tmp_path: Path,
) -> None:
    path = _save(tmp_path / "style.safetensors", plain, layout, alpha)
    fused = load_model(str(text), loras=[f"{path}:{scale}"])
    before, after = plain.denoiser.state_dict(), fused.denoiser.state_dict()
    assert before.keys() == after.keys()
    strength = scale * (1.0 if alpha is None else alpha / RANK)
    changed = {
        f"{name}.weight": strength * _product(*_factors(plain.denoiser.get_submodule(name), seed))
        for seed, name in enumerate(LAYERS)
    }
    for name, weight in before.items():
        expected = weight.double() + changed.get(name, 0.0)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert [type(module) for module in fused.denoiser.modules()] == [type(m) for m in plain.denoiser.modules()]
    assert not any(parameter.requires_grad for parameter in fused.denoiser.parameters())
    assert [(each.file, each.scale, each.parts, each.pairs) for each in fused.loras] == [
        ("style.safetensors", scale, ("unet",), len(LAYERS))
    ]


def test_text_encoders_are_reached_and_several_files_add_up(text: Path, plain: LoadedModel, tmp_path: Path) -> None:
    encoder = plain.pipeline.text_encoder
    name = next(name for name, _ in encoder.named_modules() if name.endswith("q_proj"))
    first, second = _factors(encoder.get_submodule(name), 9)
    stem = f"text_encoder.{name}.lora_linear_layer"
    save_file({f"{stem}.down.weight": first, f"{stem}.up.weight": second}, tmp_path / "words.safetensors")
    style = _save(tmp_path / "style.safetensors", plain, _peft)
    fused = load_model(str(text), loras=[f"{tmp_path / 'words.safetensors'}:2", str(style), f"{style}:0.5"])
    got = fused.pipeline.text_encoder.get_submodule(name).weight.double()
    expected = encoder.get_submodule(name).weight.double() + 2 * _product(first, second)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    layer = plain.denoiser.get_submodule(LAYERS[0])
    expected = layer.weight.double() + 1.5 * _product(*_factors(layer, 0))
    torch.testing.assert_close(fused.denoiser.get_submodule(LAYERS[0]).weight.double(), expected, rtol=1e-6, atol=2e-6)
    assert [each.parts for each in fused.loras] == [("text_encoder",), ("unet",), ("unet",)]


@dataclass(frozen=True)
class Other:
    """A pipeline of another family: its class, denoiser, and two layers that adapters of it change."""

    pipeline: Any
    make: Callable[[], nn.Module]
    layers: tuple[str, str]


_OTHERS = [
    Other(
        StableDiffusionXLPipeline,
        tiny_families.sdxl,
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_k", "up_blocks.1.resnets.0.conv_shortcut"),
    ),
    Other(
        StableDiffusion3Pipeline,
        tiny_families.sd3,
        ("transformer_blocks.0.attn.add_q_proj", "transformer_blocks.1.ff.net.0.proj"),
    ),
    Other(
        FluxPipeline,
        lambda: tiny_families.flux(guidance=True),
        ("transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_mlp"),
    ),
]


@pytest.mark.parametrize("other", _OTHERS, ids=lambda other: other.pipeline.__name__)
def test_adapters_of_other_families(other: Other, tmp_path: Path) -> None:
    denoiser = other.make()
    component = "unet" if other.pipeline is StableDiffusionXLPipeline else "transformer"
    names = inspect.signature(other.pipeline.__init__).parameters.keys() - {"self", "add_watermarker"}
    parts = {name: None for name in names if "image" not in name and "feature" not in name and "force" not in name}
    pipeline = other.pipeline(**{**parts, component: denoiser, "scheduler": DDIMScheduler()})
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    state: dict[str, Tensor] = {}
    for seed, name in enumerate(other.layers):
        first, second = _factors(denoiser.get_submodule(name), seed)
        state |= {f"{component}.{name}.lora_A.weight": first, f"{component}.{name}.lora_B.weight": second}
        before[f"{name}.weight"] = (before[f"{name}.weight"].double() + 0.5 * _product(first, second)).float()
    save_file(state, tmp_path / "style.safetensors")
    (fused,) = fuse_loras(pipeline, [f"{tmp_path / 'style.safetensors'}:0.5"])
    assert (fused.parts, fused.pairs) == ((component,), 2)
    after = denoiser.state_dict()
    assert after.keys() == before.keys()
    for name, expected in before.items():
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-6)


def test_text_encoders_of_kohyas_layout(text: Path, plain: LoadedModel, tmp_path: Path) -> None:
    encoder = plain.pipeline.text_encoder
    ends = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # kohya's trainer writes all of a layer
    names = [name for name, _ in encoder.named_modules() if name.endswith(ends)]
    state: dict[str, Tensor] = {}
    for seed, name in enumerate(names):
        first, second = _factors(encoder.get_submodule(name), seed)
        stem = "lora_te_text_model_" + name.removeprefix("text_model.").replace(".", "_")
        state |= {
            f"{stem}.lora_down.weight": first,
            f"{stem}.lora_up.weight": second,
            f"{stem}.alpha": torch.tensor(1.5),
        }
    save_file(state, tmp_path / "words.safetensors")
    fused = load_model(str(text), loras=[str(tmp_path / "words.safetensors")])
    assert [(each.parts, each.pairs) for each in fused.loras] == [(("text_encoder",), len(ends))]
    for seed, name in enumerate(names):
        layer = encoder.get_submodule(name)
        expected = layer.weight.double() + 1.5 / RANK * _product(*_factors(layer, seed))
        got = fused.pipeline.text_encoder.get_submodule(name).weight.double()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_the_bundle_gets_the_text_encoder_that_calibration_saw(text: Path, plain: LoadedModel, tmp_path: Path) -> None:
    encoder = plain.pipeline.text_encoder
    name = next(name for name, _ in encoder.named_modules() if name.endswith("q_proj"))
    stem = f"text_encoder.{name}.lora_linear_layer"
    first, second = _factors(encoder.get_submodule(name), 4)
    save_file({f"{stem}.down.weight": first, f"{stem}.up.weight": second}, tmp_path / "words.safetensors")
    fused = load_model(str(text), loras=[str(tmp_path / "words.safetensors")])
    (tmp_path / "bundle").mkdir()
    _copy_companions(cast(Any, SimpleNamespace(model=fused)), tmp_path / "bundle")
    shutil.copytree(text / "unet", tmp_path / "bundle" / "unet")
    stored = load_model(str(tmp_path / "bundle")).pipeline.text_encoder.state_dict()
    assert all(torch.equal(stored[key], value) for key, value in fused.pipeline.text_encoder.state_dict().items())
    assert not torch.equal(stored[f"{name}.weight"], encoder.state_dict()[f"{name}.weight"])


def test_fingerprint_follows_content_scale_and_order_but_not_the_place(
    text: Path, plain: LoadedModel, tmp_path: Path
) -> None:
    one = _save(tmp_path / "one.safetensors", plain, _peft)
    two = _save(tmp_path / "two.safetensors", plain, _kohya)
    moved = Path(shutil.copy(one, tmp_path / "moved.safetensors"))
    prints = {
        texts: load_model(str(text), loras=list(texts)).fingerprint
        for texts in (
            (),
            (f"{one}",),
            (f"{moved}:1.0",),
            (f"{one}:0.5",),
            (f"{one}", f"{two}"),
            (f"{two}", f"{one}"),
        )
    }
    assert prints[(f"{one}",)] == prints[(f"{moved}:1.0",)]
    assert prints[()] == plain.fingerprint
    assert len(set(prints.values())) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.75", ("a.safetensors", 0.75)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        ("C:\\loras\\a.safetensors", ("C:\\loras\\a.safetensors", 1.0)),
        ("v1:final", ("v1:final", 1.0)),
    ],
)
def test_scale_follows_the_last_colon(text: str, expected: tuple[str, float]) -> None:
    path, scale = parse_lora(text)
    assert (str(path), scale) == expected


@pytest.mark.parametrize(
    ("text", "words"), [("a.safetensors:strong", "'strong' is no number"), ("a.safetensors:nan", "finite number")]
)
def test_scales_that_are_no_numbers_are_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_lora(text)


@dataclass(frozen=True)
class Refusal:
    """A file that is not an adapter of the model, and what the message must say."""

    name: str
    words: str
    make: Callable[[Path, LoadedModel], Any]


def _wrong_layer(path: Path, model: LoadedModel) -> None:
    first, second = _factors(model.denoiser.get_submodule(LAYERS[0]), 0)
    good = _peft(LAYERS[0], first, second, None)
    save_file({**good, **_peft(LAYERS[0].replace("down_blocks.0", "down_blocks.7"), first * 2, second * 2, None)}, path)


def _no_layer(path: Path, model: LoadedModel) -> None:
    save_file(_peft("decoder.deep.layer", *_factors(model.denoiser.get_submodule(LAYERS[0]), 0), None), path)


def _other_part(path: Path, model: LoadedModel) -> None:
    pair = _peft(LAYERS[0], *_factors(model.denoiser.get_submodule(LAYERS[0]), 0), None)
    save_file({name.replace("unet.", "text_encoder_2."): tensor for name, tensor in pair.items()}, path)


def _wrong_shape(path: Path, model: LoadedModel) -> None:
    save_file(_peft(LAYERS[0], torch.ones(RANK, 5), torch.ones(5, RANK), None), path)


def _dora(path: Path, model: LoadedModel) -> None:
    pair = _kohya(LAYERS[0], *_factors(model.denoiser.get_submodule(LAYERS[0]), 0), None)
    save_file({**pair, "lora_unet_x.dora_scale": torch.ones(1)}, path)


_REFUSALS = [
    Refusal("none.safetensors", "does not exist", lambda path, _: None),
    Refusal("style.ckpt", "is a pickle, which can run any code", lambda path, _: torch.save({}, path)),
    Refusal("style.txt", "is no safetensors", lambda path, _: path.write_text("hello")),
    Refusal("cut.safetensors", "truncated", lambda path, _: path.write_bytes(b"123456789")),
    Refusal("model.safetensors", "no low-rank factors", lambda path, _: save_file({"a": torch.ones(1)}, path)),
    Refusal("layer.safetensors", r"1 of 2 pairs of factors match no layer .* first .*down_blocks.7", _wrong_layer),
    Refusal("strange.safetensors", "does not fit|match no layer", _no_layer),
    Refusal("sdxl.safetensors", "match no layer|does not fit", _other_part),
    Refusal("shape.safetensors", "does not fit StableDiffusionPipeline", _wrong_shape),
    Refusal("dora.safetensors", "is a DoRA adapter", _dora),
    Refusal(
        "nan.safetensors",
        "holds NaN",
        lambda path, _: save_file(_peft(LAYERS[0], torch.full((RANK, 8), torch.nan), torch.ones(8, RANK), None), path),
    ),
]


@pytest.mark.parametrize("case", _REFUSALS, ids=lambda case: case.name)
def test_files_that_do_not_fit_are_refused(case: Refusal, text: Path, plain: LoadedModel, tmp_path: Path) -> None:
    case.make(tmp_path / case.name, plain)
    with pytest.raises(ModelError, match=case.words) as caught:
        load_model(str(text), loras=[str(tmp_path / case.name)])
    assert caught.value.hint


def test_models_without_adapters_say_so(plain: LoadedModel, tmp_path: Path) -> None:
    path = _save(tmp_path / "style.safetensors", plain, _peft)
    save_unconditional(tmp_path / "ddpm")
    with pytest.raises(ModelError, match="fuses no adapters into a DDPMPipeline"):
        load_model(str(tmp_path / "ddpm"), loras=[str(path)])


def test_without_peft_the_extra_is_named(
    text: Path, plain: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _save(tmp_path / "style.safetensors", plain, _peft)
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with pytest.raises(BackendMissingError, match="needs the library peft") as caught:
        load_model(str(text), loras=[str(path)])
    assert caught.value.hint == "pip install 'dmqexport[lora]'"
    assert fuse_loras(plain.pipeline, []) == ()
