"""Wheels travel in parts: they come back whole, or not at all."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_wheels.py"
FILES = {"large.whl": bytes(range(256)) * 40, "even.whl": b"x" * 8000, "empty.whl": b""}
MB = "0.004"  # 4,000 bytes: large.whl is two and a half parts, even.whl two


def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    (tmp_path / "wheels").mkdir()
    for name, data in FILES.items():
        (tmp_path / "wheels" / name).write_bytes(data)
    found = run("split", tmp_path / "wheels", "--into", tmp_path / "parts", "--part-mb", MB)
    assert found.returncode == 0, found.stderr
    return tmp_path / "parts"


def test_files_come_back_as_they_were(tmp_path: Path, parts: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in parts.iterdir() if path.suffix != ".json"}
    assert max(sizes.values()) == 4000
    assert len([name for name in sizes if name.startswith("large")]) == 3
    assert len([name for name in sizes if name.startswith("even")]) == 2
    assert run("join", parts, "--into", tmp_path / "out").returncode == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("harm", ["altered", "missing", "unlisted"])
def test_a_transfer_that_went_wrong_is_refused(tmp_path: Path, parts: Path, harm: str) -> None:
    part = parts / "large.whl.001"
    match harm:
        case "altered":
            part.write_bytes(part.read_bytes()[::-1])
            said = "large.whl has sha256"
        case "missing":
            part.unlink()
            said = "large.whl.001 is missing; transfer it again"
        case _:
            (parts / "wheels.json").unlink()
            said = "wheels.json cannot be read"
    found = run("join", parts, "--into", tmp_path / "out")
    assert found.returncode != 0
    assert said in found.stderr
    assert not (tmp_path / "out" / "large.whl").exists()


def test_pip_is_given_the_joined_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of one line goes into a folder of its own."""
    (tmp_path / "wheels").mkdir()
    about = "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n"
    how = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(tmp_path / "wheels" / "tiny_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_thing.py", "ANSWER = 42\n")
        wheel.writestr("tiny_thing-1.0.dist-info/METADATA", about)
        wheel.writestr("tiny_thing-1.0.dist-info/WHEEL", how)
        wheel.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    run("split", tmp_path / "wheels", "--into", tmp_path / "parts", "--part-mb", "0.0001")
    (listed,) = json.loads((tmp_path / "parts" / "wheels.json").read_text())
    assert len(listed["parts"]) > 2
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "site"))
    found = run("install", tmp_path / "parts")
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "site" / "tiny_thing.py").read_text() == "ANSWER = 42\n"
