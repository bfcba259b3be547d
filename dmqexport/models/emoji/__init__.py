"""The bundled model `emoji`: a small text-to-image pipeline and the 1,355 captioned pictures it was trained on.

Everything lies in this package, so that the first example, the tests and CI need no network and no model hub. The
pictures are noto-emoji's, drawn at 64 × 64; `NOTICE` and `LICENSE.noto-emoji.txt` in this folder state their licence.
Importing this module loads nothing but numpy; each function reads its file on the first call.
"""

from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dmqexport.errors import ModelError

IMAGE_COUNT: Final = 1355
"""How many captioned pictures the model knows."""

_FOLDER: Final = Path(__file__).resolve().parent


def _installed(name: str) -> Path:
    """The path of a bundled file or folder; refuses an installation that lacks it."""
    path = _FOLDER / name
    if not path.exists():
        raise ModelError(
            f"the bundled model 'emoji' lacks {name}: {path} does not exist",
            hint="reinstall dmqexport from a complete wheel; it carries this model's weights and pictures",
        )
    return path


def pipeline_folder() -> Path:
    """The diffusers folder (fp16 weights, 11 MB); `StableDiffusionPipeline.from_pretrained` opens it offline."""
    _installed("pipeline/model_index.json")
    return _FOLDER / "pipeline"


@lru_cache(maxsize=1)
def _caption_lines() -> tuple[str, ...]:
    lines = tuple(_installed("captions.txt").read_text(encoding="utf-8").splitlines())
    if len(lines) != IMAGE_COUNT:
        raise ModelError(
            f"captions.txt of the bundled model has {len(lines)} lines, expected {IMAGE_COUNT}",
            hint="reinstall dmqexport; the file was changed after installation",
        )
    return lines


def captions() -> list[str]:
    """The 1,355 captions (Unicode names, one a picture), in the order of `images()`."""
    return list(_caption_lines())


@lru_cache(maxsize=1)
def images() -> npt.NDArray[np.uint8]:
    """The 1,355 pictures, uint8 [1355, 64, 64, 3], RGB on white, read-only, in the order of `captions()`.

    Source: fonts-noto-color-emoji 2.042 (images Apache-2.0).
    """
    with np.load(_installed("noto_emoji_64.npz"), allow_pickle=False) as archive:
        pictures: npt.NDArray[np.uint8] = archive["images"]
    if pictures.shape != (IMAGE_COUNT, 64, 64, 3) or pictures.dtype != np.uint8:
        raise ModelError(
            f"noto_emoji_64.npz holds {pictures.dtype} {list(pictures.shape)}, "
            f"expected uint8 [{IMAGE_COUNT}, 64, 64, 3]",
            hint="reinstall dmqexport; the file was changed after installation",
        )
    pictures.flags.writeable = False
    return pictures


def retrieval_indices(count: int = 200) -> npt.NDArray[np.int64]:
    """Which captions the retrieval figure asks for: int64 [count], the start of one fixed permutation of all 1,355.

    A shorter list is always a prefix of a longer one, so that a quick check and a full one share their pictures.
    """
    if not 1 <= count <= IMAGE_COUNT:
        raise ModelError(
            f"retrieval over {count} captions was asked for, but the bundled model has {IMAGE_COUNT}",
            hint=f"choose a count between 1 and {IMAGE_COUNT}",
        )
    return np.random.default_rng(0).permutation(IMAGE_COUNT)[:count]
