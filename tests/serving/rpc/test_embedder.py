"""The Embedder service over real gRPC."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from byol_serving.client import AsyncClient, Client
from byol_serving.errors import ImageTooLarge, InvalidImage, InvalidRequest
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from serving.support import DIM, SIZE, png, random_pixels, reference


def test_embeds_files_pixels_and_images_alike(client: Client, tmp_path: Path) -> None:
    pixels = random_pixels(3)
    (tmp_path / "a.png").write_bytes(png(pixels[0]))
    mixed = [tmp_path / "a.png", Image.fromarray(pixels[1]), pixels[2]]
    for answer in (client.embed(mixed), client.embed(pixels), client.embed(map(png, pixels))):
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, reference(pixels), atol=1e-5)


def test_a_long_list_is_split_and_keeps_its_order(address: str) -> None:
    pixels = random_pixels(70)
    with Client(address, batch_size=8) as client:
        np.testing.assert_allclose(client.embed(map(png, pixels)), reference(pixels), atol=1e-5)
        np.testing.assert_allclose(client.embed(pixels), reference(pixels), atol=1e-5)
        assert client.embed([]).shape == (0, 0)


def test_one_large_request_is_split_into_batches_by_the_server(address: str) -> None:
    pixels = random_pixels(100)
    with Client(address, batch_size=1000) as client:
        np.testing.assert_allclose(client.embed(map(png, pixels)), reference(pixels), atol=1e-5)


def test_smaller_dtypes(client: Client) -> None:
    pixels = random_pixels(4)
    half, byte = client.embed(pixels, dtype="float16"), client.embed(pixels, dtype="int8")
    assert (half.dtype, byte.dtype) == (np.dtype("float16"), np.dtype("int8"))
    np.testing.assert_allclose(half.astype(np.float32), reference(pixels), atol=1e-3)
    np.testing.assert_allclose(byte.astype(np.float32) / 127, reference(pixels), atol=5e-3)


def test_the_encoder_says_what_it_is(client: Client) -> None:
    info = client.encoder()
    assert (info.name, info.image_size, info.dim, info.precision) == ("tiny", SIZE, DIM, "fp32")
    assert len(info.encoder_id) == 64
    assert info.provider.endswith("ExecutionProvider")


def test_the_position_of_a_bad_image_is_that_in_the_callers_list(address: str) -> None:
    images = [png(each) for each in random_pixels(20)]
    images[13] = b"not an image"
    with Client(address, batch_size=4) as client:
        with pytest.raises(InvalidImage, match="image 13: not an image file") as caught:
            client.embed(images)
        assert caught.value.position == 13
        with pytest.raises(InvalidImage, match="image 13"):
            list(client.embed_stream(images))
    with Client(address) as client, pytest.raises(InvalidImage, match="image 13"):
        client.embed(images)


def test_the_first_of_several_bad_images_is_named(address: str) -> None:
    images = [b"", *(png(each) for each in random_pixels(50)), b""]
    with Client(address, batch_size=100) as client, pytest.raises(InvalidImage, match="image 0"):
        client.embed(images)


def test_a_missing_file_is_named_before_anything_is_sent(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match=r"image 0: .*none\.png cannot be read"):
        client.embed([tmp_path / "none.png"])


def test_a_stream_answers_in_order_and_reads_as_it_goes(address: str) -> None:
    pixels, read = random_pixels(300), 0

    def images() -> Iterator[bytes]:
        nonlocal read
        for each in pixels:
            read += 1
            yield png(each)

    with Client(address, batch_size=4) as client:
        rows = list(client.embed_stream(images()))
        assert len(rows) == 75
        np.testing.assert_allclose(np.concatenate(rows), reference(pixels), atol=1e-5)
        read = 0
        stream = client.embed_stream(images())
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert client.encoder().dim == DIM


async def test_the_asynchronous_client_does_the_same(address: str) -> None:
    pixels = random_pixels(50)
    images = [png(each) for each in pixels]
    async with AsyncClient(address, batch_size=8) as client:
        np.testing.assert_allclose(await client.embed(images), reference(pixels), atol=1e-5)
        rows = [each async for each in client.embed_stream(images)]
        np.testing.assert_allclose(np.concatenate(rows), reference(pixels), atol=1e-5)
        images[30] = b"text"
        with pytest.raises(InvalidImage, match="image 30"):
            await client.embed(images)
        with pytest.raises(InvalidImage, match="image 30"):
            _ = [each async for each in client.embed_stream(images)]


async def test_concurrent_callers_get_their_own_vectors(address: str) -> None:
    pixels = random_pixels(200)
    wanted = reference(pixels)
    async with AsyncClient(address) as client:
        rows = await asyncio.gather(*(client.embed([png(each)]) for each in pixels))
    np.testing.assert_allclose(np.concatenate(rows), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: pb.EmbedRequest(), InvalidRequest, "no images"),
        (
            lambda: pb.EmbedRequest(images=[b"x"], pixels=pb.Tensor()),
            InvalidRequest,
            "both images and pixels",
        ),
        (
            lambda: pb.EmbedRequest(images=[b"x"], dtype=pb.DTYPE_UINT8),
            InvalidRequest,
            "uint8 cannot hold embeddings",
        ),
        (
            lambda: pb.EmbedRequest(pixels=pb.Tensor(data=bytes(12), shape=[1, 2, 2, 3])),
            InvalidRequest,
            r"wanted \[N, 32, 32, 3\]",
        ),
        (
            lambda: pb.EmbedRequest(pixels=pb.Tensor(shape=[0, 32, 32, 3])),
            InvalidRequest,
            "no images",
        ),
    ],
)
def test_requests_that_mean_nothing(
    address: str, build: object, error: type[Exception], message: str
) -> None:
    assert callable(build)
    with grpc.insecure_channel(address) as channel:
        embed = byol_pb2_grpc.EmbedderStub(channel).Embed
        with pytest.raises(grpc.RpcError, match=message) as caught:
            embed(build(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_limits_name_the_remedy(client: Client) -> None:
    wide = Image.new("1", (20_000, 20_000))
    with pytest.raises(ImageTooLarge, match=r"20000 x 20000 pixels is over .* raise max_pixels"):
        client.embed([wide])
