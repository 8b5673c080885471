"""FAISS, with matrix products by the instructions that this processor has.

FAISS's wheel carries OpenBLAS 0.3.15, of 2021, which knows processors by their names. On an Intel
Xeon of 2023, which it does not know, it took the instructions of 2004: 32 GFLOP/s on a core instead
of 103, for every exact search of a batch. NumPy carries one that looks at what a processor can do.
"""

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CORE = "OPENBLAS_CORETYPE"
_CPU = Path("/proc/cpuinfo")
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_AVX2 = frozenset({"avx2", "fma"})


def core_of(features: Set[str]) -> str:
    """OpenBLAS's name for the best instructions among a processor's features; empty: it decides."""
    if features >= _AVX512:
        return "SkylakeX"
    return "Haswell" if features >= _AVX2 else ""


def features_in(cpuinfo: str) -> Set[str]:
    """What Linux says that an x86 processor can do."""
    for line in cpuinfo.splitlines():
        name, _, after = line.partition(":")
        if name.rstrip() == "flags":
            return frozenset(after.split())
    return frozenset()


@contextmanager
def _named_core() -> Iterator[None]:
    """OpenBLAS reads the name when it is loaded; who has set it himself is left alone."""
    core = core_of(features_in(_CPU.read_text())) if _CPU.exists() else ""
    if not core or _CORE in os.environ:
        yield
        return
    os.environ[_CORE] = core
    try:
        yield
    finally:
        del os.environ[_CORE]


with _named_core():
    import faiss as _faiss

faiss: Any = _faiss  # its stubs describe the C++ signatures, not Python's
