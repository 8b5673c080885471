"""Decoding and inference in one thread must answer as they do in two."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from byol_serving.config import ServeConfig
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidImage, Unavailable
from byol_serving.images import Pixels, load_input
from byol_serving.rpc.pipeline import Pipeline
from byol_serving.timing import STEPS, BatchRun, Step
from serving.support import encoded, make_bundle, random_pixels, reference

PIXELS = random_pixels(40)
FILES = [encoded(Image.fromarray(each), "PNG") for each in PIXELS]


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(make_bundle(tmp_path / "tiny"))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread that decoded, for each image."""
    found: list[threading.Thread] = []

    def watched(data: bytes, *how: Any) -> Pixels:
        found.append(threading.current_thread())
        return load_input(data, *how)

    monkeypatch.setattr("byol_serving.decoder.load_input", watched)
    return found


def pipeline(
    encoder: Encoder,
    together: bool,
    runs: list[tuple[str, BatchRun]] | None = None,
    *,
    cores: int = 2,
) -> Pipeline:
    config = ServeConfig(
        store=Path("unused"), max_batch=8, inference_workers=1, decode_workers=cores
    )

    def watch(step: str, run: BatchRun) -> None:
        if runs is not None:
            runs.append((step, run))

    how = encoder.bundle.info.preprocess
    return Pipeline(encoder.embed, how, config, together=together, watch=watch)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [1, 3, 40])
async def test_both_ways_give_the_encoders_rows(
    encoder: Encoder, together: bool, count: int
) -> None:
    asked = pipeline(encoder, together)
    steps: list[Step] = []
    STEPS.set(steps)
    rows = await asked.embed_images(FILES[:count])
    await asked.close()
    np.testing.assert_allclose(rows, reference(PIXELS[:count]), atol=1e-5)
    assert asked.queued() == {"decode": 0, "inference": 0}
    if count <= 8:  # larger ones go in pieces, each in a task of its own
        assert [step.name for step in steps] == ["decode", "inference"]
        times = [time for step in steps for time in (step.queued, step.began, step.ended)]
        assert times == sorted(times)


@pytest.mark.parametrize("together", [False, True])
async def test_both_ways_fail_the_bad_request_only_and_count_alike(
    encoder: Encoder, together: bool
) -> None:
    runs: list[tuple[str, BatchRun]] = []
    asked = pipeline(encoder, together, runs)
    with pytest.raises(InvalidImage, match="image 2: ") as caught:
        await asked.embed_images([*FILES[:2], b"no image"])
    assert caught.value.position == 2
    with pytest.raises(InvalidImage, match="image 0: "):
        await asked.embed_images([b"nor this"])
    await asked.embed_images(FILES[:4])
    await asked.close()
    assert items(runs, "decode") == 8
    # In threads of its own, inference never sees a request that has a bad image.
    assert items(runs, "inference") == (6 if together else 4)
    assert all(run.seconds > 0 and len(run.waits) <= 3 for _, run in runs)


async def test_an_encoder_that_fails_fails_the_request(encoder: Encoder) -> None:
    def broken(pixels: Pixels) -> NDArray[np.float32]:
        raise RuntimeError("broken")

    config = ServeConfig(store=Path("unused"), max_batch=8, inference_workers=1, decode_workers=2)
    asked = Pipeline(broken, encoder.bundle.info.preprocess, config, together=True)
    with pytest.raises(RuntimeError, match="broken"):
        await asked.embed_images(FILES[:2])
    await asked.close()


