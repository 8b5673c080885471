"""The README's commands, run as they stand there."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from byol_training.demo_data import TilePlan, write_tiles

README = (Path(__file__).parents[2] / "README.md").read_text()

# Ten minutes of training are ten seconds here, and the port is one that is free.
TRAINING = ("--max-seconds 600", "--max-seconds 5")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None, f"README.md has no {language} block"
    return found.group(1)


def port_is_taken() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", 50051)) == 0


def test_the_commands_and_the_python_example_run(tmp_path: Path) -> None:
    if port_is_taken():
        pytest.skip("port 50051, which the README uses, is taken on this machine")
    write_tiles(tmp_path / "tiles", TilePlan(collection=16, queries=2))
    (tmp_path / "tiles" / "collection").rename(tmp_path / "photos")
    (tmp_path / "example.py").write_text(block("python"))
    commands = block("sh").replace(*TRAINING)
    assert commands != block("sh")
    # The server starts in the background: what comes next waits for its port.
    wait = (
        "for i in $(seq 300); do (echo > /dev/tcp/127.0.0.1/50051) 2>&- && break; sleep 0.1; done"
    )
    commands = commands.replace("store &\n", f"store &\n{wait}\n")
    script = f"set -e\ntrap 'kill %1 && wait %1' EXIT\n{commands}\npython example.py\n"
    run = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "moon/003.png" in run.stdout  # the search found the image itself
    assert "{'label': 'moon'}" in run.stdout  # and so did the Python example


def test_every_document_the_readme_names_exists() -> None:
    root = Path(__file__).parents[2]
    names = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert names
    missing = [name for name in names if not (root / name).exists()]
    assert not missing
