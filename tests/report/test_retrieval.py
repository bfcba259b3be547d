"""Retrieval accuracy: exact distances, shared ranks, and refusals that say what is wrong."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from dmqexport.errors import ModelError
from dmqexport.report.retrieval import retrieval_accuracy, squared_distances


def _pictures(count: int, seed: int, size: int = 5) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_distances_are_exact() -> None:
    pictures, gallery = _pictures(7, 1), _pictures(11, 2)
    difference = pictures[:, np.newaxis].astype(np.int64) - gallery[np.newaxis].astype(np.int64)
    np.testing.assert_array_equal(squared_distances(pictures, gallery), (difference**2).sum(axis=(2, 3, 4)))


def test_gallery_finds_itself() -> None:
    gallery = _pictures(20, 3)
    order = np.random.default_rng(4).permutation(20)
    assert retrieval_accuracy(gallery[order], order, gallery) == 1.0


def test_share_of_hits_is_counted() -> None:
    gallery = _pictures(4, 5)
    assert retrieval_accuracy(gallery, np.array([0, 1, 3, 2]), gallery) == 0.5


def test_top_k_widens_the_net() -> None:
    gallery = np.zeros((4, 2, 2, 3), np.uint8)
    gallery += np.array([0, 10, 20, 30], np.uint8)[:, np.newaxis, np.newaxis, np.newaxis]
    black = np.zeros((1, 2, 2, 3), np.uint8)
    hits = [retrieval_accuracy(black, np.array([2]), gallery, top_k=k) for k in (1, 2, 3, 4)]
    assert hits == [0.0, 0.0, 1.0, 1.0]


def test_duplicates_in_the_gallery_share_a_rank() -> None:
    gallery = np.repeat(_pictures(1, 6), 3, axis=0)
    assert retrieval_accuracy(gallery, np.arange(3), gallery) == 1.0


@dataclass(frozen=True)
class Refusal:
    generated: npt.NDArray[np.generic]
    expected_indices: npt.NDArray[np.generic]
    top_k: int
    reason: str


_GALLERY = _pictures(3, 7)
_REFUSALS = {
    "floats": Refusal(_GALLERY / 255.0, np.arange(3), 1, r"generated is float64 \[3, 5, 5, 3\], expected uint8"),
    "grey": Refusal(_GALLERY[..., :1], np.arange(3), 1, r"generated is uint8 \[3, 5, 5, 1\]"),
    "nothing": Refusal(_GALLERY[:0], np.arange(0), 1, "N of at least 1"),
    "other size": Refusal(_pictures(3, 8, size=6), np.arange(3), 1, r"\[6, 6, 3\], the gallery's are \[5, 5, 3\]"),
    "too few indices": Refusal(_GALLERY, np.arange(2), 1, r"int64 \[2\], expected integers \[3\]"),
    "float indices": Refusal(_GALLERY, np.arange(3.0), 1, "float64"),
    "row outside": Refusal(_GALLERY, np.array([0, 1, 3]), 1, "span 0 to 3, the gallery has rows 0 to 2"),
    "negative row": Refusal(_GALLERY, np.array([0, 1, -1]), 1, "span -1 to 1"),
    "top_k of zero": Refusal(_GALLERY, np.arange(3), 0, "top_k is 0"),
}


@pytest.mark.parametrize("case", _REFUSALS.values(), ids=_REFUSALS.keys())
def test_refusals_name_got_and_expected(case: Refusal) -> None:
    with pytest.raises(ModelError, match=case.reason):
        retrieval_accuracy(case.generated, case.expected_indices, _GALLERY, top_k=case.top_k)  # type: ignore[arg-type]
