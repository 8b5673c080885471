"""The command line: help, errors, and the path from a folder to an answer, command by command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from byol_serving.collections.types import IndexKind

BYOL = [sys.executable, "-m", "byol_cli.main"]
COMMANDS = [
    "demo",
    "train",
    "evaluate",
    "report",
    "export",
    "serve",
    "embed",
    "index",
    "search",
    "collections",
    "collections list",
    "collections create",
    "collections stats",
    "collections drop",
    "models",
    "models list",
    "models load",
    "models switch",
    "models unload",
    "token",
    "doctor",
]


def byol(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [*BYOL, *map(str, words)], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == code, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run


def answer(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(byol(*words, "--json").stdout.splitlines()[-1])
    return found


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from byol_cli.main import cli;"
        "cli.main(['--help'], standalone_mode=False);"
        "heavy = {'torch', 'grpc', 'faiss', 'onnxruntime', 'numpy', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert time.monotonic() - started < 5  # 0.05 s when idle; this bounds a busy machine


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    text = byol(*command.split(), "--help").stdout
    assert "Example:" in text
    assert "\\b" not in text  # click's paragraph mark, not understood


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"collections", "models"}))
def test_every_command_can_answer_in_json(command: str) -> None:
    assert "--json" in byol(*command.split(), "--help").stdout


def test_an_error_is_one_line_and_json_if_asked_for(tmp_path: Path) -> None:
    run = byol("train", tmp_path / "nowhere", "--out", tmp_path / "run", "--json", code=1)
    assert run.stderr.count("\n") == 1
    assert "nowhere does not exist; give a folder, a tar archive" in run.stderr
    assert json.loads(run.stdout)["error"] == "InvalidSource"


def test_the_index_kinds_offered_are_those_there_are() -> None:
    from byol_cli.options import INDEX_KINDS

    assert get_args(IndexKind) == INDEX_KINDS


def test_wrong_usage_has_its_own_exit_code() -> None:
    assert "No such option" in byol("train", "--no-such-option", code=2).stderr


def test_doctor_names_what_is_here() -> None:
    found = answer("doctor")
    assert found["python"].startswith("3.")
    assert "CPUExecutionProvider" in found["onnxruntime"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from byol_training.demo_data import TilePlan, write_tiles

    root = tmp_path_factory.mktemp("photos")
    return write_tiles(root, TilePlan(collection=16, queries=4))[0]


@pytest.fixture(scope="module")
def bundle(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    trained = answer("train", photos, "--out", root / "run", "--epochs", "2")
    assert trained["images"] == 304
    exported = answer("export", root / "run", "--out", root / "bundle")
    assert exported["parity_max_cosine_distance"] < 1e-4
    scores = answer("evaluate", root / "run", photos)
    assert set(scores) == {"trained", "untrained", "pixels"}
    assert 0 < scores["trained"]["knn_accuracy"] < 1
    return root / "bundle"


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("served") / "store"
    process = subprocess.Popen(
        [*BYOL, "serve", "--bundle", bundle, "--store", store, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield json.loads(process.stdout.readline())["serving"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_index_and_search_through_a_server(
    server: str, photos: Path, bundle: Path, tmp_path: Path
) -> None:
    where = ("--server", server, "--collection", "tiles", "--journal", tmp_path / "journal")
    indexed = answer("index", photos, "--bundle", bundle, *where)
    assert indexed["done"] == 304
    listed = answer("collections", "list", "--server", server)["collections"]
    assert [(each["name"], each["count"]) for each in listed] == [("tiles", 304)]
    query = photos / "moon" / "003.png"
    hits = answer("search", query, "-c", "tiles", "-k", "3", "--server", server)["hits"]
    assert hits[0]["id"] == "moon/003.png"
    assert hits[0]["score"] == pytest.approx(1.0, abs=1e-5)
    only = answer(
        "search", query, "-c", "tiles", "-k", "3", "--server", server, "--where", '{"label":"cell"}'
    )
    assert {hit["metadata"]["label"] for hit in only["hits"]} == {"cell"}


def test_embed_to_files_and_index_without_a_server(
    photos: Path, bundle: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    answer("embed", photos, "--bundle", bundle, "--out", tmp_path / "vectors")
    rows = pq.read_table(tmp_path / "vectors")
    assert rows.num_rows == 304
    answer("index", photos, "--bundle", bundle, "--store", tmp_path / "store", "-c", "tiles")
    listed = answer("collections", "list", "--store", tmp_path / "store")["collections"]
    assert listed[0]["count"] == 304


def test_ctrl_c_stops_training_without_a_traceback(photos: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*BYOL, "train", photos, "--out", tmp_path / "run", "--epochs", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TERM": "dumb"},
    )
    with process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()  # it would go on for hours
    assert process.returncode == 130
    assert "Traceback" not in errors
