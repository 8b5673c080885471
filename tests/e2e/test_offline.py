"""`byol embed` and `byol index`, in this process: exit codes, resuming, what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from byol_cli.main import cli
from byol_serving.bundle import Bundle
from byol_serving.errors import EncoderMismatch, InvalidSource
from serving.piles import image_files, write_folder
from serving.support import make_bundle

FILES = image_files(9)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", FILES)


def byol(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def answer(*words: str | Path, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(byol(*words, "--json", code=code).stdout.splitlines()[-1])
    return found


def test_embed_says_what_it_did_and_goes_on(bundle: Bundle, source: Path, tmp_path: Path) -> None:
    words = ("embed", source, "--bundle", bundle.path, "--out", tmp_path / "out")
    shown = byol(*words)
    assert "decode" in shown.stderr  # the bar names each stage
    assert "images/s" in shown.stderr
    again = answer(*words)
    assert (again["done"], again["skipped"], again["rejected"]) == (0, 9, 0)
    assert byol(*words, "--quiet").stderr == ""
    (source / "new.png").write_bytes(FILES["cat/000.png"])
    with pytest.raises(InvalidSource, match="add --sync"):
        byol(*words)
    assert answer(*words, "--sync")["done"] == 1
    assert pq.read_table(tmp_path / "out").num_rows == 10


def test_rejected_files_have_their_own_exit_code(
    bundle: Bundle, source: Path, tmp_path: Path
) -> None:
    (source / "bad.png").write_bytes(b"bad")
    words = ("embed", source, "--bundle", bundle.path, "--out", tmp_path / "out", "--format", "npy")
    found = byol(*words, "--json", code=3)
    assert "1 files were rejected" in found.stderr
    summary = json.loads(found.stdout.splitlines()[-1])
    assert (summary["done"], summary["rejected"]) == (9, 1)
    assert json.loads(Path(summary["rejected_file"]).read_text())["path"] == "bad.png"
    assert (tmp_path / "out" / "part-00000.npy").exists()


def test_index_forgets_with_the_collection(bundle: Bundle, source: Path, tmp_path: Path) -> None:
    from byol_serving.collections.store import Store

    words = ("index", source, "--bundle", bundle.path, "--store", tmp_path / "store", "-c", "pets")
    assert answer(*words, "--index", "hnsw")["done"] == 9
    assert answer(*words)["done"] == 0
    with Store(tmp_path / "store") as store:
        assert store.get("pets").info.count == 9
        store.drop("pets")
    assert answer(*words)["done"] == 9


def test_index_refuses_vectors_of_another_encoder(
    bundle: Bundle, source: Path, tmp_path: Path
) -> None:
    other = make_bundle(tmp_path / "other", seed=3)
    where = ("--store", tmp_path / "store", "-c", "pets")
    byol("index", source, "--bundle", bundle.path, *where)
    with pytest.raises(EncoderMismatch, match="use another collection"):
        byol("index", source, "--bundle", other.path, *where)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gpus", "0,1"], "--gpus needs --device cuda"),
        (["--gpus", "a", "--device", "cuda"], "'a' is not a list of numbers"),
        (["--gpus", "-1", "--device", "cuda"], "-1 is no GPU's number"),
        (["--ids", "md5"], "'md5' is not one of"),
    ],
)
def test_wrong_usage(words: list[str], reason: str, bundle: Bundle, source: Path) -> None:
    result = byol("embed", source, "--bundle", bundle.path, "--out", "x", *words, code=2)
    assert reason in result.stderr
