"""--sync: after any change of the source the output is what a first run of it would be."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_serving.collections.store import Store
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidSource
from byol_serving.indexing import journal as journals
from byol_serving.indexing.pipeline import run
from byol_serving.indexing.plan import Summary
from byol_serving.indexing.sinks import CollectionSink, NpySink
from serving.piles import embed, file_bytes, image_files, rows_in, small_plan, write_folder
from serving.support import DIM, png, random_pixels

FILES = image_files(30)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", FILES)


def assert_as_anew(source: Path, out: Path, encoder: Encoder, **settings: Any) -> None:
    """The output holds what a first run of the source gives, in the same shards."""
    fresh = out.with_name(f"{out.name}-anew")
    embed(source, fresh, encoder, **settings)
    ours, wanted = rows_in(out), rows_in(fresh)
    assert list(ours) == list(wanted)
    for id_, row in wanted.items():
        # A kept vector may have been made in another batch: the last bit may differ.
        np.testing.assert_allclose(ours[id_].pop("embedding"), row.pop("embedding"), atol=1e-6)
        assert ours[id_] == row
    theirs = {name: data for name, data in file_bytes(fresh).items() if "part-" not in name}
    assert {n: data for n, data in file_bytes(out).items() if "part-" not in n} == theirs
    assert {p.name for p in out.glob("part-*")} == {p.name for p in fresh.glob("part-*")}


def change(path: Path, seed: int) -> None:
    path.write_bytes(png(random_pixels(1, seed=seed)[0]))
    os.utime(path, ns=(seed, seed))


def test_changed_added_deleted_and_renamed(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(source, out, encoder)
    change(source / "cat" / "004.png", seed=99)
    (source / "ant.png").write_bytes(FILES["dog/001.png"])
    (source / "dog" / "029.png").unlink()
    (source / "dog" / "003.png").rename(source / "dog" / "zzz.png")
    summary = embed(source, out, encoder, sync=True)
    assert (summary.done, summary.skipped, summary.removed) == (3, 27, 2)
    assert_as_anew(source, out, encoder)
    assert embed(source, out, encoder).done == 0


def test_nothing_changed_nothing_written(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "bad.png").write_bytes(b"bad")
    embed(source, out, encoder)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    summary = embed(source, out, encoder, sync=True)
    assert (summary.done, summary.skipped, summary.rejected, summary.removed) == (0, 30, 1, 0)
    assert {path: path.stat().st_mtime_ns for path in out.glob("part-*")} == before


def test_a_bad_file_that_was_mended_and_a_good_one_that_broke(
    source: Path, encoder: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (source / "bad.png").write_bytes(b"bad")
    embed(source, out, encoder)
    (source / "bad.png").write_bytes(FILES["cat/000.png"])
    (source / "dog" / "001.png").write_bytes(b"broken")
    summary = embed(source, out, encoder, sync=True)
    assert (summary.done, summary.rejected, summary.removed) == (1, 1, 1)
    assert_as_anew(source, out, encoder)


@pytest.mark.parametrize("seed", range(4))
def test_any_changes_with_content_ids_and_duplicates(
    seed: int, encoder: Encoder, tmp_path: Path
) -> None:
    dice = random.Random(seed)
    contents = [png(pixels) for pixels in random_pixels(12, seed=seed)] + [b"bad", b"worse"]
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    names = [f"{number:02}.png" for number in range(40)]
    for step in range(5):
        for name in dice.sample(names, 6):
            match dice.randrange(3):
                case 0:
                    (source / name).unlink(missing_ok=True)
                case _:
                    (source / name).write_bytes(dice.choice(contents))
                    os.utime(source / name, ns=(step + 1, dice.randrange(10**9)))
        embed(source, out, encoder, ids="sha256", shard_size=5, sync=True)
    assert_as_anew(source, out, encoder, ids="sha256", shard_size=5)


class Stopped(Exception):
    """Raised where a kill would have struck."""


@pytest.mark.parametrize("strike", range(1, 16, 2))
def test_stopped_anywhere_a_sync_is_completed_by_the_next(
    strike: int, source: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    embed(source, out, encoder)
    (source / "aaa.png").write_bytes(FILES["dog/001.png"])  # shifts every shard
    (source / "dog" / "029.png").unlink()
    (source / "dog" / "027.png").unlink()
    with monkeypatch.context() as patch:
        for holder, name in ((journals, "write_durably"), (journals, "sync"), (Path, "replace")):
            patch.setattr(holder, name, struck(getattr(holder, name), countdown(strike)))
        with pytest.raises(Stopped):
            embed(source, out, encoder, sync=True)
    embed(source, out, encoder, sync=True)
    assert_as_anew(source, out, encoder)


def countdown(strike: int) -> Iterator[bool]:
    return iter([False] * (strike - 1) + [True] * 1000)


def struck(call: Callable[..., Any], blows: Iterator[bool]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        if next(blows):
            raise Stopped
        return call(*args)

    return wrapper


def test_a_sync_goes_on_where_it_was_stopped_unless_the_source_changed_again(
    source: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    embed(source, out, encoder)
    for name in ("cat/000.png", "cat/016.png", "dog/021.png"):
        change(source / name, seed=hash(name) % 1000)

    def commit(self: Any, shards: int, *, staged: bool) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "commit", commit)
        with pytest.raises(Stopped):
            embed(source, out, encoder, sync=True)
        with pytest.raises(Stopped):
            embed(source, out, encoder, sync=True)
    change(source / "cat" / "016.png", seed=7)
    summary = embed(source, out, encoder, sync=True)
    assert summary.done == 2  # cat/000 was staged before it; what comes later is made again
    assert_as_anew(source, out, encoder)


def test_npy_files_follow_too(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def sync() -> Summary:
        return run(small_plan(source, out, sync=True), [encoder], NpySink(DIM))

    sync()
    (source / "cat" / "000.png").unlink()
    assert (sync().done, sync().done) == (0, 0)
    vectors = np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"))])
    assert vectors.shape == (29, DIM)


def test_a_collection_follows(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        encoder_id = encoder.bundle.info.encoder_id
        collection = store.create("pets", dim=DIM, encoder_id=encoder_id)

        def sync() -> Summary:
            plan = small_plan(source, tmp_path / "journal", sync=True)
            return run(plan, [encoder], CollectionSink("pets", collection))

        assert sync().done == 30
        before = collection.get(["cat/002.png"], with_vectors=True)[0].vector
        (source / "cat" / "000.png").unlink()
        change(source / "cat" / "002.png", seed=5)
        (source / "cat" / "004.png").write_bytes(b"broken")
        (source / "dog" / "001.json").write_text('{"name": "Rex"}')
        (source / "new.png").write_bytes(FILES["cat/000.png"])
        summary = sync()
        assert (summary.done, summary.removed, summary.rejected) == (3, 2, 1)
        assert collection.info.count == 29
        after = collection.get(["cat/002.png"], with_vectors=True)[0].vector
        assert before is not None
        assert after is not None
        assert not np.allclose(before, after)
        assert collection.get(["dog/001.png"])[0].metadata == {"label": "dog", "name": "Rex"}


def test_a_source_that_became_empty_removes_nothing(
    source: Path, encoder: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    embed(source, out, encoder)
    source.rename(tmp_path / "elsewhere")
    source.mkdir()
    with pytest.raises(InvalidSource, match="holds no image"):
        embed(source, out, encoder, sync=True)
    assert len(rows_in(out)) == 30
