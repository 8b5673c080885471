"""A run that was killed, and run again, leaves the same bytes as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byol_serving.bundle import Bundle
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidSource
from serving.piles import embed, file_bytes, image_files, rows_in, write_folder, write_tar

COUNT, SHARD = 400, 16


def command(source: Path, bundle: Bundle, out: Path, *more: str) -> list[str]:
    words = ["embed", str(source), "--bundle", str(bundle.path), "--out", str(out), "--quiet"]
    sizes = ["--shard-size", str(SHARD), "--batch-size", "4", "--threads", "1"]
    return [sys.executable, "-m", "byol_cli.main", *words, *sizes, *more]


def finished(out: Path) -> int:
    return len(list((out / "_byol" / "journal").glob("part-*.jsonl")))


def stop_after(words: list[str], out: Path, shards: int, how: signal.Signals) -> int:
    """Runs until so many shards are recorded and a random moment more; the exit code."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while finished(out) < shards and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors
    return process.returncode


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images that a kill falls inside; duplicates and bad files among them."""
    files = image_files(COUNT)
    for number in range(0, COUNT, 37):
        files[f"x/{number}.png"] = files["cat/000.png"]
        files[f"cat/{number:03}b.png"] = b"damaged"
    return write_folder(tmp_path_factory.mktemp("source") / "images", files)


def test_killed_at_random_moments(source: Path, bundle: Bundle, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ids = ("--ids", "sha256")
    subprocess.run(command(source, bundle, whole, *ids), check=False, stderr=subprocess.DEVNULL)
    kills = 0
    while kills < 6:
        words = command(source, bundle, killed, *ids)
        wanted = finished(killed) + random.randrange(1, 5)
        if stop_after(words, killed, wanted, signal.SIGKILL) != -signal.SIGKILL:
            break
        kills += 1
    assert kills >= 2
    subprocess.run(command(source, bundle, killed, *ids), check=False, stderr=subprocess.DEVNULL)
    assert len(rows_in(killed)) == COUNT
    assert file_bytes(killed) == file_bytes(whole)


def test_ctrl_c_ends_cleanly_and_the_next_run_goes_on(
    source: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert stop_after(command(source, bundle, out), out, 2, signal.SIGINT) == 130
    done = finished(out)
    assert 2 <= done < 30
    times = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert subprocess.run(command(source, bundle, out), check=False).returncode == 3
    assert finished(out) == -(-len(list(source.rglob("*.png"))) // SHARD)
    assert times.items() <= {path: path.stat().st_mtime_ns for path in out.glob("part-*")}.items()


def test_a_part_that_was_lost_is_made_again(encoder: Encoder, tmp_path: Path) -> None:
    source, out = write_tar(tmp_path / "images.tar", image_files(30)), tmp_path / "out"
    embed(source, out, encoder)
    before = file_bytes(out)
    (out / "part-00001.parquet").unlink()
    (out / "_byol" / "journal" / "part-00002.jsonl").unlink()
    summary = embed(source, out, encoder)
    assert (summary.done, summary.skipped) == (16, 14)
    assert file_bytes(out) == before


@pytest.mark.parametrize("change", ["added", "renamed", "touched", "removed", "half removed"])
def test_a_source_that_changed_is_noticed(change: str, encoder: Encoder, tmp_path: Path) -> None:
    files = image_files(16)
    source, out = write_folder(tmp_path / "images", files), tmp_path / "out"
    embed(source, out, encoder)
    before = file_bytes(out)
    first, last = source / "cat" / "000.png", source / "dog" / "015.png"
    match change:
        case "added":
            (source / "ant.png").write_bytes(files["cat/000.png"])
        case "renamed":
            first.rename(source / "cat" / "001.png")
        case "touched":
            os.utime(first, ns=(1, 1))
        case "removed":
            last.unlink()
        case "half removed":
            for path in (source / "dog").iterdir():
                path.unlink()
    with pytest.raises(InvalidSource, match=r"has changed since it was begun .*: add --sync"):
        embed(source, out, encoder)
    assert file_bytes(out) == before
