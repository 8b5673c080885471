"""Embeddings as they are before L2 normalisation, over real gRPC."""

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from byol_serving.bundle import load_bundle, write_bundle
from byol_serving.client import AsyncClient, Client
from byol_serving.config import ServeConfig
from byol_serving.errors import FailedPrecondition, InvalidImage, InvalidRequest
from byol_serving.pb.inference import grpc_service_pb2 as inference_pb
from byol_serving.pb.inference import grpc_service_pb2_grpc
from byol_serving.server import serving
from serving.support import (
    SIZE,
    make_bundle,
    png,
    random_pixels,
    reference,
    reference_raw,
    tiny_model,
)

PIXELS = random_pixels(5)
FILES = [png(each) for each in PIXELS]


def test_files_and_pixels_keep_their_lengths(client: Client) -> None:
    assert client.encoder().unnormalized
    for images in (PIXELS, FILES):
        found = client.embed(images, normalize=False)
        np.testing.assert_allclose(found, reference_raw(PIXELS), atol=1e-5)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).min() > 0.01
    half = client.embed(PIXELS, dtype="float16", normalize=False)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, reference_raw(PIXELS), rtol=1e-3, atol=1e-3)


def test_maps_come_with_either_kind(client: Client) -> None:
    for normalize, wanted in ((True, reference(PIXELS)), (False, reference_raw(PIXELS))):
        found = client.extract_features(
            PIXELS, ["cells"], with_embeddings=True, normalize=normalize
        )
        assert found.embeddings is not None
        np.testing.assert_allclose(found.embeddings, wanted, atol=1e-5)


async def test_both_kinds_at_once_and_each_gets_its_own(address: str) -> None:
    pixels = random_pixels(40)
    async with AsyncClient(address, timeout=20) as client:
        found = await asyncio.gather(
            *(client.embed([png(each)], normalize=at % 2 == 1) for at, each in enumerate(pixels))
        )
    rows = np.concatenate(found)
    np.testing.assert_allclose(rows[::2], reference_raw(pixels)[::2], atol=1e-5)
    np.testing.assert_allclose(rows[1::2], reference(pixels)[1::2], atol=1e-5)


async def test_a_stream_waits_for_room_like_any_other(tmp_path: Path) -> None:
    config = ServeConfig(bundle=make_bundle(tmp_path / "tiny").path, port=0, max_queued_images=8)
    pixels = random_pixels(60)
    files = [png(each) for each in pixels]
    async with serving(config) as running:

        def ask() -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
            with Client(running.address, batch_size=4) as client:
                rows = list(client.embed_stream(files, normalize=False))
                with pytest.raises(InvalidImage, match="image 6: not an image"):
                    list(client.embed_stream([*files[:6], b"text"], normalize=False))
                return rows

        rows = await asyncio.to_thread(ask)
        async with AsyncClient(running.address, batch_size=4) as client:
            again = [each async for each in client.embed_stream(files, normalize=False)]
    np.testing.assert_allclose(np.concatenate(rows), reference_raw(pixels), atol=1e-5)
    np.testing.assert_allclose(np.concatenate(again), reference_raw(pixels), atol=1e-5)


def test_int8_is_for_unit_vectors(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="ask for float32 or float16"):
        client.embed(PIXELS, dtype="int8", normalize=False)


async def test_a_bundle_from_before_serves_and_says_what_it_lacks(tmp_path: Path) -> None:
    whole = make_bundle(tmp_path / "whole")
    images, embeddings = whole.golden()
    old = replace(whole.info, raw_embedding=False)
    path = write_bundle(tmp_path / "old", tiny_model(), old, images, embeddings).path
    facts = (path / "bundle.json").read_text()
    (path / "bundle.json").write_text(facts.replace('  "raw_embedding": false,\n', ""))
    assert "raw_embedding" not in (path / "bundle.json").read_text()
    assert not load_bundle(path).info.raw_embedding
    async with (
        serving(ServeConfig(bundle=path, port=0)) as running,
        AsyncClient(running.address) as client,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        assert not (await client.encoder()).unnormalized
        np.testing.assert_allclose(await client.embed(PIXELS), reference(PIXELS), atol=1e-5)
        wanted = "exported before .* export it again with byol export"
        with pytest.raises(FailedPrecondition, match=wanted):
            await client.embed(FILES, normalize=False)
        with pytest.raises(FailedPrecondition, match=wanted):
            await client.extract_features(FILES, ["cells"], with_embeddings=True, normalize=False)
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        known = await stub.ModelMetadata(inference_pb.ModelMetadataRequest(name="tiny"))
        assert [each.name for each in known.outputs] == ["embedding", "cells", "doubled"]
        request = inference_pb.ModelInferRequest(
            model_name="tiny",
            inputs=[
                inference_pb.ModelInferRequest.InferInputTensor(
                    name="pixels", datatype="UINT8", shape=[1, SIZE, SIZE, 3]
                )
            ],
            raw_input_contents=[PIXELS[0].tobytes()],
            outputs=[
                inference_pb.ModelInferRequest.InferRequestedOutputTensor(name="raw_embedding")
            ],
        )
        with pytest.raises(grpc.RpcError, match=wanted) as caught:
            await stub.ModelInfer(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
