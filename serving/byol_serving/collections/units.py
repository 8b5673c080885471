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
    for row in range(len(vectors)):
        given, unit = vectors[row], units[row]
        square = 0.0  # in float64: that of a large finite float32 overflows
        for value in given:
            square += np.float64(value) * np.float64(value)
        norm = np.sqrt(square)
        if not 0 < norm < np.inf:
            return row
        inverse = 1 / norm
        for at in range(len(given)):
            unit[at] = given[at] * inverse
    return -1
