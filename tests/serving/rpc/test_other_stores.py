"""A server whose collections live in Milvus answers the same calls, or says what it cannot."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from byol_serving.client import AsyncClient, SearchOptions
from byol_serving.config import ServeConfig
from byol_serving.errors import FailedPrecondition
from byol_serving.server import serving
from serving.support import make_bundle, png, random_pixels, reference

PIXELS = random_pixels(20, seed=6)
ROWS = reference(PIXELS)
IDS = [f"i{n:02}" for n in range(20)]


@pytest.mark.skipif(
    not (importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite")),
    reason="pymilvus or milvus-lite is not installed (extra: milvus)",
)
async def test_a_server_on_milvus(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    config = ServeConfig(
        bundle=bundle, store=f"milvus:{tmp_path / 'lite.db'}", backups=tmp_path, port=0
    )
    async with serving(config) as running, AsyncClient(running.address) as client:
        made = await client.create_collection("photos", index="auto")
        assert (made.index, made.version, made.recall) == ("auto", None, None)
        metadata = [{"n": n, "label": "cat" if n % 2 else "dog"} for n in range(20)]
        counts = await client.upsert("photos", IDS, images=map(png, PIXELS), metadata=metadata)
        assert (counts.inserted, counts.updated) == (20, 0)
        best = [IDS[n] for n in np.argsort(-(ROWS @ ROWS[3]), kind="stable")]
        pages = [
            page async for page in client.search_pages("photos", PIXELS[3], SearchOptions(k=6))
        ]
        assert [hit.id for page in pages for hit in page] == best
        cats = await client.search("photos", id="i03", k=20, where={"label": "cat"})
        assert [hit.id for hit in cats] == [each for each in best[1:] if int(each[1:]) % 2]
        await client.set_metadata("photos", ["i00"], [{"label": "owl"}])
        groups = await client.search_groups("photos", ROWS[3], by="label")
        assert {group.value for group in groups} == {"cat", "dog", "owl"}
        assert (await client.analysis.duplicates("photos", min_score=0.999)).groups == []
        assert await client.delete("photos", where={"n": {"gte": 10}}) == 10
        assert [item.id async for item in client.items("photos", page_size=4)] == IDS[:10]
        for call, what in (
            (client.backup("monday"), "no backup"),
            (client.restore("monday", "photos"), "no restore"),
            (client.verify("photos"), "no verify"),
            (client.search_many("photos", SearchOptions(version=1), ids=["i01"]), "count changes"),
        ):
            with pytest.raises(FailedPrecondition, match=what):
                await call
