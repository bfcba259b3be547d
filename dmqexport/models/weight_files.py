"""What lies in a model folder, checked before anything is loaded: JSON, safetensors, never pickles."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dmqexport.errors import ModelError, ResourceError

VARIANTS: Final = (None, "fp16", "bf16")
"""What weights may be called in diffusers' file names, by preference: plain, and the two half precisions."""

PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_CHUNK: Final = 1 << 20
_LARGEST_HEADER: Final = 100_000_000  # safetensors' own limit
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one component; `variant` is the infix that diffusers calls so, like "fp16"."""

    files: tuple[Path, ...]
    variant: str | None


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses inside the block into ResourceError (permission) or ModelError."""
    try:
        yield
    except PermissionError as error:
        raise ResourceError(f"{error.filename or path} cannot be read: permission denied") from error
    except OSError as error:
        raise ModelError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises ModelError (ResourceError without permission) naming the file."""
    try:
        with file_errors(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}", hint="copy or download this file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def find_weights(folder: Path, stem: str, preferred: str | None = None) -> WeightFiles:
    """The weights `stem`.safetensors of `folder`, whole or in shards, half precision when there is nothing else.

    preferred: the variant, "fp16" or "bf16", to take where there are several.

    Raises ModelError when there are none, and says so when there are only pickles: unpickling runs code of whoever
    made the file.
    """
    for variant in (*((preferred,) if preferred else ()), *VARIANTS):
        whole = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
        if whole.is_file():
            return WeightFiles((whole,), variant)
        index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
        if index.is_file():
            return WeightFiles(_shards(index), variant)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ModelError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}); they are not opened, since a pickle can "
            "run any code",
            hint="where you trust the file, convert it once: load it with diffusers or transformers and call "
            "save_pretrained(folder, safe_serialization=True)",
        )
    other = [name for name in names if name.endswith(".safetensors")]
    found = f"it holds {', '.join(other[:3])}" if other else "it holds no *.safetensors"
    raise ModelError(
        f"{folder} has no weights: expected {stem}.safetensors, {found}",
        hint="copy the weights into this folder, under the name that save_pretrained gives them",
    )


def _shards(index: Path) -> tuple[Path, ...]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files", hint="copy or download this file again")
    shards = []
    for name in sorted(set(table.values())):
        # The index comes from whoever made the model; it may not lead out of the folder.
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r}; a shard must lie beside its index")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index} names {name}, which is missing", hint="copy or download the missing shard")
        shards.append(index.parent / name)
    return tuple(shards)


def check_safetensors(path: Path) -> None:
    """Compare the header of `path` with its size, without reading the weights; raises ModelError naming the file."""
    with file_errors(path), path.open("rb") as stream:
        size = path.stat().st_size
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        raw = stream.read(length) if len(head) == 8 and length <= min(size - 8, _LARGEST_HEADER) else b""
    if head == b"version ":
        raise ModelError(f"{path} is a Git LFS pointer, not the weights", hint="run `git lfs pull` in that checkout")
    if not raw:
        raise ModelError(
            f"{path} is truncated or no safetensors file: {size} bytes, and its header does not fit in them",
            hint="copy or download this file again",
        )
    expected = 8 + length + _data_size(path, raw)
    if size != expected:
        raise ModelError(
            f"{path} is {'truncated' if size < expected else 'damaged'}: {size} bytes, expected {expected}",
            hint="copy or download this file again",
        )


def _data_size(path: Path, raw: bytes) -> int:
    """Bytes behind the header, from the tensors it lists; refuses entries that contradict themselves."""
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 0
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            bits = _BITS.get(entry["dtype"])
            if first != end or (bits is not None and (last - first) * 8 != bits * math.prod(entry["shape"])):
                raise ModelError(
                    f"{path} is damaged: the header's entry for {name!r} contradicts itself",
                    hint="copy or download this file again",
                )
            end = last
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} is damaged: its header is not what safetensors writes", hint="copy or download this file again"
        ) from error
    if not tensors:
        raise ModelError(f"{path} holds no tensors")
    return int(end)


def digest(parts: Iterable[tuple[str, Path]], *words: str) -> str:
    """sha256 over (name, content of the file) in order, then `words`; streamed, and no folder enters.

    Of JSON configurations the content counts, not the layout, nor who saved it from where.
    """
    total = hashlib.sha256()
    for name, path in parts:
        inner = hashlib.sha256()
        if path.suffix == ".json" and path.name.endswith(("config.json", "model_index.json")):
            saver = {"_name_or_path", "_diffusers_version", "transformers_version"}
            kept = {key: value for key, value in read_json(path).items() if key not in saver}
            inner.update(json.dumps(kept, sort_keys=True).encode())
        else:
            with file_errors(path), path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    inner.update(chunk)
        total.update(f"{name}\0{inner.hexdigest()}\n".encode())
    total.update("\0".join(words).encode())
    return total.hexdigest()
