"""Dense feature maps over real gRPC."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from byol_serving.bundle import FeatureMap, write_bundle
from byol_serving.client import AsyncClient, Client
from byol_serving.config import ServeConfig
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidImage, InvalidRequest
from byol_serving.server import serving
from serving.support import make_bundle, png, random_pixels, reference, reference_cells, tiny_model

PIXELS = random_pixels(3)


def test_several_stages_in_one_call_with_their_facts(client: Client) -> None:
    known = {each.name: each for each in client.encoder().stages}
    assert (known["cells"].channels, known["cells"].side, known["cells"].stride) == (3, 4, 8)
    for images in (PIXELS, [png(each) for each in PIXELS]):
        found = client.extract_features(images, ["doubled", "cells"], with_embeddings=True)
        assert list(found.maps) == list(found.stages) == ["doubled", "cells"]
        assert found.stages["cells"] == known["cells"]
        np.testing.assert_allclose(found.maps["cells"], reference_cells(PIXELS), atol=1e-6)
        np.testing.assert_allclose(found.maps["doubled"], 2 * found.maps["cells"], atol=1e-6)
        assert found.embeddings is not None
        np.testing.assert_allclose(found.embeddings, reference(PIXELS), atol=1e-5)
    half = client.extract_features(PIXELS, ["cells"], dtype="float16")
    assert half.maps["cells"].dtype == np.float16
    assert half.embeddings is None
    np.testing.assert_allclose(half.maps["cells"], reference_cells(PIXELS), atol=1e-3)


async def test_callers_of_different_stages_share_batches_and_get_their_own(address: str) -> None:
    pixels = random_pixels(60)
    cells = reference_cells(pixels)
    async with AsyncClient(address, timeout=20) as client:
        found = await asyncio.gather(
            *(
                client.extract_features(pixels[at : at + 1], ["cells" if at % 2 else "doubled"])
                for at in range(60)
            )
        )
    for at, each in enumerate(found):
        ((name, values),) = each.maps.items()
        np.testing.assert_allclose(values[0], cells[at] * (1 if at % 2 else 2), atol=1e-5)
        assert name == ("cells" if at % 2 else "doubled")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "names no stage"),
        (["cells", "cells"], "one is there twice"),
        (["layer9"], "offers no stage 'layer9'; ask for: cells, doubled"),
        (["embedding"], "offers no stage 'embedding'"),
    ],
)
def test_stages_that_mean_nothing(client: Client, stages: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        client.extract_features(PIXELS, stages)


def test_the_rest_of_a_bad_request(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="float32 or float16"):
        client.extract_features(PIXELS, ["cells"], dtype="int8")
    with pytest.raises(InvalidRequest, match="no images"):
        client.extract_features([], ["cells"])
    with pytest.raises(InvalidImage, match="image 1: not an image"):
        client.extract_features([png(PIXELS[0]), b"text"], ["cells"])


async def test_maps_that_no_answer_could_hold_are_refused_before_any_work(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    config = ServeConfig(bundle=bundle.path, port=0, max_message_bytes=2**13)
    async with serving(config) as running, AsyncClient(running.address) as client:
        files = [png(each) for each in random_pixels(30)]
        wanted = (
            r"outputs for 30 images are 11520 bytes, over the limit of 7168; send up to 18 images"
        )
        with pytest.raises(InvalidRequest, match=wanted):
            await client.extract_features(files, ["cells", "doubled"])
        found = await client.extract_features(files[:18], ["cells", "doubled"])
        assert len(found.maps["cells"]) == 18


def test_a_bundle_that_names_a_map_its_graph_lacks_is_refused(tmp_path: Path) -> None:
    golden = random_pixels(2)
    info = make_bundle(tmp_path / "tiny").info
    lacking = FeatureMap(name="layer9", channels=1, side=1, stride=32)
    bundle = write_bundle(
        tmp_path / "lacking",
        tiny_model(),
        replace(info, features=(lacking,)),
        golden,
        reference(golden),
    )
    with pytest.raises(InvalidBundle, match="lacks the outputs layer9"):
        Encoder(bundle, device="cpu")
