"""From what the user wrote (preset, hub id, folder) to a folder on this machine."""

import difflib
import errno
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmqexport.errors import DmqExportError, ModelError, ResourceError
from dmqexport.models import emoji
from dmqexport.models.originals import PROVENANCE
from dmqexport.models.presets import PRESETS, Preset
from dmqexport.models.quiet import quiet
from dmqexport.models.weight_files import VARIANTS, file_errors, read_json

_log: Final = logging.getLogger(__name__)

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Component by component, since hub repositories also hold pickles and whole-checkpoint copies of many gigabytes.
_CONFIGS: Final = (
    "model_index.json", "config.json", "scheduler_config.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*",
    "tokenizer_3/*",
)  # fmt: skip
_COMPONENTS: Final = (
    "", "unet/", "transformer/", "vae/", "vqvae/", "text_encoder/", "text_encoder_2/", "text_encoder_3/"
)  # fmt: skip


@dataclass(frozen=True)
class Located:
    """A model on this machine: `name` for people, its folder, and its preset if it has one."""

    name: str
    folder: Path
    preset: Preset | None


def locate(model: str, revision: str | None, variant: str | None = None) -> Located:
    """Find `model`: a preset name, a folder, or a hub id `org/name` (the only case that may use the network).

    Raises ModelError when there is none of these, ResourceError when the disk is full or not permitted.
    """
    if not model.strip():
        raise ModelError("no model given", hint=_known())
    preset = PRESETS.get(model)
    if preset is not None and preset.hub_id is not None:
        return Located(preset.name, download(preset.hub_id, revision, variant), preset)
    if preset is not None and preset.checkpoint is not None:
        raise ModelError(f"{preset.name} has no folder in diffusers' format on the hub", hint=_conversion(preset))
    if preset is not None:
        return Located(preset.name, emoji.pipeline_folder(), preset)
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise ModelError(f"{model}: no home folder of that name") from error
    with file_errors(path):
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        return Located(path.resolve().name, path, _converted(path))
    if is_file:
        if path.suffix != ".safetensors":
            raise ModelError(
                f"{model} is a file, expected a diffusers folder or a whole checkpoint in .safetensors",
                hint="authors' own .ckpt and .pth of CompVis latent-diffusion and DDIM go through `dmqexport convert`",
            )
        from dmqexport.models.single_file import folder_of_file

        folder, hub_id = folder_of_file(path)
        return Located(path.stem, folder, _by_hub(hub_id))
    # `models/mine` with a folder `models` here is a mistyped path, not a model hub's id.
    if _HUB_ID.fullmatch(model) and not path.parent.is_dir():
        return Located(model.partition("/")[2], download(model, revision, variant), _by_hub(model))
    if "/" in model or "\\" in model or model.startswith((".", "~")):
        raise ModelError(f"the folder {model} does not exist", hint="give a folder that holds model_index.json")
    close = difflib.get_close_matches(model.lower(), PRESETS, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    raise ModelError(f"there is no preset and no folder named {model!r}", hint=guess + _known())


def _by_hub(hub_id: str | None) -> Preset | None:
    return next((preset for preset in PRESETS.values() if preset.hub_id == hub_id is not None), None)


def _converted(folder: Path) -> Preset | None:
    """The preset of a folder that `dmqexport convert` wrote."""
    if not (folder / PROVENANCE).is_file():
        return None
    name = read_json(folder / PROVENANCE).get("preset")
    return PRESETS.get(name) if isinstance(name, str) else None


def _conversion(preset: Preset) -> str:
    return (
        f"download its authors' checkpoint from {preset.checkpoint}, run `dmqexport convert CHECKPOINT "
        f"-m {preset.name} -o FOLDER`, and give FOLDER with -m"
    )


def _known() -> str:
    return f"presets: {', '.join(PRESETS)}; or a hub id org/name; or a diffusers folder"


def download(hub_id: str, revision: str | None, variant: str | None = None) -> Path:
    """Fetch what is needed of a hub model into the shared cache, safetensors only, and return its folder.

    variant: "fp16" or "bf16" where the model offers both. Each component comes once, as the first of what is asked
    for, plain weights, fp16 and bf16 that it offers.

    Already cached models need no network. Raises ModelError with what to do when it cannot be fetched.
    """
    with quiet():
        from huggingface_hub import snapshot_download

        _log.info("looking for %s in the local cache, then on the model hub", hub_id)
        try:
            first, *others = dict.fromkeys((variant, *VARIANTS)) if variant else VARIANTS
            wanted = [*_CONFIGS, *_weights(first, _COMPONENTS), *(f"{place}config.json" for place in _COMPONENTS)]
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
            for other in others:
                if lacking := _without_weights(folder):
                    # Of the same commit, so that files match.
                    wanted = [*_CONFIGS, *_weights(other, lacking)]
                    folder = Path(snapshot_download(hub_id, revision=folder.name, allow_patterns=wanted))
        except Exception as error:
            raise _refusal(hub_id, revision, error) from error
    if not any(folder.glob("**/*.safetensors")):
        named = _by_hub(hub_id)
        raise ModelError(
            f"{hub_id} offers no safetensors, and pickled weights are not opened, since a pickle can run any code",
            hint=_conversion(named)
            if named is not None and named.checkpoint is not None
            else "find a repository with safetensors, or save one yourself "
            "where you trust the pickle: save_pretrained(folder, safe_serialization=True)",
        )
    if not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{hub_id} holds no model_index.json: it is no diffusers model, or only part of it is cached",
            hint="check the id; with a network, run again to complete the cache",
        )
    return folder


