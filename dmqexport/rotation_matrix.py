"""The orthogonal matrix that hidden channels are rotated with, in torch and in graphs."""

from typing import Any

import numpy as np
import numpy.typing as npt

from dmqexport.quant_types import FloatArray, frozen_array


def rotation_matrix(size: int) -> FloatArray:
    """float32 [size, size], orthogonal, every entry ±1/√size. Raises ValueError unless `size` is a power of two.

    Sylvester's Hadamard matrix with signs for its rows, so that no column adds up what all channels have in common: the
    signs of a bent function, whose sum with every column is ±√size where `size` is a power of four, else at most √2
    times that. Without them the first column would hold the mean of all channels, √size times over.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a rotation needs blocks of a power of two channels, not {size}")
    matrix: npt.NDArray[np.floating[Any]] = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    index = np.arange(size)
    odd = np.zeros(size, dtype=np.int64)
    for bit in range(0, size.bit_length() - 2, 2):
        odd ^= (index >> bit) & (index >> (bit + 1)) & 1
    return frozen_array((1 - 2 * odd)[:, np.newaxis] * matrix / size**0.5, np.float32)
