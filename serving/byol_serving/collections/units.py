"""Vectors scaled to length 1: in one pass, where NumPy takes six and lets go of Python in each."""

import numpy as np
from numba import types
from numpy.typing import NDArray

from byol_serving.collections.compiling import array, compiled_as
from byol_serving.collections.types import Vectors


def unit_rows(vectors: NDArray[np.float32] | NDArray[np.float64]) -> tuple[Vectors, int]:
    """Float32 [N, D], C-contiguous, and the first row that has no direction; -1 for none."""
    units = np.empty(vectors.shape, np.float32)
    return units, _scale(np.ascontiguousarray(vectors), units)


@compiled_as(
    *(
        types.int64(array(kind, 2), array(types.float32, 2, filled=True))
        for kind in (types.float32, types.float64)
    )
)
def _scale(vectors: NDArray[np.float64], units: Vectors) -> int:
    count, dim = vectors.shape
    for row in range(count):
        square = 0.0  # in float64: that of a large finite float32 overflows
        for at in range(dim):
            value = np.float64(vectors[row, at])
            square += value * value
        norm = np.sqrt(square)
        if not 0 < norm < np.inf:
            return row
        inverse = 1 / norm
        for at in range(dim):
            units[row, at] = np.float64(vectors[row, at]) * inverse
    return -1
