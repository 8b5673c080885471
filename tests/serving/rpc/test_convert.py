"""Tensors, metadata and filters on the wire."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byol_serving.collections.filters import All, Any, Equals, Exists, Filter, In, Not, Range
from byol_serving.collections.types import Metadata
from byol_serving.errors import InvalidRequest, InvalidVector
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import (
    embeddings_to_tensor,
    metadata_to_struct,
    pixels_to_tensor,
    struct_to_metadata,
    tensor_to_pixels,
    tensor_to_vectors,
)
from byol_serving.rpc.filters import from_message, parse_where, to_message


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(pb.DTYPE_FLOAT32, 0.0), (pb.DTYPE_FLOAT16, 5e-4), (pb.DTYPE_INT8, 0.5 / 127 + 1e-6)],
)
def test_embeddings_survive_the_wire_within_their_precision(
    dtype: pb.DType.ValueType, tolerance: float
) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    tensor = embeddings_to_tensor(rows, dtype)
    assert (tensor.dtype, list(tensor.shape)) == (dtype, [5, 12])
    back = tensor_to_vectors(tensor, ndim=2)
    assert back.dtype == np.float32
    assert np.abs(back - rows).max() <= tolerance


def test_what_float16_cannot_hold_is_refused() -> None:
    rows = np.array([[1.0, -7e4]], np.float32)
    with pytest.raises(InvalidRequest, match=r"up to 7e.04 are over float16's 65504"):
        embeddings_to_tensor(rows, pb.DTYPE_FLOAT16)
    assert embeddings_to_tensor(rows).shape == [1, 2]


def test_pixels_survive_the_wire() -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.testing.assert_array_equal(tensor_to_pixels(pixels_to_tensor(pixels), 4), pixels)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (pb.Tensor(data=b"1234567", shape=[1, 2]), "takes 8 bytes, but 7 were sent"),
        (pb.Tensor(data=b"", shape=[-1, 2]), "negative"),
        (pb.Tensor(data=b"", shape=[0] * 100), "100 sides"),
        (pb.Tensor(data=b"", shape=[0, 2**62, 2**62]), "sides"),
        (pb.Tensor(data=b"12", dtype=pb.DTYPE_UINT8, shape=[1, 2]), "uint8"),
        (pb.Tensor(data=b"12", dtype=99, shape=[1, 2]), "99"),  # type: ignore[arg-type]
    ],
)
def test_broken_vectors_are_refused(tensor: pb.Tensor, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tensor_to_vectors(tensor, ndim=2)


def test_shapes_must_fit_their_place() -> None:
    with pytest.raises(InvalidVector, match=r"\[N, D\]"):
        tensor_to_vectors(pb.Tensor(data=bytes(8), shape=[2]), ndim=2)
    with pytest.raises(InvalidRequest, match=r"wanted \[N, 8, 8, 3\]"):
        tensor_to_pixels(pb.Tensor(data=bytes(48), shape=[1, 4, 4, 3]), 8)
    with pytest.raises(InvalidRequest, match="send uint8"):
        tensor_to_pixels(pb.Tensor(dtype=pb.DTYPE_FLOAT32), 8)
    with pytest.raises(InvalidRequest, match="uint8 cannot hold embeddings"):
        embeddings_to_tensor(np.zeros((1, 2), np.float32), pb.DTYPE_UINT8)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4))
def test_metadata_survives_the_wire(metadata: Metadata) -> None:
    assert struct_to_metadata(metadata_to_struct(metadata)) == metadata


def test_whole_numbers_come_back_as_integers_and_booleans_as_booleans() -> None:
    back = struct_to_metadata(metadata_to_struct({"a": 3, "b": 3.5, "c": True, "d": 1e300}))
    assert [type(back[key]) for key in "abcd"] == [int, float, bool, float]


def test_what_json_lacks_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not finite"):
        struct_to_metadata(metadata_to_struct({"a": float("nan")}))
    with pytest.raises(InvalidRequest, match="type bytes"):
        metadata_to_struct({"a": b"x"})


@pytest.mark.parametrize(
    ("where", "tree"),
    [
        ({"label": "cat"}, Equals("label", "cat")),
        ({"n": 3, "ok": True}, All((Equals("n", 3), Equals("ok", True)))),
        ({"label": ["cat", "dog"]}, In("label", ("cat", "dog"))),
        ({"price": {"gte": 3, "lt": 10}}, Range("price", gte=3.0, lt=10.0)),
        ({"label": {"in": ["a"]}}, In("label", ("a",))),
        ({"label": {"equals": "cat"}}, Equals("label", "cat")),
        ({"label": {"not": "cat"}}, Not(Equals("label", "cat"))),
        ({"price": {"not": {"gt": 2}}}, Not(Range("price", gt=2.0))),
        ({"seen": {"exists": True}}, Exists("seen")),
        ({"seen": {"exists": False}}, Not(Exists("seen"))),
        ({"$any": [{"a": 1}, {"b": 2}]}, Any((Equals("a", 1), Equals("b", 2)))),
        ({"$not": {"$all": [{"a": 1}]}}, Not(All((Equals("a", 1),)))),
        ({}, All(())),
    ],
)
def test_dict_filters(where: dict[str, object], tree: Filter) -> None:
    assert parse_where(where) == tree
    assert from_message(to_message(tree)) == tree


@pytest.mark.parametrize(
    "where",
    [
        {"a": None},
        {"": 1},
        {"a": {}},
        {"a": {"gte": "3"}},
        {"a": {"gte": float("nan")}},
        {"a": {"like": "x"}},
        {"a": [None]},
        {"$any": [{"a": object()}]},
    ],
)
def test_filters_that_mean_nothing_are_refused(where: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        parse_where(where)


def test_an_empty_filter_message_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no condition"):
        from_message(pb.Filter(all=pb.Filter.All(filters=[pb.Filter()])))
