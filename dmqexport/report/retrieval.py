"""Retrieval accuracy: how often the training picture nearest to a generated one is the one that its caption names.

A model that was trained on a small closed set of captioned pictures can be judged without a reference network: generate
from a caption, look up the nearest picture of the whole gallery, and count the hits.
"""

import numpy as np
import numpy.typing as npt

from dmqexport.errors import ModelError


def retrieval_accuracy(
    generated: npt.NDArray[np.uint8],
    expected_indices: npt.NDArray[np.integer],
    gallery: npt.NDArray[np.uint8],
    top_k: int = 1,
) -> float:
    """The share of generated pictures whose expected gallery picture is among the `top_k` nearest, from 0 to 1.

    Args:
        generated: uint8 [N, H, W, 3].
        expected_indices: integer [N], for each generated picture its row in the gallery.
        gallery: uint8 [M, H, W, 3].
        top_k: how many neighbours count; distance is L2 over all pixels and channels. Gallery pictures at exactly the
            same distance share a rank: a duplicate in the gallery is no miss.
    """
    _check(generated, expected_indices, gallery, top_k)
    distances = squared_distances(generated, gallery)
    expected = distances[np.arange(len(generated)), expected_indices]
    strictly_nearer = (distances < expected[:, np.newaxis]).sum(axis=1)
    return float(np.mean(strictly_nearer < top_k))


def squared_distances(pictures: npt.NDArray[np.uint8], gallery: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Squared L2 distance of every picture to every gallery picture, float64 [N, M], exact.

    |a|² − 2ab + |b|² turns the N × M × pixels subtraction into one matrix product. All terms are integers far below
    2⁵³, so that float64 holds them without rounding and ties are true ties.
    """
    a = pictures.reshape(len(pictures), -1).astype(np.float64)
    b = gallery.reshape(len(gallery), -1).astype(np.float64)
    distances: npt.NDArray[np.float64] = a @ b.T
    distances *= -2.0
    distances += np.einsum("np,np->n", a, a)[:, np.newaxis]
    distances += np.einsum("mp,mp->m", b, b)
    return distances


def _check(
    generated: npt.NDArray[np.uint8],
    expected_indices: npt.NDArray[np.integer],
    gallery: npt.NDArray[np.uint8],
    top_k: int,
) -> None:
    """Refuse inputs that would give a number without meaning."""
    for name, pictures in (("generated", generated), ("gallery", gallery)):
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or len(pictures) == 0:
            raise ModelError(
                f"{name} is {pictures.dtype} {list(pictures.shape)}, expected uint8 [N, H, W, 3] with N of at least 1",
                hint="convert with np.asarray(image.convert('RGB')) and np.stack; floats in [0, 1] need ×255 first",
            )
    if generated.shape[1:] != gallery.shape[1:]:
        raise ModelError(
            f"generated pictures are {list(generated.shape[1:])}, the gallery's are {list(gallery.shape[1:])}",
            hint="generate at the gallery's height and width; distances need equal pixels",
        )
    if expected_indices.shape != (len(generated),) or not np.issubdtype(expected_indices.dtype, np.integer):
        raise ModelError(
            f"expected_indices is {expected_indices.dtype} {list(expected_indices.shape)}, "
            f"expected integers [{len(generated)}], one a generated picture",
            hint="pass the gallery row that each caption belongs to",
        )
    if expected_indices.min() < 0 or expected_indices.max() >= len(gallery):
        raise ModelError(
            f"expected_indices span {expected_indices.min()} to {expected_indices.max()}, "
            f"the gallery has rows 0 to {len(gallery) - 1}",
            hint="pass the whole gallery that the indices were drawn from",
        )
    if not 1 <= top_k <= len(gallery):
        raise ModelError(
            f"top_k is {top_k}, the gallery has {len(gallery)} pictures",
            hint=f"choose a top_k between 1 and {len(gallery)}",
        )
