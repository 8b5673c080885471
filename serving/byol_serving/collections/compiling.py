"""Loops over numbers, compiled for the processor at hand by Numba."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba import types

Function = TypeVar("Function", bound=Callable[..., Any])


def array(kind: Any, axes: int, *, filled: bool = False) -> Any:
    """The type of a C-contiguous array, which may be read-only unless it is filled."""
    return types.Array(kind, axes, "C", readonly=not filled)


def compiled(function: Function, *signatures: Any) -> Function:
    """To run without Python's lock; kept on disk where that can be.

    With signatures at once, and for no other types; else for those that it is first called with.
    """
    # Sums in any order, as FAISS's are; but infinities stay what they are.
    how = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    known = list(signatures) or None
    try:
        return cast(Function, numba.njit(known, cache=True, **how)(function))
    except RuntimeError:  # no folder to keep it in, as in a container
        return cast(Function, numba.njit(known, **how)(function))


def compiled_as(*signatures: Any) -> Callable[[Function], Function]:
    """`compiled` as a decorator with arguments."""
    return lambda function: compiled(function, *signatures)
