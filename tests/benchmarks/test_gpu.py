"""The script for a GPU, tried without one: its table, its JSON, and what it says it cannot run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(
    scratch: Path, *words: str, first: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    path = [str(each) for each in (first, ROOT / "training", ROOT / "serving") if each]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    return subprocess.run(
        [*command, "--json", str(scratch / "found.json")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )


def answer(scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((scratch / "found.json").read_text())
    return found


def test_an_item_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="item 5 measures FAISS")
    found = run(tmp_path, "--device", "cpu", "--quick", "--items", "5")
    assert found.returncode == 0, found.stderr
    assert "no figure means anything" in found.stdout
    assert "FAISS IVF, 5,000 x 128, batches of 64" in found.stdout
    facts = answer(tmp_path)
    assert list(facts["items"]) == ["5 search"]
    assert all(row["value"] > 0 for row in facts["items"]["5 search"])
    assert facts["versions"]["torch"]


def test_what_lacks_a_package_or_fails_says_so_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "faiss.py").write_text("raise ImportError('no FAISS on this machine')\n")
    (tmp_path / "onnx.py").write_text("raise RuntimeError('a broken installation')\n")
    found = run(tmp_path, "--device", "cpu", "--quick", "--items", "5,4", first=tmp_path)
    assert found.returncode == 1, found.stderr
    (lacking,), (failed,) = answer(tmp_path)["items"].values()
    assert lacking["note"] == "not run: no FAISS on this machine"
    assert failed["note"] == "failed: RuntimeError: a broken installation"
    assert "FAILED" in found.stdout


def test_a_machine_without_a_gpu_is_not_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = run(tmp_path, "--items", "2")
    assert found.returncode == 1
    assert "torch finds no CUDA device" in found.stderr
    assert "there are 1 to 5" in run(tmp_path, "--items", "2,9").stderr
