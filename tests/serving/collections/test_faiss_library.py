"""FAISS's OpenBLAS uses the instructions that the processor has, whatever its name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from byol_serving.collections.faiss_library import core_of, features_in

CPU = Path("/proc/cpuinfo")
LOADED = """
import ctypes, os
from byol_serving.collections.faiss_library import faiss
with open("/proc/self/maps") as maps:
    paths = {line.split()[-1] for line in maps if "faiss" in line and "openblas" in line}
for path in paths:
    name = ctypes.CDLL(path).openblas_get_corename
    name.restype = ctypes.c_char_p
    print(name().decode(), os.environ.get("OPENBLAS_CORETYPE"))
"""
AVX2 = frozenset({"sse2", "avx", "avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("features", "core"),
    [
        (AVX512, "SkylakeX"),
        (AVX512 - {"avx512vl"}, "Haswell"),
        (AVX2, "Haswell"),
        (AVX2 - {"fma"}, ""),
        (frozenset(), ""),
    ],
)
def test_the_best_instructions_there_are(features: frozenset[str], core: str) -> None:
    assert core_of(features) == core


def test_features_are_read_as_linux_writes_them() -> None:
    text = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 fma\nbugs\t\t: avx512f\n"
    assert features_in(text) == {"fpu", "avx2", "fma"}
    assert features_in("processor\t: 0\nFeatures\t: fp asimd\n") == set()


@pytest.mark.parametrize("own", [None, "Haswell"])
def test_openblas_takes_them_unless_told_otherwise(own: str | None) -> None:
    core = core_of(features_in(CPU.read_text())) if CPU.exists() else ""
    if not core:
        pytest.skip("an x86 processor with AVX2, under Linux, is needed")
    environment = {key: each for key, each in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    if own:
        environment["OPENBLAS_CORETYPE"] = own
    command = [sys.executable, "-c", LOADED]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if not found.stdout:
        pytest.skip("this build of FAISS brings no OpenBLAS of its own")
    assert found.stdout.split() == [own or core, str(own)]
