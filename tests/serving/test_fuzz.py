"""Anything at all, as an image and as a request: a clear refusal or an answer, never a crash.

The examples are drawn anew each time; a failure prints the one that caused it.
"""

import io
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from byol_serving.client_admin import AdminClient
from byol_serving.config import ServeConfig
from byol_serving.errors import InvalidImage
from byol_serving.images import ImageLimits, Preprocess, load_input
from byol_serving.pb.byol.v1 import admin_pb2, byol_pb2
from byol_serving.pb.inference import grpc_service_pb2
from serving.rpc.conftest import ServerThread
from serving.support import make_bundle, random_pixels, reference

PIXELS = random_pixels(2)
LIMITS = ImageLimits(max_bytes=2**20, max_pixels=10**6, max_seconds=1.0)
HOW = Preprocess(size=32)
# Ten seconds are far more than any example takes, and the least that is surely a hang.
FUZZ = settings(
    deadline=10_000,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _files() -> dict[str, bytes]:
    picture = Image.fromarray(PIXELS[0].repeat(2, axis=0).repeat(2, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "JPEG": (picture, {"exif": exif}),
        "JPEG progressive": (picture, {"progressive": True}),
        "PNG": (picture.convert("P"), {"transparency": 0}),
        "GIF": (picture.convert("P"), {}),
        "WEBP": (picture, {}),
        "BMP": (picture, {}),
        "TIFF": (picture, {"compression": "tiff_lzw"}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, name.split()[0], **options)
        files[name] = buffer.getvalue()
    return files


FILES = _files()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image file with bytes changed, cut off, put in or there many times."""
    data = bytearray(draw(st.sampled_from(list(FILES.values()))))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["change", "cut", "put in", "repeat"])):
            case "change" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 64))]
            case "put in":
                data[at:at] = draw(st.binary(max_size=16))
            case "repeat":
                piece = data[at : at + draw(st.integers(1, 64))]
                data[at:at] = piece * draw(st.sampled_from([1, 2, 50, 1000]))
    return bytes(data)


@FUZZ
@given(st.one_of(st.binary(max_size=2000), damaged()))
def test_bytes_are_an_image_or_an_invalid_one(data: bytes) -> None:
    refused, began = "", time.thread_time()
    try:
        pixels = load_input(data, HOW, LIMITS)
    except InvalidImage as error:
        refused = str(error)
    else:
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
    assert "\n" not in refused
    assert time.thread_time() - began < 2 * LIMITS.max_seconds


# --- requests -----------------------------------------------------------------------------------

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (byol_pb2, admin_pb2, grpc_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_NAMES = [
    "",
    "a",
    "tiny",
    "cells",
    "images",
    "pixels",
    "embedding",
    "flat",
    "BYTES",
    "UINT8",
    "/..",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("fuzz")
    config = ServeConfig(
        bundle=make_bundle(folder / "tiny").path,
        store=folder / "store",
        port=0,
        max_batch=16,
        limits=LIMITS,
        log_level="error",
    )
    server = ServerThread(config)
    yield server
    server.stop()


@pytest.fixture
def address(server: ServerThread) -> str:
    return server.address


def _value(field: Any, depth: int) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return messages(GetMessageClass(field.message_type), depth + 1)
        case FieldDescriptor.CPPTYPE_STRING:
            return st.one_of(st.sampled_from(_NAMES), st.text(max_size=8))
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return st.floats(width=32)
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.integers(0, 9)
        case FieldDescriptor.CPPTYPE_INT64:
            return st.one_of(
                st.sampled_from([-1, 0, 1, 3, 16, 32]), st.integers(-(2**63), 2**63 - 1)
            )
        case FieldDescriptor.CPPTYPE_INT32:
            return st.integers(-(2**31), 2**31 - 1)
        case FieldDescriptor.CPPTYPE_UINT64:
            return st.integers(0, 2**64 - 1)
        case FieldDescriptor.CPPTYPE_UINT32:
            return st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1))
        case _:  # bytes share their C++ type with strings
            raise AssertionError(field.full_name)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], depth: int = 0) -> Message:
    """Any message of a kind, three levels deep."""
    message = kind()
    fields: Any = kind.DESCRIPTOR.fields
    for field in fields:
        nested = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if (nested and depth >= 3) or draw(st.integers(0, 2)) == 0:
            continue
        if field.type == FieldDescriptor.TYPE_BYTES:
            one: st.SearchStrategy[Any] = st.one_of(
                st.binary(max_size=64), st.sampled_from(list(FILES.values())), damaged()
            )
        else:
            one = _value(field, depth)
        if nested and field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(one, max_size=3)))
        elif nested:
            getattr(message, field.name).CopyFrom(draw(one))
        else:
            setattr(message, field.name, draw(one))
    return message


def ask(address: str, method: str, data: list[bytes]) -> tuple[grpc.StatusCode, str]:
    """Sends bytes as requests of a method; how it ended."""
    descriptor = METHODS[method]
    with grpc.insecure_channel(address) as channel:
        try:
            if descriptor.client_streaming:
                stream: Any = channel.stream_stream(method)
                list(stream(iter(data), timeout=20))
            else:
                call: Any = channel.unary_unary(method)
                call(data[0], timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@FUZZ
@given(data=st.data())
def test_requests_are_answered_or_refused(address: str, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(METHODS)))
    kind = GetMessageClass(METHODS[method].input_type)
    if data.draw(st.integers(0, 4)) == 0:
        requests = [data.draw(st.binary(max_size=200))]
    else:
        requests = [
            each.SerializeToString()
            for each in data.draw(st.lists(messages(kind), min_size=1, max_size=2))
        ]
    code, text = ask(address, method, requests)
    assert code is grpc.StatusCode.OK or code in REFUSALS, f"{method}: {code}: {text}"
    assert "Traceback" not in text
    assert "\n" not in text


def test_the_server_still_answers_rightly_after_all_that(address: str) -> None:
    test_requests_are_answered_or_refused(address)
    with AdminClient(address, timeout=20) as client:
        client.switch_model("tiny")  # which they may have unloaded
        np.testing.assert_allclose(client.embed(PIXELS), reference(PIXELS), atol=1e-5)
