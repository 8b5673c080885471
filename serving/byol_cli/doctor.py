"""`byol doctor`: what this machine offers, and what to install for what is missing."""

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click

from byol_cli.output import emit, json_option

PACKAGES = {
    "torch": "training",
    "torchvision": "training",
    "onnx": "training",
    "onnxscript": "training",
    "onnxruntime": "cpu (or gpu)",
    "faiss": "cpu (or gpu)",
    "numba": "cpu (or gpu)",
    "pyarrow": "parquet",
    "skimage": "demo",
    "sklearn": "demo",
}


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Say what this machine offers and lacks.

    \b
    Example:  byol doctor --json
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_features": _cpu_features(),
        "gpu": _gpu(),
    }
    advice: list[str] = []
    for package, extra in PACKAGES.items():
        found[package] = _facts(package)
        if found[package] is None:
            advice.append(f"no {package}: pip install 'byol-server[{extra.split()[0]}]'")
    if found["gpu"] and "CUDAExecutionProvider" not in str(found["onnxruntime"]):
        advice.append("a GPU, but an ONNX Runtime without CUDA: pip install 'byol-server[gpu]'")
    found["advice"] = advice or ["nothing is missing"]
    emit(found, as_json)


def _facts(package: str) -> str | None:
    """Version and what its build can do; None if it cannot be imported."""
    try:
        module = importlib.import_module(package)
    except Exception as error:
        return None if isinstance(error, ModuleNotFoundError) else f"broken: {error}"
    version = str(getattr(module, "__version__", "unknown version"))
    match package:
        case "torch":
            cuda = module.cuda.is_available()
            return f"{version} ({'CUDA ' + module.version.cuda if cuda else 'CPU only here'})"
        case "onnxruntime":
            return f"{version} ({', '.join(module.get_available_providers())})"
        case "faiss":
            # StandardGpuResources() constructs without a GPU and fails later: ask the count.
            gpus = module.get_num_gpus() if hasattr(module, "get_num_gpus") else 0
            return f"{version} ({module.get_compile_options().strip()}; GPUs: {gpus})"
        case _:
            return version


def _gpu() -> str | None:
    """Name, memory and driver, as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,memory.total,driver_version"
    run = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return "; ".join(run.stdout.split("\n")).strip("; ") or None


def _cpu_features() -> list[str]:
    """Instruction sets that change speed here: bf16 training, int8 inference."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return []
    return [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
        if flag in flags
    ]