def _without_weights(folder: Path) -> list[str]:
    """The components that have a configuration and no safetensors yet."""
    return [
        place
        for place in _COMPONENTS
        if (folder / place / "config.json").is_file() and not any((folder / place).glob("*.safetensors"))
    ]


def _weights(variant: str | None, components: Iterable[str]) -> list[str]:
    """Patterns of the weights of `components`, whole and in shards."""
    infix = f".{variant}" if variant else ""
    return [
        f"{component}{stem}{ending}"
        for component in components
        for stem in ("diffusion_pytorch_model", "model")
        for ending in (
            f"{infix}.safetensors",
            f"{infix}-?????-of-?????.safetensors",
            f".safetensors.index{infix}.json",
        )
    ]


def _refusal(hub_id: str, revision: str | None, error: Exception) -> DmqExportError:
    """Our error for whatever the hub's client raised."""
    from huggingface_hub import errors as hub

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"no space left to download {hub_id}", hint="free the disk, or point HF_HOME elsewhere")
    if isinstance(error, PermissionError):
        return ResourceError(
            f"the download cache cannot be written for {hub_id}: {error}", hint="point HF_HOME to a writable folder"
        )
    if isinstance(error, hub.GatedRepoError):
        preset = _by_hub(hub_id)
        terms = "" if preset is None else f" ({preset.licence}; forbidden: {preset.forbids or 'nothing of note'})"
        return ModelError(
            f"{hub_id} is gated: its authors ask you to accept terms first{terms}",
            hint=f"accept them at https://huggingface.co/{hub_id} with your account, then run `hf auth login` with a "
            "token that may read gated repositories; or have somebody who may download it give you the folder",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return ModelError(f"{hub_id} has no revision {revision!r}", hint="give a branch, tag or commit of that model")
    if isinstance(error, hub.RepositoryNotFoundError):
        return ModelError(
            f"there is no folder {hub_id} here and no model {hub_id} on the hub, or it is private",
            hint="check the spelling; for a private model run `hf auth login`",
        )
    if isinstance(error, hub.HFValidationError):
        return ModelError(f"{hub_id} is neither a folder nor a valid hub id: {error}", hint=_known())
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError)):
        return ModelError(
            f"there is no folder {hub_id} here; as a hub id it is not in the local cache and the hub cannot be reached",
            hint="connect and unset HF_HUB_OFFLINE; or download it elsewhere (`hf download`), copy it here and give "
            "the folder; `emoji` needs no network",
        )
    return ModelError(
        f"{hub_id} could not be fetched from the model hub: {type(error).__name__}: {error}",
        hint="try again later, or give a local diffusers folder",
    )
