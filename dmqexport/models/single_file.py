"""Whole checkpoints in one `.safetensors`, as the Stable Diffusion tools exchange them, made into diffusers folders."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dmqexport.errors import DmqExportError, ModelError, ResourceError
from dmqexport.models.own_classes import model_class
from dmqexport.models.pipeline_kinds import PipelineKind, kind_of
from dmqexport.models.quiet import quiet
from dmqexport.models.weight_files import check_safetensors, digest, read_json

_log: Final = logging.getLogger(__name__)

#: What a folder must hold beside the weights, as a hub repository lays it out.
_CONFIGS: Final = ("model_index.json", "*/*.json", "tokenizer*/*")
_WEIGHTS: Final = (".safetensors", ".bin", ".ckpt", ".index.json")


def folder_of_file(path: Path) -> tuple[Path, str | None]:
    """(diffusers folder made of the checkpoint `path`, hub id of the model that its configuration is of).

    Configurations and tokenizers are not in such files. They are taken from a diffusers folder around the file, or
    beside it under its name, or from the local hub cache for the model that diffusers recognises; there is no network.
    The folder is made once and kept in the cache, under the content of the file and of the configuration.

    Raises ModelError for a file that is no such checkpoint, lacks tensors, or has no configuration here, ResourceError
    for disk, memory and permissions.
    """
    check_safetensors(path)
    configs, hub_id = _configs(path)
    kind = kind_of(read_json(configs / "model_index.json").get("_class_name"))
    pipeline_class = None if kind is None else model_class(kind.class_name)
    if kind is None or not hasattr(pipeline_class, "from_single_file"):
        name = read_json(configs / "model_index.json").get("_class_name")
        raise ModelError(
            f"{path}: diffusers opens no single files of a {name!r} (the model of {configs})",
            hint="give the model's diffusers folder instead",
        )
    import diffusers

    files = sorted(each for pattern in _CONFIGS for each in configs.glob(pattern) if not each.name.endswith(_WEIGHTS))
    names = [(each.relative_to(configs).as_posix(), each) for each in files if each.is_file()]
    key = digest([*names, ("weights", path)], diffusers.__version__)[:32]
    folder = _cache() / key
    if not folder.is_dir():
        _log.info("converting %s with the configuration in %s, once", path, configs)
        _convert(path, configs, kind, pipeline_class, folder)
    return folder, hub_id


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "dmqexport" / "single-files"


def _configs(path: Path) -> tuple[Path, str | None]:
    for place in (path.parent, path.with_suffix("")):
        if (place / "model_index.json").is_file():
            return place, None
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    shapes = _shapes(path)
    hub_id = str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])
    if "v1-5" in hub_id and not any(name.startswith("cond_stage_model.transformer.") for name in shapes):
        # diffusers takes whatever it does not know for Stable Diffusion 1.5.
        raise ModelError(
            f"{path} is no checkpoint of a whole model that diffusers knows",
            hint="put it into the diffusers folder of its model (model_index.json, configurations, tokenizer), "
            "or give a diffusers folder",
        )
    try:
        with quiet():
            folder = Path(snapshot_download(hub_id, allow_patterns=list(_CONFIGS), local_files_only=True))
    except Exception as error:
        raise _no_configs(path, hub_id) from error
    if not (folder / "model_index.json").is_file():
        raise _no_configs(path, hub_id)
    return folder, hub_id


def _no_configs(path: Path, hub_id: str) -> ModelError:
    wanted = " ".join(f"--include '{pattern}'" for pattern in _CONFIGS)
    return ModelError(
        f"{path} holds weights alone; the configuration and the tokenizer of its model, {hub_id}, are not here",
        hint=f"fetch them once (a few megabytes): hf download {hub_id} {wanted}; or put the file into the model's "
        "diffusers folder",
    )


def _shapes(path: Path) -> dict[str, Any]:
    """The file's tensors without their content, which is enough to recognise the model."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as opened:
        return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in opened.keys()}  # noqa: SIM118


def _convert(path: Path, configs: Path, kind: PipelineKind, pipeline_class: Any, folder: Path) -> None:
    index = read_json(configs / "model_index.json")
    names = [name for name in (*kind.components, *kind.optional) if isinstance(index.get(name), list)]
    with quiet(), _new_folder(folder) as place:
        try:
            with _missing_keys([index[name] for name in names]) as missing:
                pipeline = pipeline_class.from_single_file(
                    str(path), config=str(configs), local_files_only=True, torch_dtype=_dtype(path), **kind.empty
                )
        except (DmqExportError, OSError):
            raise
        except Exception as error:
            # diffusers raises ValueError, KeyError, RuntimeError, ... for files that are not what they should be.
            if "meta tensor" in str(error):  # with accelerate, what no tensor was found for has no memory either
                raise _lacking(path, configs, kind, "") from error
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            raise ModelError(
                f"{path} cannot be opened as a {kind.class_name} with the configuration in {configs}: "
                f"{type(error).__name__}: {first[:300]}",
                hint="is the configuration that of the same model?",
            ) from error
        for name in names:
            part = getattr(pipeline, name, None)
            if isinstance(part, nn.Module):
                missing.extend(f"{name}.{key}" for key, tensor in part.named_parameters() if tensor.is_meta)
        if missing:
            raise _lacking(path, configs, kind, f": {len(missing)}, first {missing[0]}")
        pipeline.save_pretrained(place, safe_serialization=True)


def _lacking(path: Path, configs: Path, kind: PipelineKind, which: str) -> ModelError:
    return ModelError(
        f"{path} lacks tensors of the {kind.class_name} in {configs}{which}",
        hint="is the configuration that of the same model, and is the file a whole checkpoint?",
    )


@contextmanager
def _missing_keys(entries: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Collects what the classes of `entries`, [library, class], miss in what they load; diffusers says nothing."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    kinds = [getattr(libraries[library], name, None) for library, name in entries if library in libraries]
    modules = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, nn.Module)}
    missing: list[str] = []

    def watched(self: nn.Module, *args: Any, **options: Any) -> Any:
        result = nn.Module.load_state_dict(self, *args, **options)
        missing.extend(key for key in result.missing_keys if not key.endswith("position_ids"))
        return result

    plain = [kind for kind in modules if "load_state_dict" not in vars(kind)]
    try:
        for kind in plain:
            kind.load_state_dict = watched  # type: ignore[method-assign]  # for the time of this block
        yield missing
    finally:
        for kind in plain:
            del kind.load_state_dict


def _dtype(path: Path) -> torch.dtype:
    """The type of most of the file's numbers, so that the folder is no larger than the file."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    with safe_open(str(path), framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # no mapping
            part = opened.get_slice(name)
            counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + torch.Size(part.get_shape()).numel()
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    return halves.get(max(counts, key=lambda name: counts[name]), torch.float32)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes `folder` when the block ends well and vanishes when not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            yield place
            if not folder.exists():  # another process may have been faster
                place.rename(folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}",
            hint="free the disk, or point HF_HOME to a folder that is writable and large",
        ) from error
