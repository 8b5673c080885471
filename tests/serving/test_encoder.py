"""The ONNX Runtime session: right vectors, right refusals, the golden check."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from byol_serving.bundle import Bundle, write_bundle
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidConfig, InvalidRequest
from serving.support import DIM, make_bundle, random_pixels, reference, tiny_model


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("count", [0, 1, 2, 7, 65])
def test_vectors_are_the_graphs(bundle: Bundle, count: int) -> None:
    pixels = random_pixels(count)
    found = Encoder(bundle, device="cpu").embed(pixels)
    assert found.shape == (count, DIM)
    assert found.dtype == np.float32
    if count:
        np.testing.assert_allclose(found, reference(pixels), atol=1e-6)


def test_other_shapes_and_types_are_refused(bundle: Bundle) -> None:
    encoder = Encoder(bundle, device="cpu")
    for wrong in (
        np.zeros((1, 32, 31, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
    ):
        with pytest.raises(InvalidRequest, match=r"wanted uint8 \[N, 32, 32, 3\]"):
            encoder.embed(wrong)  # type: ignore[arg-type]  # that is the point


def test_the_golden_check_passes_and_catches_another_encoders_pairs(
    tmp_path: Path, bundle: Bundle
) -> None:
    assert Encoder(bundle, device="cpu").check_golden() < 1e-6
    golden = random_pixels(3)
    wrong = write_bundle(
        tmp_path / "wrong", tiny_model(0), bundle.info, golden, reference(golden, seed=1)
    )
    with pytest.raises(InvalidBundle, match="fails its golden check"):
        Encoder(wrong, device="cpu").check_golden()
    nan = write_bundle(
        tmp_path / "nan", tiny_model(0), bundle.info, golden, np.full((3, DIM), np.nan, np.float32)
    )
    with pytest.raises(InvalidBundle, match="cosine distance nan"):
        Encoder(nan, device="cpu").check_golden()


def test_a_graph_that_is_no_encoder_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "other",
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    golden = random_pixels(1)
    foreign = write_bundle(
        tmp_path / "foreign", model.SerializeToString(), bundle.info, golden, reference(golden)
    )
    with pytest.raises(InvalidBundle, match="is not an encoder"):
        Encoder(foreign, device="cpu")
    broken = write_bundle(tmp_path / "broken", b"no graph", bundle.info, golden, reference(golden))
    with pytest.raises(InvalidBundle, match="ONNX Runtime cannot load"):
        Encoder(broken, device="cpu")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_cuda_is_never_silently_replaced(bundle: Bundle) -> None:
    with pytest.raises(InvalidConfig, match="no CUDA provider"):
        Encoder(bundle, device="cuda")
    assert Encoder(bundle).provider == "CPUExecutionProvider"


def test_a_looser_precision_has_a_looser_golden_check(tmp_path: Path, bundle: Bundle) -> None:
    golden = random_pixels(3)
    near = reference(golden) + np.float32(0.02)
    info = replace(bundle.info, precision="int8")
    loose = write_bundle(tmp_path / "int8", tiny_model(0), info, golden, near)
    assert 1e-4 < Encoder(loose, device="cpu").check_golden() < 5e-2
