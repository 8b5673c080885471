"""Backup, restore and verification of collections while they are served."""

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest

from byol_serving.client import AsyncClient
from byol_serving.collections import database
from byol_serving.config import ServeConfig
from byol_serving.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    StoreCorrupt,
    UnknownCollection,
)
from byol_serving.server import serving

DIM = 8
ROWS = np.random.default_rng(2).standard_normal((500, DIM)).astype(np.float32)
IDS = [f"i{n}" for n in range(500)]


def config(path: Path, *, backups: bool = True) -> ServeConfig:
    return ServeConfig(store=path / "store", backups=path / "backups" if backups else None, port=0)


async def fill(client: AsyncClient, name: str) -> None:
    await client.create_collection(name, dim=DIM, encoder_id="e")
    await client.upsert(name, IDS, vectors=ROWS, metadata=[{"n": n} for n in range(500)])


async def test_a_backup_brings_back_what_was_there(tmp_path: Path) -> None:
    async with serving(config(tmp_path)) as running, AsyncClient(running.address) as client:
        await fill(client, "a")
        await fill(client, "b")
        made = await client.backup("monday")
        assert (made.path, list(made.collections)) == (str(tmp_path / "backups/monday"), ["a", "b"])
        before = [item async for item in client.items("a", with_vectors=True)]
        await client.delete("a", IDS[:400])
        await client.drop_collection("b")
        restored = await client.restore("monday", "a", name="a-monday")
        assert (restored.name, restored.count, restored.dim) == ("a-monday", 500, DIM)
        await client.restore("monday", "b")
        after = [item async for item in client.items("a-monday", with_vectors=True)]
        assert [(i.id, i.metadata) for i in after] == [(i.id, i.metadata) for i in before]
        assert all(
            np.array_equal(np.asarray(x.vector), np.asarray(y.vector))
            for x, y in zip(after, before, strict=True)
        )
        assert (await client.collection("a")).count == 100
        for name in ("a", "a-monday", "b"):
            found = await client.verify(name)
            assert found.ok
            assert found.stored == found.indexed == (100 if name == "a" else 500)
        hits = await client.search("a-monday", vector=ROWS[7], k=1)
        assert hits[0].id == "i7"


async def test_backups_and_restores_that_cannot_be(tmp_path: Path) -> None:
    async with serving(config(tmp_path)) as running, AsyncClient(running.address) as client:
        await fill(client, "a")
        await client.backup("monday")
        with pytest.raises(InvalidRequest, match="exists"):
            await client.backup("monday")
        for name in ("", "../monday", "a/b", ".hidden"):
            with pytest.raises(InvalidRequest, match="backup name"):
                await client.backup(name)
            with pytest.raises(InvalidRequest, match="backup name"):
                await client.restore(name, "a")
        with pytest.raises(InvalidRequest, match="collection name"):
            await client.restore("monday", "../store/a")
        with pytest.raises(InvalidRequest, match="collection name"):
            await client.restore("monday", "a", name="../a")
        with pytest.raises(NotFound, match="no backup"):
            await client.restore("tuesday", "a")
        with pytest.raises(NotFound, match="no backup"):
            await client.restore("monday", "never")
        with pytest.raises(AlreadyExists, match="'a' exists"):
            await client.restore("monday", "a")
        with pytest.raises(UnknownCollection):
            await client.verify("never")
        file = tmp_path / "backups" / "monday" / "a" / database.FILE
        data = bytearray(file.read_bytes())
        at = data.find((ROWS[3] / np.linalg.norm(ROWS[3])).astype("<f4").tobytes()[4:12])
        assert at > 0
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(StoreCorrupt, match="item 'i3'"):
            await client.restore("monday", "a", name="c")
        assert [each.name for each in await client.collections()] == ["a"]
        assert not list((tmp_path / "store").glob(".new-*"))
    async with (
        serving(config(tmp_path, backups=False)) as running,
        AsyncClient(running.address) as client,
    ):
        for call in (client.backup("x"), client.restore("monday", "a")):
            with pytest.raises(FailedPrecondition, match="--backups"):
                await call


async def test_a_backup_under_writes_is_of_one_moment(tmp_path: Path) -> None:
    """Each request writes a pair of items: a backup holds both of a pair or neither."""
    async with serving(config(tmp_path)) as running, AsyncClient(running.address) as client:
        await client.create_collection("a", dim=DIM, encoder_id="e")

        async def write() -> None:
            for n in itertools.count():
                await client.upsert("a", [f"{n}-x", f"{n}-y"], vectors=ROWS[:2])

        writing = [asyncio.create_task(write()) for _ in range(3)]
        for n in range(5):
            await client.backup(f"b{n}")
        for task in writing:
            assert not task.done()
            task.cancel()
        counts = []
        for n in range(5):
            await client.restore(f"b{n}", "a", name=f"a{n}")
            ids = [item.id async for item in client.items(f"a{n}")]
            assert len(ids) % 2 == 0
            assert {each[:-2] for each in ids[::2]} == {each[:-2] for each in ids[1::2]}
            counts.append(len(ids))
        assert counts == sorted(counts)
        assert counts[-1] > 0
