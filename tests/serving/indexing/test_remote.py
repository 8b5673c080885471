"""Sources behind URLs: a real HTTP server on this machine, and fsspec's memory file system."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidSource
from serving.piles import (
    Files,
    assert_vectors,
    embed,
    file_bytes,
    image_files,
    rows_in,
    write_folder,
    write_tar,
)

FILES = image_files(10)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base's name
        """Says nothing."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL and folder of an HTTP server."""
    root = tmp_path_factory.mktemp("served")
    handler = functools.partial(Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", root
        server.shutdown()
        thread.join()


@pytest.fixture
def bucket() -> Iterator[str]:
    """URL of an empty folder in memory."""
    memory = fsspec.filesystem("memory")
    memory.makedirs("/bucket", exist_ok=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def put(url: str, files: Files) -> None:
    for name, data in files.items():
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(data)


def test_a_bucket_is_like_a_folder(bucket: str, encoder: Encoder, tmp_path: Path) -> None:
    put(bucket, {**FILES, "cat/000.json": b'{"name": "Tom"}', ".hidden.png": b"", "bad.png": b"x"})
    summary = embed(bucket, tmp_path / "out", encoder)
    rows = rows_in(tmp_path / "out")
    assert (summary.done, summary.rejected) == (10, 1)
    assert rows["cat/000.png"]["metadata"] == {"label": "cat", "name": "Tom"}
    assert rows["dog/001.png"]["source"] == "memory:///bucket/dog/001.png"
    assert_vectors(rows, FILES, encoder)


def test_changes_in_a_bucket_are_noticed(bucket: str, encoder: Encoder, tmp_path: Path) -> None:
    put(bucket, FILES)
    embed(bucket, tmp_path / "out", encoder)
    put(bucket, {"cat/000.png": FILES["dog/001.png"], "cat/zzz.png": FILES["dog/003.png"]})
    fsspec.filesystem("memory").rm("/bucket/dog/009.png")
    with pytest.raises(InvalidSource, match="add --sync"):
        embed(bucket, tmp_path / "out", encoder)
    summary = embed(bucket, tmp_path / "out", encoder, sync=True)
    assert (summary.done, summary.removed) == (2, 1)
    wanted = {**FILES, "cat/000.png": FILES["dog/001.png"], "cat/zzz.png": FILES["dog/003.png"]}
    assert_vectors(rows_in(tmp_path / "out"), wanted, encoder)


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz"])
def test_a_tar_over_http(
    name: str, served: tuple[str, Path], encoder: Encoder, tmp_path: Path
) -> None:
    url, root = served
    write_tar(root / name, FILES, "w:gz" if name.endswith("gz") else "w")
    embed(f"{url}/{name}", tmp_path / "out", encoder)
    before = file_bytes(tmp_path / "out")
    assert_vectors(rows_in(tmp_path / "out"), FILES, encoder)
    assert embed(f"{url}/{name}", tmp_path / "out", encoder).done == 0
    assert file_bytes(tmp_path / "out") == before


def test_parquet_over_http(served: tuple[str, Path], encoder: Encoder, tmp_path: Path) -> None:
    url, root = served
    table = pa.table({"id": list(FILES), "image": list(FILES.values()), "n": range(10)})
    pq.write_table(table, root / "images.parquet", row_group_size=4)
    embed(f"{url}/images.parquet", tmp_path / "out", encoder)
    rows = rows_in(tmp_path / "out")
    assert_vectors(rows, FILES, encoder)
    assert [row["metadata"] for row in rows.values()] == [{"n": number} for number in range(10)]


def test_a_list_and_a_table_of_urls(
    served: tuple[str, Path], encoder: Encoder, tmp_path: Path
) -> None:
    url, root = served
    write_folder(root, FILES)
    urls = [f"{url}/{name}" for name in FILES]
    (tmp_path / "list.txt").write_text("\n".join([*urls, f"{url}/none.png"]))
    pq.write_table(pa.table({"id": list(FILES), "url": urls}), tmp_path / "urls.parquet")
    summary = embed(tmp_path / "list.txt", tmp_path / "list", encoder)
    assert (summary.done, summary.rejected) == (10, 1)
    reason = json.loads(summary.rejected_file.read_text())["reason"]
    assert reason.startswith("cannot be ")
    assert_vectors(
        rows_in(tmp_path / "list"), {f"{url}/{n}": data for n, data in FILES.items()}, encoder
    )
    embed(tmp_path / "urls.parquet", tmp_path / "table", encoder)
    assert_vectors(rows_in(tmp_path / "table"), FILES, encoder)


def test_one_image_at_a_url(served: tuple[str, Path], encoder: Encoder, tmp_path: Path) -> None:
    url, root = served
    write_folder(root, {"one.png": FILES["cat/000.png"]})
    embed(f"{url}/one.png", tmp_path / "out", encoder)
    assert_vectors(rows_in(tmp_path / "out"), {"one.png": FILES["cat/000.png"]}, encoder)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nosuch://bucket/images", "nosuch"),
        ("memory://nowhere/images.tar", "cannot be read"),
        ("memory://nowhere/at/all", "cannot list"),
        ("http://127.0.0.1:9/images.parquet", "cannot be read"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused(
    url: str, reason: str, encoder: Encoder, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSource, match=reason):
        embed(url, tmp_path / "out", encoder)
