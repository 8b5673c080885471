"""The run as a whole: bad files, duplicates, bounded memory, refusals, errors of the disk."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from byol_serving.bundle import Bundle
from byol_serving.encoder import Encoder
from byol_serving.errors import (
    EncoderMismatch,
    InvalidConfig,
    InvalidSource,
    StoreError,
    StoreLocked,
)
from byol_serving.images import ImageLimits, Pixels
from byol_serving.indexing import pipeline, stages
from byol_serving.indexing.pipeline import ahead, run
from byol_serving.indexing.plan import EmbedPlan, Progress
from byol_serving.indexing.sinks import ParquetSink
from serving.piles import (
    assert_vectors,
    embed,
    file_bytes,
    image_files,
    rows_in,
    small_plan,
    write_folder,
    write_tar,
)
from serving.support import make_bundle, png


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "_byol" / "rejected.jsonl").read_text().splitlines()
    return {line["path"]: line["reason"] for line in map(json.loads, lines)}


def test_bad_files_are_told_and_the_run_goes_on(encoder: Encoder, tmp_path: Path) -> None:
    good = image_files(11)
    bad = {
        "bad/empty.png": b"",
        "bad/text.jpg": b"hello",
        "bad/half.png": good["cat/000.png"][:60],
        "bad/black.png": png(np.zeros((32, 32, 3), np.uint8)),  # this encoder divides 0 by 0
        "bad/big.png": png(np.zeros((300, 300, 3), np.uint8)),
        f"bad/{'x' * 250}/{'y' * 250}/{'z' * 20}.png": good["cat/000.png"],
    }
    source = write_folder(tmp_path / "images", {**good, **bad})
    (source / "bad" / "gone.png").symlink_to("nowhere.png")
    (source / "bad" / "none.json").write_text('{"a": 1e999}')
    (source / "bad" / "none.png").write_bytes(good["cat/000.png"])
    summary = embed(source, tmp_path / "out", encoder, limits=ImageLimits(max_pixels=50_000))
    reasons = rejected(tmp_path / "out")
    assert reasons.keys() == {*bad, "bad/gone.png", "bad/none.png"}
    assert "empty" in reasons["bad/empty.png"]
    assert "not an image" in reasons["bad/text.jpg"]
    assert "damaged PNG" in reasons["bad/half.png"]
    assert "no finite vector" in reasons["bad/black.png"]
    assert "300 x 300 pixels is over the limit" in reasons["bad/big.png"]
    assert "No such file" in reasons["bad/gone.png"]
    assert "its metadata is not JSON" in reasons["bad/none.png"]
    assert any("at most 512" in reason for reason in reasons.values())
    assert (summary.done, summary.rejected) == (11, len(reasons))
    assert_vectors(rows_in(tmp_path / "out"), good, encoder)


def test_a_name_that_is_not_unicode_is_rejected_unless_ids_are_hashes(
    encoder: Encoder, tmp_path: Path
) -> None:
    data = image_files(1)["cat/000.png"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / b"caf\xe9.png".decode("utf-8", "surrogateescape")).write_bytes(data)
    assert embed(tmp_path / "images", tmp_path / "names", encoder).rejected == 1
    assert embed(tmp_path / "images", tmp_path / "hashes", encoder, ids="sha256").done == 1
    (row,) = rows_in(tmp_path / "hashes").values()
    assert row["source"].endswith("caf\ufffd.png")


def test_equal_files_are_embedded_once_under_their_hash(encoder: Encoder, tmp_path: Path) -> None:
    files = image_files(6)
    again = {f"zoo/{number}.png": data for number, data in enumerate(files.values())}
    source = write_folder(tmp_path / "images", {**files, **again, "a.png": files["dog/005.png"]})
    summary = embed(source, tmp_path / "out", encoder, ids="sha256", shard_size=5)
    rows = rows_in(tmp_path / "out")
    assert (summary.done, summary.duplicates, len(rows)) == (6, 7, 6)
    first = {Path(row["source"]).relative_to(source).as_posix() for row in rows.values()}
    assert first == {*files, "a.png"} - {"dog/005.png"}
    assert all(len(id_) == 64 for id_ in rows)
    assert embed(source, tmp_path / "out", encoder, ids="sha256", shard_size=5).skipped == 6


def test_a_name_that_stands_twice_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    data = image_files(1)["cat/000.png"]
    write_folder(tmp_path, {"one.png": data})
    (tmp_path / "list.txt").write_text("one.png\none.png\n")
    with pytest.raises(InvalidSource, match=r"'one\.png' stands twice"):
        embed(tmp_path / "list.txt", tmp_path / "out", encoder)
    assert embed(tmp_path / "list.txt", tmp_path / "hashes", encoder, ids="sha256").duplicates == 1


def test_what_a_folder_was_begun_with_must_stay(
    encoder: Encoder, bundle: Bundle, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "images", image_files(3))
    other = write_tar(tmp_path / "other.tar", image_files(3))
    stranger = Encoder(make_bundle(tmp_path / "stranger", seed=5), device="cpu", threads=1)
    out = tmp_path / "out"
    embed(source, out, encoder)
    before = file_bytes(out)
    with pytest.raises(EncoderMismatch, match="was begun with encoder_id"):
        embed(source, out, stranger)
    refused: dict[str, Callable[[], Any]] = {
        "source": lambda: embed(other, out, encoder),
        "shard_size": lambda: embed(source, out, encoder, shard_size=9),
        "ids": lambda: embed(source, out, encoder, ids="sha256"),
    }
    for key, attempt in refused.items():
        with pytest.raises(InvalidConfig, match=f"was begun with {key}"):
            attempt()
    assert file_bytes(out) == before


def test_one_run_at_a_time(encoder: Encoder, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", image_files(3))
    seen: list[str] = []

    def second(now: Progress) -> None:
        with pytest.raises(StoreLocked, match="another run writes"):
            embed(source, tmp_path / "out", encoder)
        seen.append("refused")

    info = encoder.bundle.info
    sink = ParquetSink(info.dim, info.encoder_id)
    run(small_plan(source, tmp_path / "out"), [encoder], sink, on_progress=second)
    assert seen


def test_a_disk_that_refuses_ends_the_run_and_keeps_what_is_finished(
    encoder: Encoder, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "images", image_files(30))
    out = tmp_path / "out"
    (out / ".part-00002.parquet.tmp" / "in the way").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"part-00002\.parquet cannot be written"):
        embed(source, out, encoder)
    kept = len(rows_in(out))
    assert kept in (16, 22)  # the last shard may have been waiting for the writer
    (out / ".part-00002.parquet.tmp" / "in the way").rmdir()
    (out / ".part-00002.parquet.tmp").rmdir()
    summary = embed(source, out, encoder)
    assert (summary.done, summary.skipped) == (30 - kept, kept)
    with pytest.raises(StoreError, match="cannot be written"):
        embed(source, source / "cat" / "000.png" / "out", encoder)


class Watched:
    """An encoder that is slow, and notes how many images wait for it at most."""

    def __init__(self, encoder: Encoder) -> None:
        self.bundle, self._encoder = encoder.bundle, encoder
        self.loaded = self.most = 0
        self.lock = threading.Lock()

    def embed(self, pixels: Pixels) -> NDArray[np.float32]:
        threading.Event().wait(0.02)  # decoders run as far ahead as they may
        with self.lock:
            self.most = max(self.most, self.loaded)
            self.loaded -= len(pixels)
        return self._encoder.embed(pixels)


@pytest.mark.parametrize(
    ("settings", "bound"), [({}, 3 * 4 + 2), ({"in_flight": 5}, 5), ({"in_flight": 9}, 9)]
)
def test_decoders_never_run_further_ahead_than_allowed(
    settings: dict[str, int],
    bound: int,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched: Any = Watched(encoder)

    def counted(*args: Any) -> Any:
        result = stages.decode(*args)
        with watched.lock:
            watched.loaded += 1
        return result

    monkeypatch.setattr(pipeline, "decode", counted)
    source = write_folder(tmp_path / "images", image_files(60))
    info = encoder.bundle.info
    sink = ParquetSink(info.dim, info.encoder_id)
    summary = run(small_plan(source, tmp_path / "out", **settings), [watched], sink)
    assert summary.done == 60
    assert 4 <= watched.most <= bound


def test_several_encoders_give_the_same_files(encoder: Encoder, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", image_files(40))
    info = encoder.bundle.info
    sink = ParquetSink(info.dim, info.encoder_id)
    run(small_plan(source, tmp_path / "one"), [encoder], sink)
    run(small_plan(source, tmp_path / "three"), [encoder] * 3, sink)
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "three")


def test_progress_is_told_to_the_end(encoder: Encoder, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", {**image_files(20), "x.png": b""})
    told: list[Progress] = []
    info = encoder.bundle.info
    sink = ParquetSink(info.dim, info.encoder_id)
    run(small_plan(source, tmp_path / "out"), [encoder], sink, on_progress=told.append)
    last = told[-1]
    assert (last.done, last.rejected, last.total, last.seconds_left) == (20, 1, 21, 0)
    assert last.busy.keys() == {"decode", "encode", "write"}
    assert all(0 < part <= 1 for part in last.busy.values())
    assert last.rate > 0
    assert last.peak_rss > 2**20


def test_a_pool_never_holds_more_than_its_limit() -> None:
    taken, most = 0, 0

    def items() -> Any:
        nonlocal taken, most
        for number in range(100):
            taken += 1
            most = max(most, taken)
            yield number

    with ThreadPoolExecutor(3) as pool:
        for given, result in enumerate(ahead(pool, lambda each: each * 2, items(), 5)):
            assert result == given * 2
            taken -= 1
    assert most == 5


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for settings, reason in (
        ({"shard_size": 0}, "shard_size 0 is outside"),
        ({"batch_size": 100_000}, "batch_size 100000 is outside"),
        ({"in_flight": 64}, "in_flight 64 is not above batch_size 64"),
        ({"ids": "md5"}, "ids 'md5' is unknown"),
    ):
        with pytest.raises(InvalidConfig, match=reason):
            EmbedPlan(source="x", out=tmp_path, **settings)
