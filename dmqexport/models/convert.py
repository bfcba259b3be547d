"""Authors' own checkpoints (CompVis latent-diffusion, ermongroup/ddim) as folders that diffusers opens."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from dmqexport.bundle import sha256
from dmqexport.errors import ModelError, RecipeError, ResourceError
from dmqexport.models.original_checkpoint import read_original
from dmqexport.models.original_names import rename_autoencoder, rename_ddpm, rename_ldm
from dmqexport.models.originals import ORIGINALS, PROVENANCE, Autoencoder, DdimOriginal, LdmOriginal
from dmqexport.models.own_classes import COMPONENTS
from dmqexport.models.quiet import quiet

_log: Final = logging.getLogger(__name__)

_UNET: Final = "model.diffusion_model."
_AVERAGED: Final = "model_ema."
_FIRST_STAGE: Final = "first_stage_model."
_CLASSES: Final = "cond_stage_model.embedding.weight"
_BETA_TOLERANCE: Final = 1e-6


@dataclass(frozen=True)
class Converted:
    """The written folder; parameters: of the denoiser; averaged: a moving average was chosen over plain weights."""

    folder: Path
    parameters: int
    averaged: bool


def convert(checkpoint: Path, preset: str, folder: Path, *, averaged: bool = True) -> Converted:
    """Write `checkpoint`, an authors' file of `preset`, as the diffusers folder `folder`; an earlier one is replaced.

    averaged: take the moving average of the weights where the checkpoint holds one, as its authors sample with it.

    Raises RecipeError for a preset that is not converted and for a folder with anything else in it, ModelError when
    the checkpoint cannot be read or is of another network, ResourceError for disk, memory and permissions.
    """
    if preset not in ORIGINALS:
        raise RecipeError(
            f"-m {preset}: there is nothing to convert", hint=f"presets with checkpoints: {', '.join(ORIGINALS)}"
        )
    return convert_as(checkpoint, ORIGINALS[preset], preset, folder, averaged=averaged)


def convert_as(
    checkpoint: Path, original: DdimOriginal | LdmOriginal, name: str, folder: Path, *, averaged: bool = True
) -> Converted:
    """As `convert`, for a network of the same kinds and any size; `name` is recorded as its preset."""
    _check_folder(folder)
    read = read_original(checkpoint, averaged=averaged)
    weights, took_average = read.tensors, read.averaged
    with quiet(), _replacing(folder) as place:
        if isinstance(original, DdimOriginal):
            parameters = _write_ddim(weights, original, place)
        else:
            took_average = averaged and any(key.startswith(_AVERAGED + "diffusion_model") for key in weights)
            parameters = _write_ldm(weights, original, place, took_average)
        record = {
            "preset": name,
            "checkpoint": checkpoint.name,
            "sha256": sha256(checkpoint),
            "averaged": took_average,
            "original": {"kind": type(original).__name__, **asdict(original)},
        }
        (place / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _log.info("%s: %d parameters of %s", folder, parameters, name)
    return Converted(folder, parameters, took_average)


def _write_ddim(weights: Mapping[str, Tensor], original: DdimOriginal, place: Path) -> int:
    from diffusers import DDIMScheduler, UNet2DModel

    levels = len(original.multipliers)
    # Networks trained with a learned variance (`type: bayesian`) carry it beside the UNet.
    renamed = rename_ddpm({key: value for key, value in weights.items() if key != "logvar"}, levels)
    config = {
        **_blocks(levels, original.attention, "AttnDownBlock2D", "AttnUpBlock2D"),
        "sample_size": original.size,
        "block_out_channels": [original.channels * factor for factor in original.multipliers],
        "layers_per_block": original.blocks,
        "norm_num_groups": original.groups,
        "norm_eps": 1e-6,
        "attention_head_dim": None,  # one head of full width
        "downsample_padding": 0,  # diffusers then pads right and bottom only, as the original does
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    parameters = _save(UNet2DModel, config, renamed, place / "unet")
    scheduler = DDIMScheduler(clip_sample=False, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    # The ancestral sampler takes these two with `--scheduler ddpm`; DDIM hands them on.
    _save_scheduler(scheduler, place, {"variance_type": original.variance})
    _save_index(place, "DDIMPipeline", {"unet": "UNet2DModel", "scheduler": "DDIMScheduler"})
    return parameters


def _write_ldm(weights: Mapping[str, Tensor], original: LdmOriginal, place: Path, averaged: bool) -> int:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=False,  # CompVis' sampler ends on the first training step's noise level
        steps_offset=1,
        beta_start=original.beta_start,
        beta_end=original.beta_end,
        beta_schedule="scaled_linear",
    )
    _check_betas(weights, scheduler.betas)
    components = {"scheduler": "DDIMScheduler"}
    pipeline = "LDMPipeline"
    if original.classes is not None:
        pipeline = "LdmClassPipeline"
        components["class_embedder"] = "ClassEmbedder"
        _save_classes(weights, original, place)
    unet_class, config, heads = ldm_unet(original)
    components["unet"] = unet_class.__name__
    parameters = _save(
        unet_class, config, rename_ldm(_ldm_weights(weights, averaged), original.blocks, heads), place / "unet"
    )
    components["vqvae"] = _save_first_stage(weights, original, place)
    _save_scheduler(scheduler, place, {})
    _save_index(place, pipeline, components)
    return parameters


def _ldm_weights(weights: Mapping[str, Tensor], averaged: bool) -> dict[str, Tensor]:
    """The UNet's tensors; averages lie under names without dots (CompVis' `LitEma`)."""
    names = [key.removeprefix(_UNET) for key in weights if key.startswith(_UNET)]
    if not names:
        raise ModelError(
            f"the checkpoint holds no tensors under {_UNET}: it is no latent diffusion model",
            hint="give the model.ckpt of the whole model, not that of its first stage",
        )
    if not averaged:
        return {name: weights[_UNET + name] for name in names}
    flat = {name: _AVERAGED + f"diffusion_model.{name}".replace(".", "") for name in names}
    missing = [key for key in flat.values() if key not in weights]
    if missing:
        raise ModelError(
            f"the checkpoint's moving average lacks {len(missing)} tensors, first {missing[0]}",
            hint="copy or download it again, or take the plain weights with --no-ema",
        )
    return {name: weights[key] for name, key in flat.items()}


def ldm_unet(original: LdmOriginal) -> tuple[Any, dict[str, Any], Callable[[int], int] | None]:
    """(class, config, channels → heads of self-attention); heads is None with spatial transformers."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    from dmqexport.models.fixed_heads_unet import FixedHeadsUNet2DModel

    levels, (count, width) = len(original.multipliers), (original.heads, original.head_channels)
    channels = [original.channels * factor for factor in original.multipliers]
    config: dict[str, Any] = {
        "sample_size": original.size,
        "in_channels": original.first_stage.latent_channels,
        "out_channels": original.first_stage.latent_channels,
        "block_out_channels": channels,
        "layers_per_block": original.blocks,
        "norm_num_groups": original.groups,
    }
    if original.context is not None:
        config.update(_blocks(levels, original.attention, "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"))
        # diffusers calls the number of heads attention_head_dim here, and only here.
        config["attention_head_dim"] = count if width is None else [value // width for value in channels]
        config["cross_attention_dim"] = original.context
        return UNet2DConditionModel, config, None
    config.update(_blocks(levels, original.attention, "AttnDownBlock2D", "AttnUpBlock2D"))
    config["attn_norm_num_groups"] = original.groups  # else none in the middle block when norms are shifted by time
    if original.resample_in_blocks:
        config.update(downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift")
        for index in range(levels):
            # Levels without attention have block classes of their own for this; the last and first do not resample.
            if config["down_block_types"][index] == "DownBlock2D" and index < levels - 1:
                config["down_block_types"][index] = "ResnetDownsampleBlock2D"
            if config["up_block_types"][index] == "UpBlock2D" and index < levels - 1:
                config["up_block_types"][index] = "ResnetUpsampleBlock2D"
    if width is not None:
        config["attention_head_dim"] = width
        return UNet2DModel, config, lambda value: value // width
    config["num_attention_heads"] = count
    return FixedHeadsUNet2DModel, config, lambda _: int(count or 1)


def _save_classes(weights: Mapping[str, Tensor], original: LdmOriginal, place: Path) -> None:
    from dmqexport.models.class_pipeline import ClassEmbedder

    if _CLASSES not in weights:
        raise ModelError(f"the checkpoint holds no {_CLASSES}: it is not conditioned on classes")
    config = {"num_classes": original.classes, "embedding_dim": original.context}
    _save(ClassEmbedder, config, {"embedding.weight": weights[_CLASSES].float()}, place / "class_embedder")


def _save_first_stage(weights: Mapping[str, Tensor], original: LdmOriginal, place: Path) -> str:
    """Write the autoencoder; returns its class name."""
    from diffusers import AutoencoderKL, VQModel

    stage: Autoencoder = original.first_stage
    levels = len(stage.multipliers)
    inner = {key.removeprefix(_FIRST_STAGE): value for key, value in weights.items() if key.startswith(_FIRST_STAGE)}
    if not inner:
        raise ModelError(
            f"the checkpoint holds no tensors under {_FIRST_STAGE}, so that no pictures can be decoded",
            hint="give the checkpoint of the whole model",
        )
    # Its training loss (a perceptual network and a discriminator) is saved along; nothing needs it.
    renamed = rename_autoencoder({key: value for key, value in inner.items() if not key.startswith("loss.")}, levels)
    config = {
        "sample_size": original.size * 2 ** (levels - 1),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [stage.channels * factor for factor in stage.multipliers],
        "layers_per_block": stage.blocks,
        "latent_channels": stage.latent_channels,
        "norm_num_groups": stage.groups,
        "scaling_factor": _scaling_factor(weights) if original.scaled else 1.0,
    }
    if stage.codes is None:
        _save(AutoencoderKL, config, renamed, place / "vqvae")
        return "AutoencoderKL"
    config.update(num_vq_embeddings=stage.codes, vq_embed_dim=stage.latent_channels)
    _save(VQModel, config, renamed, place / "vqvae")
    return "VQModel"


def _scaling_factor(weights: Mapping[str, Tensor]) -> float:
    factor = weights.get("scale_factor")
    if factor is None or factor.numel() != 1 or not bool(torch.isfinite(factor).all()) or float(factor) <= 0:
        raise ModelError(
            "the checkpoint holds no scale_factor, by which this model's latents were multiplied for training",
            hint="give the authors' complete checkpoint, with its buffers",
        )
    return float(factor)


def _check_betas(weights: Mapping[str, Tensor], betas: Tensor) -> None:
    """The noise schedule that the checkpoint brings along must be the preset's."""
    own = weights.get("betas")
    if own is not None and (own.shape != betas.shape or float((own.float() - betas).abs().max()) > _BETA_TOLERANCE):
        raise ModelError(
            f"the checkpoint was trained with another noise schedule: betas from {float(own[0]):.6f} to "
            f"{float(own[-1]):.6f}, expected {float(betas[0]):.6f} to {float(betas[-1]):.6f}",
            hint="-m names the preset that the checkpoint belongs to",
        )


def _blocks(levels: int, attention: tuple[int, ...], down: str, up: str) -> dict[str, Any]:
    """Block classes by level; diffusers lists the upward path from the coarsest."""
    return {
        "down_block_types": [down if level in attention else "DownBlock2D" for level in range(levels)],
        "up_block_types": [up if level in attention else "UpBlock2D" for level in reversed(range(levels))],
    }


def _save(kind: Any, config: dict[str, Any], weights: dict[str, Tensor], place: Path) -> int:
    """Write a module of class `kind`; every tensor must have its place and its shape. Returns its parameters."""
    with torch.device("meta"):
        module = kind(**config)
    expected = module.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    extra = sorted(weights.keys() - expected.keys())
    wrong = [name for name in sorted(expected.keys() & weights.keys()) if expected[name].shape != weights[name].shape]
    where = f"{place.name} ({kind.__name__})"
    hint = "is this the checkpoint of another model? -m names the preset it belongs to"
    if wrong:
        got, asked = tuple(weights[wrong[0]].shape), tuple(expected[wrong[0]].shape)
        raise ModelError(
            f"{where}: {len(wrong)} tensors have another shape, first {wrong[0]}: got {got}, expected {asked}",
            hint=hint,
        )
    if missing or extra:
        first = f"lacks {missing[0]}" if missing else f"has {extra[0]} too many"
        raise ModelError(f"{where}: the checkpoint {first} ({len(missing)} missing, {len(extra)} too many)", hint=hint)
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{where}: {name} holds NaN or infinity", hint="take an earlier checkpoint")
    module.load_state_dict(weights, assign=True)
    module.save_pretrained(place)
    return sum(tensor.numel() for tensor in weights.values())


def _save_scheduler(scheduler: Any, place: Path, extra: dict[str, Any]) -> None:
    scheduler.save_pretrained(place / "scheduler")
    if extra:
        path = place / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, **extra}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_index(place: Path, pipeline: str, components: Mapping[str, str]) -> None:
    import diffusers

    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index.update({name: [COMPONENTS.get(kind, "diffusers"), kind] for name, kind in sorted(components.items())})
    (place / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_folder(folder: Path) -> None:
    """Only a conversion may be replaced; anything else stays as it is."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RecipeError(f"-o {folder} is a file or a link, expected a folder", hint="choose another -o/--output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROVENANCE).is_file():
        raise RecipeError(
            f"-o {folder} exists and holds no earlier conversion; nothing was touched",
            hint="choose another -o/--output, or remove it yourself",
        )


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` when the block ends well and vanishes when not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        place.chmod(0o755)  # mkdtemp's folders are for their owner alone
        try:
            yield place
            if folder.exists():
                shutil.rmtree(folder)
            place.rename(folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        named = error.filename if isinstance(error, OSError) else None
        raise ResourceError(
            f"{named or folder} cannot be written: {getattr(error, 'strerror', None) or error}",
            hint="free the disk, or choose another -o/--output",
        ) from error
