"""A real encoder bundle, small enough to be made in milliseconds, and images to feed it."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from byol_serving.bundle import Bundle, BundleInfo, FeatureMap, write_bundle
from byol_serving.images import Pixels, Preprocess

SIZE, BLOCK, DIM = 32, 8, 16


def tiny_model(seed: int = 0, *, work: int = 0) -> bytes:
    """uint8 [N, 32, 32, 3] -> block means -> fixed random projection -> float32 [N, 16], L2 = 1.

    The projection is its `raw_embedding`; the block means [N, 3, 4, 4] and twice their value are
    its feature maps, `cells` and `doubled`.
    With `work`, so many convolutions of 64 channels are computed too, and multiplied by zero: the
    same embeddings at the price of a real network.
    """
    side = SIZE // BLOCK
    weights = _weights(seed)
    constants = [
        numpy_helper.from_array(np.array([0, side, BLOCK, side, BLOCK, 3]), "blocks"),
        numpy_helper.from_array(np.array([2, 4]), "within"),
        numpy_helper.from_array(np.array([0, -1]), "flat"),
        numpy_helper.from_array(np.array([1]), "last"),
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.array(255, np.float32), "white"),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["wide", "white"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "blocks"], ["grid"]),
        helper.make_node("ReduceMean", ["grid", "within"], ["means"], keepdims=0),
        helper.make_node("Transpose", ["means"], ["cells"], perm=[0, 3, 1, 2]),
        helper.make_node("Add", ["cells", "cells"], ["doubled"]),
        helper.make_node("Reshape", ["means", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["raw_embedding"]),
        helper.make_node("ReduceL2", ["raw_embedding", "last"], ["norms"], keepdims=1),
        helper.make_node("Div", ["raw_embedding", "norms"], ["unit" if work else "embedding"]),
        *_busy_nodes(work),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", DIM]),
            helper.make_tensor_value_info("raw_embedding", TensorProto.FLOAT, ["N", DIM]),
            helper.make_tensor_value_info("cells", TensorProto.FLOAT, ["N", 3, side, side]),
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["N", 3, side, side]),
        ],
        [*constants, *_busy_constants(work)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def reference(pixels: Pixels, seed: int = 0) -> NDArray[np.float32]:
    """What `tiny_model` computes, in NumPy."""
    raw = reference_raw(pixels, seed)
    rows: NDArray[np.float32] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return rows


def reference_raw(pixels: Pixels, seed: int = 0) -> NDArray[np.float32]:
    """The same before its normalisation."""
    side = SIZE // BLOCK
    grid = (pixels.astype(np.float32) / 255).reshape(-1, side, BLOCK, side, BLOCK, 3)
    rows: NDArray[np.float32] = grid.mean(axis=(2, 4)).reshape(len(pixels), -1) @ _weights(seed)
    return rows


def reference_cells(pixels: Pixels) -> NDArray[np.float32]:
    """The feature map `cells`, float32 [N, 3, 4, 4]."""
    side = SIZE // BLOCK
    grid = (pixels.astype(np.float32) / 255).reshape(-1, side, BLOCK, side, BLOCK, 3)
    cells: NDArray[np.float32] = grid.mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    return cells


def make_bundle(path: Path, seed: int = 0, *, work: int = 0) -> Bundle:
    """A bundle of `tiny_model`, with golden pairs from `reference`."""
    info = BundleInfo(
        name="tiny",
        encoder_id="",
        preprocess=Preprocess(size=SIZE),
        dim=DIM,
        opset=18,
        raw_embedding=True,
        features=tuple(
            FeatureMap(name=name, channels=3, side=SIZE // BLOCK, stride=BLOCK)
            for name in ("cells", "doubled")
        ),
    )
    golden = random_pixels(4, seed=7)
    return write_bundle(path, tiny_model(seed, work=work), info, golden, reference(golden, seed))


def random_pixels(count: int, *, seed: int = 0) -> Pixels:
    """uint8 [count, 32, 32, 3], every image of other colours."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def png(pixels: Pixels) -> bytes:
    """One image, losslessly."""
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _busy_nodes(work: int) -> list[onnx.NodeProto]:
    """From `scaled` to `nothing` [N, 1], which is added to `unit`."""
    if not work:
        return []
    names = ["planes", *(f"busy{i}" for i in range(work))]
    return [
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        *(
            helper.make_node("Conv", [a, "first" if a == "planes" else "more"], [b], pads=[1] * 4)
            for a, b in pairwise(names)
        ),
        helper.make_node("ReduceMean", [names[-1], "sides"], ["mean"], keepdims=0),
        helper.make_node("ReduceMean", ["mean", "last"], ["one"], keepdims=1),
        helper.make_node("Mul", ["one", "zero"], ["nothing"]),
        helper.make_node("Add", ["unit", "nothing"], ["embedding"]),
    ]


def _busy_constants(work: int) -> list[TensorProto]:
    if not work:
        return []
    return [
        numpy_helper.from_array(np.full((64, 3, 3, 3), 1 / 27, np.float32), "first"),
        numpy_helper.from_array(np.full((64, 64, 3, 3), 1 / 576, np.float32), "more"),
        numpy_helper.from_array(np.array([2, 3]), "sides"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]


def _weights(seed: int) -> NDArray[np.float32]:
    side = SIZE // BLOCK
    normal = np.random.default_rng(seed).standard_normal((side * side * 3, DIM))
    return normal.astype(np.float32)
