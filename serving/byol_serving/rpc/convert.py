"""Messages to plain values and back: tensors, metadata, items.

Numbers in metadata: google.protobuf.Struct has only doubles. On the way in a whole number (up to
2**53 in size) becomes an int, so that {"label": 3} is stored and comes back as 3; that 3.0 comes
back as 3 too is the price, and no comparison can tell the two apart.
"""

import math
from collections.abc import Mapping

import numpy as np
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from numpy.typing import NDArray

from byol_serving.collections.types import Json, Metadata, Vectors
from byol_serving.errors import InvalidRequest, InvalidVector
from byol_serving.images import Pixels
from byol_serving.pb.byol.v1 import byol_pb2 as pb

_FLOAT_TYPES: Mapping[int, np.dtype[np.generic]] = {
    pb.DTYPE_UNSPECIFIED: np.dtype("<f4"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_INT8: np.dtype("i1"),
}
_MAX_WHOLE = float(2**53)
_INT8_SCALE = 127.0


# --- tensors ------------------------------------------------------------------------------------


def embeddings_to_tensor(rows: NDArray[np.float32], dtype: int = pb.DTYPE_FLOAT32) -> pb.Tensor:
    """A tensor as `pack_embeddings` fills it."""
    tensor = pb.Tensor()
    pack_embeddings(tensor, rows, dtype)
    return tensor


def pack_embeddings(
    tensor: pb.Tensor, rows: NDArray[np.float32], dtype: int = pb.DTYPE_FLOAT32
) -> None:
    """Fills a tensor that is part of a message: one made apart is copied into it once more.

    Args:
        tensor: to be filled.
        rows: float32 [...].
        dtype: float32, float16 or int8 (round(127 x), for normalised rows).

    Raises:
        InvalidRequest: another dtype was asked for, or values are too large for float16.
    """
    check_embedding_dtype(dtype)
    match dtype:
        case pb.DTYPE_FLOAT16:
            tensor.data = _halved(rows).tobytes()
        case pb.DTYPE_INT8:
            tensor.data = np.rint(rows * _INT8_SCALE).clip(-127, 127).astype("i1").tobytes()
        case _:
            dtype = pb.DTYPE_FLOAT32
            tensor.data = rows.astype(_FLOAT_TYPES[dtype], copy=False).tobytes()
    tensor.dtype = dtype  # type: ignore[assignment]  # on the wire an enum is any int
    tensor.shape[:] = rows.shape


def check_embedding_dtype(dtype: int) -> None:
    """Raises InvalidRequest unless embeddings can be packed so."""
    if dtype not in _FLOAT_TYPES:
        raise InvalidRequest(
            f"dtype {_dtype_name(dtype)} cannot hold embeddings; ask for float32, float16 or int8"
        )


def _halved(rows: NDArray[np.float32]) -> NDArray[np.float16]:
    try:
        with np.errstate(over="raise"):
            return rows.astype("<f2")
    except FloatingPointError as error:
        raise InvalidRequest(
            f"values up to {np.abs(rows).max():.3g} are over float16's 65504; ask for float32"
        ) from error


def raw_array(tensor: pb.Tensor) -> NDArray[np.generic]:
    """The array as it travelled (float32, float16 or int8), a read-only view of the message.

    Raises:
        InvalidRequest: dtype, shape and number of bytes do not belong together.
    """
    kind = _FLOAT_TYPES.get(tensor.dtype)
    if kind is None:
        raise InvalidRequest(
            f"dtype {_dtype_name(tensor.dtype)} cannot hold vectors; send float32, float16 or int8"
        )
    return _view(tensor, kind)


def tensor_to_vectors(tensor: pb.Tensor, *, ndim: int) -> Vectors:
    """Vectors as float32, [N, D] (ndim 2) or [D] (ndim 1); int8 is divided by 127.

    They may be a read-only view of the message.

    Whether the dimension fits and the values are finite is the collection's to check.

    Raises:
        InvalidVector: another number of dimensions.
        InvalidRequest: as in `raw_array`.
    """
    array = raw_array(tensor)
    if array.ndim != ndim:
        wanted = "[N, D]" if ndim == 2 else "[D]"
        raise InvalidVector(f"vector shape {list(array.shape)} is not {wanted}; reshape it")
    vectors = array.astype(np.float32, copy=False)
    return vectors / np.float32(_INT8_SCALE) if array.dtype == np.int8 else vectors


def tensor_to_pixels(tensor: pb.Tensor, size: int) -> Pixels:
    """Raw images as uint8 [N, size, size, 3], a read-only view of the message.

    Raises:
        InvalidRequest: not uint8, or another shape.
    """
    if tensor.dtype not in (pb.DTYPE_UNSPECIFIED, pb.DTYPE_UINT8):
        raise InvalidRequest(f"pixels are {_dtype_name(tensor.dtype)}; send uint8")
    array = _view(tensor, np.dtype("u1"))
    if array.ndim != 4 or array.shape[1:] != (size, size, 3):
        raise InvalidRequest(
            f"pixels have shape {list(array.shape)}, wanted [N, {size}, {size}, 3];"
            " resize and crop them, or send encoded images"
        )
    return array.view(np.uint8)


def pixels_to_tensor(pixels: Pixels) -> pb.Tensor:
    """Packs uint8 [N, S, S, 3]."""
    return pb.Tensor(data=pixels.tobytes(), dtype=pb.DTYPE_UINT8, shape=pixels.shape)


def _view(tensor: pb.Tensor, kind: np.dtype[np.generic]) -> NDArray[np.generic]:
    shape = tuple(tensor.shape)
    if any(side < 0 for side in shape):
        raise InvalidRequest(f"tensor shape {list(shape)} has a negative side")
    if (wanted := math.prod(shape) * kind.itemsize) != len(tensor.data):
        raise InvalidRequest(
            f"tensor of shape {list(shape)} and {kind.name} takes {wanted} bytes,"
            f" but {len(tensor.data)} were sent"
        )
    try:
        return np.frombuffer(tensor.data, kind).reshape(shape)
    except ValueError as error:  # over 64 sides, or sides past 2**63 beside a 0
        raise InvalidRequest(f"tensor shape with {len(shape)} sides is not usable") from error


def _dtype_name(dtype: int) -> str:
    known = dtype in pb.DType.values()  # so Name takes it, whatever its stub says
    return pb.DType.Name(dtype).removeprefix("DTYPE_").lower() if known else str(dtype)  # type: ignore[arg-type]


# --- metadata -----------------------------------------------------------------------------------


def struct_to_metadata(struct: Struct) -> dict[str, Json]:
    """A Struct as a dict of JSON values; see the module for numbers.

    Raises:
        InvalidRequest: a number is NaN or infinite, which JSON does not have.
    """
    return {key: value_to_json(value) for key, value in struct.fields.items()}


def value_to_json(value: Value) -> Json:
    """One value of a Struct; raises as `struct_to_metadata`."""
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            return _number(value.number_value)
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return struct_to_metadata(value.struct_value)
        case "list_value":
            return [value_to_json(each) for each in value.list_value.values]
        case _:
            return None


def metadata_to_struct(metadata: Metadata) -> Struct:
    """JSON values as a Struct.

    Raises:
        InvalidRequest: a key or value is not of JSON.
    """
    struct = Struct()
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise InvalidRequest(f"metadata key {key!r} is not a string")
        _fill(struct.fields[key], value)
    return struct


def json_to_value(value: Json) -> Value:
    """One JSON value; raises as `metadata_to_struct`."""
    message = Value()
    _fill(message, value)
    return message


def _fill(target: Value, value: Json) -> None:
    match value:
        case None:
            target.null_value = 0  # type: ignore[assignment]  # NULL_VALUE, an enum of one
        case bool():  # before int: True is an int in Python
            target.bool_value = value
        case str():
            target.string_value = value
        case int() | float() | np.integer() | np.floating():
            target.number_value = float(value)
        case Mapping():
            target.struct_value.CopyFrom(metadata_to_struct(value))
        case list() | tuple():
            target.list_value.CopyFrom(ListValue(values=map(json_to_value, value)))
        case _:
            raise InvalidRequest(
                f"metadata value {value!r} is of type {type(value).__name__};"
                " use strings, numbers, booleans, None, lists and dicts"
            )


def _number(number: float) -> int | float:
    if not math.isfinite(number):
        raise InvalidRequest(f"metadata number {number} is not finite; leave it out or send null")
    return int(number) if number.is_integer() and abs(number) <= _MAX_WHOLE else number
