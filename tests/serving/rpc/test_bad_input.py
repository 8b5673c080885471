"""Every bad input has a clear status, and the server answers the next request."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from byol_serving.client import Client
from byol_serving.client_channel import byol_error
from byol_serving.errors import (
    ByolError,
    ImageTooLarge,
    InvalidImage,
    InvalidRequest,
    InvalidVector,
    UnknownCollection,
)
from byol_serving.images import Preprocess, load_input
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from serving.support import DIM, SIZE, encoded, png, random_pixels, reference

PIXELS = random_pixels(5)
PICTURE = Image.fromarray(PIXELS[0].repeat(4, axis=0).repeat(4, axis=1))


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    """After each test the server must still answer, rightly and at once."""
    with Client(address, timeout=20) as client:
        yield client
        np.testing.assert_allclose(client.embed(PIXELS), reference(PIXELS), atol=1e-5)


@pytest.fixture
def collection(client: Client, request: pytest.FixtureRequest) -> Iterator[str]:
    client.create_collection("bad-input")
    client.upsert("bad-input", list("abcde"), images=PIXELS)
    yield "bad-input"
    assert client.collection("bad-input").count == 5
    client.drop_collection("bad-input")


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 50,000 x 50,000."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


BAD_IMAGES = {
    "empty": (b"", InvalidImage, "empty: 0 bytes"),
    "text": (b"This is not a JPEG, whatever its name is.", InvalidImage, "not an image file"),
    "truncated": (encoded(PICTURE, "JPEG")[:-100], InvalidImage, "damaged JPEG"),
    "header only": (encoded(PICTURE, "JPEG")[:20], InvalidImage, "image 1: "),
    "bomb": (bomb(), ImageTooLarge, "50000 x 50000 pixels is over the limit"),
}


@pytest.mark.parametrize(("data", "kind", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_name_their_position_and_reason(
    client: Client, data: bytes, kind: type[InvalidImage], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        client.embed([png(PIXELS[0]), data])
    assert caught.value.position == 1
    assert_status(caught.value, grpc.StatusCode.INVALID_ARGUMENT)


def odd_images() -> dict[str, bytes]:
    """Files that are unusual, and still images."""
    palette = PICTURE.convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(each) for each in PIXELS]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    deep = Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))
    return {
        "cmyk": encoded(PICTURE.convert("CMYK"), "JPEG"),
        "16-bit": encoded(deep, "PNG"),
        "palette with transparency": encoded(palette, "PNG", transparency=0),
        "animation": animation.getvalue(),
        "rotated by EXIF": encoded(PICTURE, "JPEG", exif=exif),
        "one pixel": encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
    }


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_are_embedded_as_their_pixels(client: Client, name: str) -> None:
    data = odd_images()[name]
    wanted = reference(load_input(data, Preprocess(size=SIZE))[None])
    np.testing.assert_allclose(client.embed([data]), wanted, atol=1e-5)


def test_an_exif_rotation_is_applied(client: Client) -> None:
    upright = Image.fromarray(np.asarray(PICTURE).transpose(1, 0, 2)[:, ::-1])
    rotated = client.embed([odd_images()["rotated by EXIF"]])
    np.testing.assert_allclose(rotated, client.embed([upright]), atol=0.05)
    assert np.abs(rotated - client.embed([PICTURE])).max() > 0.05


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite(client: Client, collection: str, value: float) -> None:
    vector = np.ones(DIM, np.float32)
    vector[3] = value
    with pytest.raises(InvalidVector, match="finite") as caught:
        client.search(collection, vector=vector, k=1)
    assert_status(caught.value, grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(InvalidVector, match="finite"):
        client.upsert(collection, ["new"], vectors=vector[None])


@pytest.mark.parametrize("k", [0, 6, 2**32 - 1])
def test_k_outside_the_collection(address: str, client: Client, collection: str, k: int) -> None:
    request = pb.SearchRequest(collection=collection, k=k, queries=[pb.Query(id="a")])
    with grpc.insecure_channel(address) as channel:
        stub = byol_pb2_grpc.CollectionsStub(channel)
        with pytest.raises(grpc.RpcError, match=rf"k {k} is outside 1\.\.5") as caught:
            stub.Search(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert type(byol_error(caught.value)) is InvalidRequest


def test_an_unknown_collection(client: Client) -> None:
    for attempt in (
        lambda: client.search("nowhere", image=PIXELS[0], k=1),
        lambda: client.upsert("nowhere", ["a"], images=PIXELS[:1]),
        lambda: client.get("nowhere", ["a"]),
        lambda: client.delete("nowhere", ["a"]),
        lambda: client.drop_collection("nowhere"),
    ):
        with pytest.raises(UnknownCollection, match="nowhere") as caught:
            attempt()
        assert_status(caught.value, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize("dim", [0, 1, DIM - 1, DIM + 1])
def test_a_wrong_dimension(client: Client, collection: str, dim: int) -> None:
    with pytest.raises(InvalidVector, match=f"dimension {dim} is not {DIM}"):
        client.search(collection, vector=np.ones(dim, np.float32), k=1)
    with pytest.raises(InvalidVector, match=rf"\[1, {dim}\]"):
        client.upsert(collection, ["new"], vectors=np.ones((1, dim), np.float32))


def test_a_message_that_is_too_large(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"larger than max .* send less") as caught:
        client.embed([bytes(5 * 2**20)])
    assert_status(caught.value, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_bytes_that_are_no_message(address: str, client: Client) -> None:
    with grpc.insecure_channel(address) as channel:
        embed: Any = channel.unary_unary("/byol.v1.Embedder/Embed")
        nothing: Any = channel.unary_unary("/byol.v1.Embedder/Nothing")
        with pytest.raises(grpc.RpcError) as caught:
            embed(b"\xff\xff\xff garbage", timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            nothing(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def assert_status(error: ByolError, code: grpc.StatusCode) -> None:
    failure = error.__cause__
    assert isinstance(failure, grpc.RpcError)
    assert failure.code() is code
