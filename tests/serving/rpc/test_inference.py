"""The Open Inference Protocol v2: with Triton's own client, and message by message."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from byol_serving.client import Client
from byol_serving.pb.inference import grpc_service_pb2 as pb
from byol_serving.pb.inference import grpc_service_pb2_grpc
from serving.support import (
    DIM,
    SIZE,
    png,
    random_pixels,
    reference,
    reference_cells,
    reference_raw,
)

PIXELS = random_pixels(3)
FILES = [png(each) for each in PIXELS]


@pytest.fixture
def stub(address: str) -> Iterator[grpc_service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)


def test_tritonclient_works_unchanged(address: str, client: Client, tmp_path: Path) -> None:
    # The newest tritonclient asks for a newer grpcio than the server's: it may live elsewhere.
    python = os.environ.get("TRITON_PYTHON", sys.executable)
    np.save(tmp_path / "pixels.npy", PIXELS)
    script = Path(__file__).with_name("triton_client.py")
    command = [python, str(script), address, "tiny", str(tmp_path / "pixels.npy")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    if "No module named" in run.stderr:
        pytest.skip("needs tritonclient[grpc]")
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, True)
    assert not seen["other_ready"]
    assert seen["server"]["name"] == "byol-server"
    version = client.encoder().version
    assert seen["model"] == {
        "name": "tiny",
        "versions": [version],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "images", "datatype": "BYTES", "shape": ["-1"]},
            {"name": "pixels", "datatype": "UINT8", "shape": ["-1", str(SIZE), str(SIZE), "3"]},
        ],
        "outputs": [
            {"name": "embedding", "datatype": "FP32", "shape": ["-1", str(DIM)]},
            {"name": "raw_embedding", "datatype": "FP32", "shape": ["-1", str(DIM)]},
            {"name": "cells", "datatype": "FP32", "shape": ["-1", "3", "4", "4"]},
            {"name": "doubled", "datatype": "FP32", "shape": ["-1", "3", "4", "4"]},
        ],
    }
    config = seen["config"]
    assert (config["name"], config["platform"]) == ("tiny", "onnxruntime_onnx")
    assert config["input"] == [
        {"name": "images", "data_type": "TYPE_STRING", "dims": ["-1"], "optional": True},
        {
            "name": "pixels",
            "data_type": "TYPE_UINT8",
            "dims": ["-1", str(SIZE), str(SIZE), "3"],
            "optional": True,
        },
    ]
    assert config["output"][0] == {
        "name": "embedding",
        "data_type": "TYPE_FP32",
        "dims": ["-1", str(DIM)],
    }
    assert [each["name"] for each in config["output"]] == [
        each["name"] for each in seen["model"]["outputs"]
    ]
    assert seen["response"] == {"model_name": "tiny", "model_version": version, "id": "seven"}
    np.testing.assert_allclose(seen["by_files"], reference(PIXELS), atol=1e-5)
    np.testing.assert_allclose(seen["by_pixels"], reference(PIXELS), atol=1e-5)
    wanted = {
        "model": ("NOT_FOUND", "no model 'other'; loaded are: tiny"),
        "version": ("NOT_FOUND", "model 'tiny' has no version 'none'"),
        "image": ("INVALID_ARGUMENT", "image 1: not an image file"),
        "input": ("INVALID_ARGUMENT", "no input 'other'; send images or pixels"),
        "shape": ("INVALID_ARGUMENT", "wanted [N, 32, 32, 3]"),
        "type": ("INVALID_ARGUMENT", "input 'pixels' is 'FP32'; send UINT8"),
    }
    assert seen["errors"].keys() == wanted.keys()
    for name, (code, message) in wanted.items():
        status, text = seen["errors"][name]
        assert status == f"StatusCode.{code}"
        assert message in text


Tensor = pb.ModelInferRequest.InferInputTensor


def request(*inputs: Any, raw: list[bytes] | None = None, **more: Any) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name="tiny", inputs=inputs, raw_input_contents=raw, **more)


def test_typed_contents_are_answered_in_typed_contents(stub: Any) -> None:
    images = Tensor(name="images", datatype="BYTES", shape=[3])
    images.contents.bytes_contents.extend(FILES)
    pixels = Tensor(name="pixels", datatype="UINT8", shape=PIXELS.shape)
    pixels.contents.uint_contents.extend(PIXELS.ravel().tolist())
    for tensor in (images, pixels):
        answer = stub.ModelInfer(request(tensor), timeout=10)
        (output,) = answer.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("embedding", "FP32", [3, DIM])
        assert not answer.raw_output_contents
        rows = np.array(output.contents.fp32_contents).reshape(3, DIM)
        np.testing.assert_allclose(rows, reference(PIXELS), atol=1e-5)


def test_feature_maps_are_outputs_too(stub: Any) -> None:
    tensor = Tensor(name="pixels", datatype="UINT8", shape=PIXELS.shape)
    names = ["doubled", "raw_embedding", "embedding"]
    outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=each) for each in names]
    answer = stub.ModelInfer(request(tensor, raw=[PIXELS.tobytes()], outputs=outputs), timeout=10)
    assert [each.name for each in answer.outputs] == names
    maps, raw, rows = (np.frombuffer(each, "<f4") for each in answer.raw_output_contents)
    cells = reference_cells(PIXELS)
    np.testing.assert_allclose(maps.reshape(answer.outputs[0].shape), 2 * cells, atol=1e-5)
    np.testing.assert_allclose(raw.reshape(3, DIM), reference_raw(PIXELS), atol=1e-5)
    np.testing.assert_allclose(rows.reshape(3, DIM), reference(PIXELS), atol=1e-5)


def test_a_timeout_in_the_request_is_a_deadline(stub: Any) -> None:
    tensor = Tensor(name="pixels", datatype="UINT8", shape=PIXELS.shape)
    message = request(tensor, raw=[PIXELS.tobytes()])
    message.parameters["timeout"].int64_param = 1
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(message, timeout=10)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    message.parameters["timeout"].int64_param = 10_000_000
    assert stub.ModelInfer(message, timeout=10).outputs


def elements(*data: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in data)


BAD: dict[str, tuple[Callable[[], pb.ModelInferRequest], str]] = {
    "no input": (lambda: request(), "0 inputs; send one"),
    "both inputs": (lambda: request(Tensor(name="images"), Tensor(name="pixels")), "2 inputs"),
    "no model": (lambda: pb.ModelInferRequest(), "names no model"),
    "an unknown output": (
        lambda: request(
            Tensor(name="images", datatype="BYTES", shape=[1]),
            raw=[elements(FILES[0])],
            outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="x")],
        ),
        "offers no stage 'x'",
    ),
    "typed and raw": (
        lambda: request(
            Tensor(
                name="images",
                datatype="BYTES",
                shape=[1],
                contents=pb.InferTensorContents(bytes_contents=[b"x"]),
            ),
            raw=[elements(b"x")],
        ),
        "both typed and raw",
    ),
    "more raw contents than inputs": (
        lambda: request(Tensor(name="images", datatype="BYTES", shape=[1]), raw=[b"", b""]),
        "1 inputs but 2 raw contents",
    ),
    "a cut length": (
        lambda: request(Tensor(name="images", datatype="BYTES", shape=[2]), raw=[b"\0\0\0\0\1"]),
        "end inside element 1",
    ),
    "a length past the end": (
        lambda: request(
            Tensor(name="images", datatype="BYTES", shape=[1]), raw=[b"\xff\xff\xff\xffx"]
        ),
        "end inside element 0",
    ),
    "fewer elements than the shape": (
        lambda: request(Tensor(name="images", datatype="BYTES", shape=[2]), raw=[elements(b"x")]),
        r"shape \[2\] takes 2 elements, but 1",
    ),
    "fewer pixels than the shape": (
        lambda: request(
            Tensor(name="pixels", datatype="UINT8", shape=[1, SIZE, SIZE, 3]), raw=[b"x"]
        ),
        "takes 3072 values, but 1",
    ),
    "pixels over 255": (
        lambda: request(
            Tensor(
                name="pixels",
                datatype="UINT8",
                shape=[1, SIZE, SIZE, 3],
                contents=pb.InferTensorContents(uint_contents=[256] * 3072),
            )
        ),
        "UINT8 and holds 256",
    ),
    "a negative side": (
        lambda: request(Tensor(name="pixels", datatype="UINT8", shape=[-1, SIZE, SIZE, 3])),
        "must not be negative",
    ),
    "no images": (lambda: request(Tensor(name="images", datatype="BYTES", shape=[0])), "no images"),
}


@pytest.mark.parametrize(("build", "message"), BAD.values(), ids=BAD)
def test_requests_that_mean_nothing(
    stub: Any, build: Callable[[], pb.ModelInferRequest], message: str
) -> None:
    with pytest.raises(grpc.RpcError, match=message) as caught:
        stub.ModelInfer(build(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_field_numbers_are_the_specifications() -> None:
    wanted = {
        "ModelInferRequest": "model_name=1 model_version=2 id=3 parameters=4 inputs=5 outputs=6"
        " raw_input_contents=7",
        "ModelInferResponse": "model_name=1 model_version=2 id=3 parameters=4 outputs=5"
        " raw_output_contents=6",
        "InferTensorContents": "bool_contents=1 int_contents=2 int64_contents=3 uint_contents=4"
        " uint64_contents=5 fp32_contents=6 fp64_contents=7 bytes_contents=8",
        "ModelMetadataResponse": "name=1 versions=2 platform=3 inputs=4 outputs=5",
        "ModelConfig": "name=1 platform=2 max_batch_size=4 input=5 output=6",
        "ModelInput": "name=1 data_type=2 dims=4 optional=8",
        "ModelOutput": "name=1 data_type=2 dims=3",
        "InferParameter": "bool_param=1 int64_param=2 string_param=3 double_param=4 uint64_param=5",
    }
    for name, fields in wanted.items():
        message = pb.DESCRIPTOR.message_types_by_name[name]
        assert " ".join(f"{each.name}={each.number}" for each in message.fields) == fields
