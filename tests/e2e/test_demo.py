"""The demo, as a user runs it: real training, real export, real server, real queries."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.tar"


def run_demo(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "byol_cli.main", "demo", "--out", str(out), "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def test_default_data_teaches_the_encoder_and_every_query_is_answered(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo", "--train-seconds", "25")
    assert result["queries"] == 950
    assert result["indexed"] == 4940
    assert result["parity_max_cosine_distance"] < 1e-4
    # Two minutes bring 20 points and more; a fifth of that, on a busy machine, must bring some.
    assert result["knn_trained"] > result["knn_untrained"] + 0.04
    assert result["knn_trained"] > result["knn_pixels"] + 0.10
    assert 0 < result["search_p50_ms"] < 1000
    assert result["seconds"] < 240
    assert (Path(result["bundle"]) / "encoder.onnx").is_file()
    assert Path(result["store"]).is_dir()
    assert Path(result["example_query"]).is_file()
    with Image.open(result["picture"]) as picture:
        assert picture.width > 400


@pytest.mark.skipif(not CIFAR.exists(), reason="shared/data/cifar10/test.tar is not here")
def test_a_users_tar_is_scored_by_its_folders(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo", "--data", str(CIFAR), "--train-seconds", "8")
    assert result["queries"] == 1666
    assert result["indexed"] == 8334
    assert 0.1 < result["knn_trained"] < 1.0


def test_a_users_flat_folder_has_no_labels_and_bad_files_are_no_obstacle(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(120):
        colour = (number * 2, 255 - number * 2, (number * 37) % 256)
        Image.new("RGB", (40 + number % 7, 30), colour).save(photos / f"{number:03}.jpg")
    (photos / "broken.jpg").write_bytes(b"not an image")
    result = run_demo(tmp_path / "demo", "--data", str(photos), "--train-seconds", "2")
    assert result["knn_trained"] is None
    assert result["knn_pixels"] is None
    assert result["indexed"] + result["queries"] == 120
