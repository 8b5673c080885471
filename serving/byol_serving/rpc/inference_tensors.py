"""Tensors of the Open Inference Protocol v2: typed and raw contents, in and out.

Source: the protocol's specification, "Tensor Data" and "Raw Tensor Contents"; elements of BYTES in
raw contents each follow their length as little-endian uint32.
"""

import math
import struct

import numpy as np
from numpy.typing import NDArray

from byol_serving.errors import InvalidRequest
from byol_serving.images import Pixels
from byol_serving.pb.inference import grpc_service_pb2 as pb

_LENGTH = struct.Struct("<I")


def read_images(request: pb.ModelInferRequest) -> list[bytes]:
    """The elements of the one input, BYTES of any shape.

    Raises:
        InvalidRequest: another datatype, or not as many elements as the shape says.
    """
    tensor = request.inputs[0]
    raw = _raw(request)
    if tensor.datatype != "BYTES":
        raise InvalidRequest(f"input {tensor.name!r} is {tensor.datatype!r}; send BYTES")
    images = list(tensor.contents.bytes_contents) if raw is None else _split(raw, tensor.name)
    if len(images) != (wanted := _count(tensor)):
        raise InvalidRequest(
            f"input {tensor.name!r} of shape {list(tensor.shape)} takes {wanted} elements,"
            f" but {len(images)} were sent"
        )
    return images


def read_pixels(request: pb.ModelInferRequest, size: int) -> Pixels:
    """The one input as uint8 [N, size, size, 3].

    Raises:
        InvalidRequest: another datatype or shape, or not as many values as the shape says.
    """
    tensor = request.inputs[0]
    raw = _raw(request)
    if tensor.datatype != "UINT8":
        raise InvalidRequest(f"input {tensor.name!r} is {tensor.datatype!r}; send UINT8")
    shape = tuple(tensor.shape)
    if len(shape) != 4 or shape[1:] != (size, size, 3):
        raise InvalidRequest(
            f"input {tensor.name!r} has shape {list(shape)}, wanted [N, {size}, {size}, 3];"
            " resize and crop the images, or send encoded ones as BYTES"
        )
    values = _narrow(tensor) if raw is None else np.frombuffer(raw, np.uint8)
    if len(values) != (wanted := _count(tensor)):
        raise InvalidRequest(
            f"input {tensor.name!r} of shape {list(shape)} takes {wanted} values,"
            f" but {len(values)} were sent"
        )
    return values.reshape(shape)


def fill_output(
    response: pb.ModelInferResponse, name: str, values: NDArray[np.float32], *, raw: bool
) -> None:
    """Adds an FP32 output."""
    output = response.outputs.add(name=name, datatype="FP32", shape=values.shape)
    if raw:
        response.raw_output_contents.append(np.ascontiguousarray(values, "<f4").tobytes())
    else:
        output.contents.fp32_contents.extend(values.ravel().tolist())


def _raw(request: pb.ModelInferRequest) -> bytes | None:
    """The raw contents of the one input, None where it is typed."""
    if not request.raw_input_contents:
        return None
    if len(request.raw_input_contents) != len(request.inputs):
        raise InvalidRequest(
            f"{len(request.inputs)} inputs but {len(request.raw_input_contents)} raw contents;"
            " send one for each input"
        )
    if request.inputs[0].HasField("contents"):
        raise InvalidRequest("the request has both typed and raw contents; send one kind")
    return request.raw_input_contents[0]


def _split(raw: bytes, name: str) -> list[bytes]:
    """Elements of BYTES in raw contents."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(raw, at)[0] if start <= len(raw) else start
        if end > len(raw):
            raise InvalidRequest(
                f"raw contents of input {name!r} end inside element {len(elements)}; each element"
                " follows its length as little-endian uint32"
            )
        elements.append(raw[start:end])
        at = end
    return elements


def _narrow(tensor: pb.ModelInferRequest.InferInputTensor) -> Pixels:
    values = np.array(tensor.contents.uint_contents, np.uint32)
    if values.size and values.max() > 255:
        raise InvalidRequest(f"input {tensor.name!r} is UINT8 and holds {values.max()}, over 255")
    return values.astype(np.uint8)


def _count(tensor: pb.ModelInferRequest.InferInputTensor) -> int:
    if any(side < 0 for side in tensor.shape):
        raise InvalidRequest(
            f"input {tensor.name!r} has shape {list(tensor.shape)}; sides must not be negative"
        )
    return math.prod(tensor.shape)
