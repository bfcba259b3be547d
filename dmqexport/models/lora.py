"""Low-rank adapters fused into a model's weights before anything is calibrated, through diffusers and peft."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from dmqexport.bundle import sha256
from dmqexport.errors import BackendMissingError, DmqExportError, ModelError, RecipeError
from dmqexport.models.weight_files import PICKLES, check_safetensors, file_errors

_PARTS: Final = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
#: Endings of the second factor of a pair, in the layouts that diffusers reads: its own two, kohya's, peft's.
_SECOND: Final = (
    ".lora.up.weight",
    "_lora.up.weight",
    ".lora_up.weight",
    ".lora_B.weight",
    ".lora_linear_layer.up.weight",
)


@dataclass(frozen=True)
class Lora:
    """One fused file. parts: the pipeline's components that it changed; pairs: low-rank factors it holds."""

    file: str
    sha256: str
    scale: float
    parts: tuple[str, ...]
    pairs: int

    @property
    def word(self) -> str:
        """What tells models apart that differ in this alone: content and strength, not the place."""
        return f"lora {self.sha256} {self.scale!r}"


def parse_lora(text: str) -> tuple[Path, float]:
    """Split `FILE[:scale]`; the scale is 1 where there is none. Raises RecipeError for a scale that is no number."""
    name, colon, tail = text.rpartition(":")
    try:
        scale = float(tail) if colon and name else 1.0
    except ValueError:
        # A colon may belong to the file's own name (or to a drive's).
        if Path(text).exists() or not name.lower().endswith((".safetensors", *PICKLES)):
            return Path(text).expanduser(), 1.0
        raise RecipeError(
            f"--lora {text!r}: the scale {tail!r} is no number", hint="e.g. --lora style.safetensors:0.8"
        ) from None
    if not math.isfinite(scale):
        raise RecipeError(f"--lora {text!r}: the scale is {scale}, expected a finite number")
    return Path(name if colon and name else text).expanduser(), scale


def fuse_loras(pipeline: Any, loras: Sequence[str]) -> tuple[Lora, ...]:
    """Add scale · (alpha / rank) · B A of every file in `loras` ("FILE[:scale]"), in order, to the pipeline's weights.

    The pipeline's modules are afterwards what they were before, of the same classes, with other weights. Layouts are
    those that diffusers reads for this pipeline: its own, peft's and kohya's.

    Raises RecipeError for a scale, ModelError for a file that is missing, pickled, damaged, of a kind that cannot be
    fused, or that holds factors for layers the model does not have; BackendMissingError without peft.
    """
    return tuple(_fuse(pipeline, *parse_lora(text)) for text in loras)


def _fuse(pipeline: Any, path: Path, scale: float) -> Lora:
    factors = _read(path)
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(
            f"--lora {path}: diffusers fuses no adapters into a {type(pipeline).__name__}",
            hint="adapters are for whole pipelines of Stable Diffusion 1.x, 2.x, XL, 3.x and FLUX; give the pipeline's "
            "folder, not that of its denoiser",
        )
    _check_peft()
    expected = [name for name, tensor in factors.items() if name.endswith(_SECOND) and bool(tensor.any())]
    try:
        pipeline.load_lora_weights(dict(factors), adapter_name="fused", low_cpu_mem_usage=False)
        reached = {part: list(_reached(getattr(pipeline, part, None))) for part in _PARTS}
        _check_reached(path, pipeline, expected, [name for names in reached.values() for name in names])
        parts = tuple(part for part, names in reached.items() if names)
        pipeline.fuse_lora(components=list(parts), lora_scale=scale)
        pipeline.unload_lora_weights()
    except DmqExportError:
        raise
    except Exception as error:
        # diffusers and peft raise ValueError, RuntimeError, KeyError, ... for adapters that do not fit.
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise ModelError(
            f"--lora {path} does not fit {type(pipeline).__name__}: {type(error).__name__}: {first[:300]}",
            hint="is it an adapter of another model?",
        ) from error
    for part in parts:
        getattr(pipeline, part).eval().requires_grad_(False)
    return Lora(path.name, sha256(path), scale, parts, len(expected))


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors, float32; refuses what diffusers would read otherwise than meant."""
    from safetensors.torch import load_file

    with file_errors(path):
        if not path.is_file():
            what = "is a folder, expected a file" if path.is_dir() else "does not exist"
            raise ModelError(
                f"--lora {path} {what}", hint="give a .safetensors file, e.g. --lora style.safetensors:0.8"
            )
    if path.suffix != ".safetensors":
        why = (
            "is a pickle, which can run any code, and is not opened" if path.suffix in PICKLES else "is no safetensors"
        )
        raise ModelError(
            f"--lora {path} {why}",
            hint="where you trust the file: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)",
        )
    check_safetensors(path)
    factors = load_file(str(path))
    for mark, kind in (("dora_scale", "DoRA"), ("hada_", "LoHa"), ("lokr_", "LoKr")):
        name = next((name for name in factors if mark in name), None)
        if name is not None:
            raise ModelError(
                f"--lora {path} is a {kind} adapter ({name}), which cannot be fused exactly",
                hint="fuse it in the tool that made it, save the model, and give that",
            )
    if not any(name.endswith(_SECOND) for name in factors):
        first = sorted(factors)[0]
        raise ModelError(f"--lora {path} holds no low-rank factors; its first tensor is {first}", hint="is it a model?")
    broken = next((name for name, tensor in factors.items() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        raise ModelError(f"--lora {path}: {broken} holds NaN or infinity", hint="take an earlier checkpoint")
    return {name: tensor.float() for name, tensor in factors.items()}


def _check_peft() -> None:
    from diffusers.utils import USE_PEFT_BACKEND

    if not USE_PEFT_BACKEND:
        raise BackendMissingError("--lora needs the library peft", hint="pip install 'dmqexport[lora]'")


def _reached(module: nn.Module | None) -> Iterator[str]:
    """Names of the layers that received factors; peft also injects zeros where a name happens to match."""
    for name, layer in module.named_modules() if module is not None else ():
        second: Mapping[str, nn.Module] = getattr(layer, "lora_B", {})
        if "fused" in second and any(bool(tensor.any()) for tensor in second["fused"].parameters()):
            yield name


def _check_reached(path: Path, pipeline: Any, expected: list[str], reached: list[str]) -> None:
    if len(reached) == len(expected):
        return
    flat = {name.replace(".", "_") for name in reached}
    lost = [name for name in expected if not any(each in name.replace(".", "_") for each in flat)]
    first = f", first {lost[0]}" if lost else ""
    raise ModelError(
        f"--lora {path}: {len(expected) - len(reached)} of {len(expected)} pairs of factors match no layer of "
        f"{type(pipeline).__name__}{first}",
        hint="is it an adapter of another model, or for a text encoder that this one lacks?",
    )