@pytest.mark.parametrize("together", [False, True])
async def test_thumbnails_stay_on_the_event_loop_and_give_the_same_rows(
    encoder: Encoder, together: bool
) -> None:
    threads: list[threading.Thread] = []

    def embed(pixels: Pixels) -> NDArray[np.float32]:
        threads.append(threading.current_thread())
        return encoder.embed(pixels)

    runs: list[tuple[str, BatchRun]] = []
    config = ServeConfig(store=Path("unused"), max_batch=8, inference_workers=1, decode_workers=2)
    how = encoder.bundle.info.preprocess
    asked = Pipeline(embed, how, config, together=together, watch=lambda *run: runs.append(run))
    steps: list[Step] = []
    STEPS.set(steps)
    files = [encoded(Image.fromarray(each), "JPEG") for each in PIXELS[:4]]
    rows = await asked.embed_images(files)
    np.testing.assert_array_equal(
        rows, encoder.embed(np.stack([load_input(f, how) for f in files]))
    )
    assert [step.name for step in steps] == ["decode", "inference"]
    assert items(runs, "decode") == items(runs, "inference") == 4
    assert all(thread is threading.main_thread() for thread in threads) == together
    with pytest.raises(InvalidImage, match="image 1: damaged JPEG") as caught:
        await asked.embed_images([files[0], files[1][:-200] + b"\xff\xd8" * 100])
    assert caught.value.position == 1
    before = items(runs, "decode") - items(runs, "inference")
    bad, good = await asyncio.gather(
        asked.embed_images([files[1][:-200]]), asked.embed_images(files), return_exceptions=True
    )
    assert isinstance(bad, InvalidImage)
    assert isinstance(good, np.ndarray)
    assert items(runs, "decode") - items(runs, "inference") == before + 1
    np.testing.assert_allclose(good, rows, atol=1e-6)
    await asked.close()
    with pytest.raises(Unavailable):
        await asked.embed_images(files)


@pytest.mark.parametrize("kind", ["large", "many", "progressive", "png"])
async def test_what_may_take_long_is_never_decoded_on_the_event_loop(
    encoder: Encoder, kind: str, threads: list[threading.Thread]
) -> None:
    small = Image.fromarray(PIXELS[0])
    match kind:
        case "large":
            files = [encoded(small.resize((200, 200)), "JPEG")]
        case "many":
            files = [encoded(small, "JPEG")] * 5
        case "progressive":
            files = [encoded(small, "JPEG", progressive=True)]
        case _:
            files = [encoded(small, "PNG")]
    asked = pipeline(encoder, together=True)
    assert len(await asked.embed_images(files)) == len(files)
    await asked.close()
    assert threads
    assert threading.main_thread() not in threads


async def test_a_process_with_one_core_decodes_photographs_on_its_event_loop(
    encoder: Encoder, threads: list[threading.Thread]
) -> None:
    runs: list[tuple[str, BatchRun]] = []
    asked = pipeline(encoder, together=True, runs=runs, cores=1)
    photographs = [Image.fromarray(each).resize((320, 240)) for each in PIXELS]
    files = [encoded(each, "JPEG") for each in photographs]
    how = encoder.bundle.info.preprocess
    wanted = encoder.embed(np.stack([load_input(each, how) for each in files]))
    rows = await asyncio.gather(asked.embed_images(files[:1]), asked.embed_images(files))
    np.testing.assert_allclose(rows[0], wanted[:1], atol=1e-6)
    np.testing.assert_allclose(rows[1], wanted, atol=1e-6)
    assert items(runs, "decode") == items(runs, "inference") == 41
    assert set(threads) == {threading.main_thread()}
    with pytest.raises(InvalidImage, match="image 25: damaged JPEG") as caught:
        await asked.embed_images([*files[:25], files[25][:-400], *files[26:]])
    assert caught.value.position == 25
    del threads[:]
    for other in (
        encoded(photographs[0].resize((1100, 1000)), "JPEG"),
        encoded(photographs[0], "JPEG", progressive=True),
        encoded(photographs[0], "PNG"),
    ):
        assert len(await asked.embed_images([files[0], other])) == 2
    assert len(threads) == 6
    assert threading.main_thread() not in threads
    assert asked.queued() == {"decode": 0, "inference": 0}
    await asked.close()
    with pytest.raises(Unavailable):
        await asked.embed_images(files)


def items(runs: Sequence[tuple[str, BatchRun]], step: str) -> int:
    return sum(run.items for name, run in runs if name == step)
