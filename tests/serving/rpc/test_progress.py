"""Long calls of the clients tell how far they are."""

from collections.abc import Iterator

import numpy as np
import pytest

from byol_cli.progress import client_bar
from byol_serving.client import AsyncClient, Client
from byol_serving.client_progress import Progress, Tally
from byol_serving.errors import InvalidImage
from serving.support import png, random_pixels, reference

PIXELS = random_pixels(30)
FILES = [png(each) for each in PIXELS]


@pytest.fixture
def seen() -> list[Progress]:
    return []


def check(seen: list[Progress], *, total: int | None) -> None:
    done = [now.done for now in seen]
    assert done == sorted(set(done))
    assert done[-1] == 30
    assert {now.total for now in seen} == {total}
    for now in seen:
        assert now.rate == pytest.approx(now.done / now.seconds)
        left = None if total is None else (30 - now.done) / now.rate
        assert now.seconds_left == pytest.approx(left)


def test_lists_and_pixels_of_known_length(address: str, seen: list[Progress]) -> None:
    with Client(address, batch_size=8) as client:
        for images in (FILES, PIXELS):
            seen.clear()
            found = client.embed(images, progress=seen.append)
            np.testing.assert_allclose(found, reference(PIXELS), atol=1e-5)
            assert [now.done for now in seen] == [8, 16, 24, 30]
            check(seen, total=30)


def test_a_stream_tells_as_it_goes(address: str, seen: list[Progress]) -> None:
    with Client(address, batch_size=8) as client:
        stream = client.embed_stream(iter(FILES), progress=seen.append)
        next(stream)
        assert [now.done for now in seen] == [8]
        rest = list(stream)
        assert sum(map(len, rest)) == 22
        check(seen, total=None)
        list(client.embed_stream(FILES, progress=lambda now: seen.append(now)))
        assert seen[-1].total == 30


async def test_the_asynchronous_client_tells_too(address: str, seen: list[Progress]) -> None:
    async with AsyncClient(address, batch_size=8) as client:
        await client.embed(FILES, progress=seen.append)
        check(seen, total=30)
        seen.clear()
        await client.embed(PIXELS, progress=seen.append)
        check(seen, total=30)
        seen.clear()
        rows = [each async for each in client.embed_stream(FILES, progress=seen.append)]
        assert len(rows) == len(seen) == 4
        await client.create_collection("progress-a")
        seen.clear()
        ids = [str(number) for number in range(30)]
        await client.upsert("progress-a", ids, images=FILES, progress=seen.append)
        check(seen, total=30)


def test_upserts_by_image_and_by_vector(address: str, seen: list[Progress]) -> None:
    with Client(address, batch_size=8) as client:
        client.create_collection("progress")
        ids = [str(number) for number in range(30)]
        assert client.upsert("progress", ids, images=FILES, progress=seen.append).inserted == 30
        assert len(seen) == 4
        check(seen, total=30)
        seen.clear()
        vectors = reference(PIXELS)
        assert client.upsert("progress", ids, vectors=vectors, progress=seen.append).updated == 30
        check(seen, total=30)


def test_what_it_is_told_last_is_what_was_done(address: str, seen: list[Progress]) -> None:
    with Client(address, batch_size=8, concurrency=1) as client:
        with pytest.raises(InvalidImage, match="image 17"):
            client.embed([*FILES[:17], b"text", *FILES], progress=seen.append)
        assert seen[-1].done == 16

        def enough(now: Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.embed(FILES, progress=enough)
        assert client.embed(FILES).shape == (30, 16)


def test_loops_of_ones_own(seen: list[Progress]) -> None:
    def parts() -> Iterator[str]:
        yield from ("ab", "c", "")

    assert list(Tally(seen.append, 3).counted(parts(), len)) == ["ab", "c", ""]
    assert [now.done for now in seen] == [2, 3, 3]
    assert seen[-1].seconds_left == 0
    Tally(None, 3).add(1)


def test_the_command_lines_bar_shows_it(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(address, batch_size=8) as client, client_bar(quiet=False) as progress:
        client.embed(FILES, progress=progress)
    shown = capsys.readouterr().err
    assert "30/30" in shown
    assert "items/s  0 s left" in shown
    with client_bar(quiet=True) as progress:
        assert progress is None
