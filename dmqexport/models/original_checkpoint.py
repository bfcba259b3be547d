"""Authors' own checkpoint files as dictionaries of tensors, without ever running what a pickle asks for."""

import contextlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dmqexport.errors import ModelError, ResourceError
from dmqexport.models.weight_files import check_safetensors, file_errors

_FORMATS: Final = (".safetensors", ".ckpt", ".pth", ".pt")

#: Trainers write their own bookkeeping beside the weights; it is read as inert objects and thrown away.
_BOOKKEEPING: Final = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")


class _Inert:
    """Stands in for a trainer's class: takes anything, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class OriginalCheckpoint:
    """tensors: by original names, without a leading `module.`; averaged: they are the moving average of a list."""

    tensors: dict[str, Tensor]
    averaged: bool


def read_original(path: Path, *, averaged: bool) -> OriginalCheckpoint:
    """The tensors of the checkpoint `path`.

    Taken are safetensors; and .ckpt, .pth, .pt that torch.load opens with weights_only=True, holding a dictionary of
    tensors, the same under `state_dict`, or the list that ermongroup/ddim writes while training (model first, moving
    average last; `averaged` chooses).

    Raises ModelError for anything else, ResourceError when memory or permission is missing.
    """
    with file_errors(path):
        if not path.is_file():
            what = "is a folder, expected a checkpoint file" if path.is_dir() else "does not exist"
            raise ModelError(f"{path} {what}", hint=f"give the authors' own file: {', '.join(_FORMATS)}")
    if path.suffix not in _FORMATS:
        raise ModelError(
            f"{path}: checkpoints end in {', '.join(_FORMATS)}, got {path.suffix or 'no ending'!r}",
            hint="give the file that the authors published",
        )
    content: Any = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    took_average = False
    if isinstance(content, list | tuple) and content:
        took_average = averaged and len(content) > 1 and _is_weights(content[-1])
        content = content[-1] if took_average else content[0]
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not _is_weights(content):
        raise ModelError(
            f"{path} holds {_describe(content)}, expected a dictionary of named tensors",
            hint="give the checkpoint itself, not an optimizer's state or a whole pickled module",
        )
    tensors = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    return OriginalCheckpoint(tensors, took_average)


def _is_weights(content: Any) -> bool:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return False
    return any(isinstance(value, Tensor) for value in content.values())


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dictionary of {', '.join(str(key) for key in list(content)[:4]) or 'nothing'}"
    return f"a {type(content).__name__}"


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    check_safetensors(path)
    return load_file(str(path))


def _unpickled(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    try:
        known = torch.serialization.safe_globals(list(_stand_ins(path) if zipped else ()))
        with file_errors(path), known, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of newer protocols, which are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (ModelError, ResourceError):
        raise
    except MemoryError as error:
        raise ResourceError(f"not enough memory to read {path}", hint="close other programs") from error
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise ModelError(
                f"{path} holds more than tensors, and a pickle that does can run any code: {_culprit(error)}",
                hint="where you trust the file, convert it in a place of its own: torch.load(..., weights_only=False), "
                "then safetensors.torch.save_file of its state_dict, and give that file",
            ) from error
        # A damaged archive raises RuntimeError, EOFError, KeyError, ...: whatever the bytes happen to mean.
        raise ModelError(
            f"{path} is truncated or no checkpoint of torch: {type(error).__name__}: {_culprit(error)}",
            hint="copy or download this file again",
        ) from error


def _stand_ins(path: Path) -> Iterator[Any]:
    """Inert classes for a trainer's own that the checkpoint names; every other name stays refused."""
    with contextlib.suppress(Exception):  # a damaged file is explained by the load itself
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
            if name.startswith(_BOOKKEEPING):
                yield (type("_Inert", (_Inert,), {}), name)


def _culprit(error: Exception) -> str:
    """The line of torch's long message that names what was refused."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "global" in line]
    return (named or lines or [type(error).__name__])[0][:200]
