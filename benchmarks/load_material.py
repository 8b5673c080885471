"""What benchmarks/serve_load.py serves and asks for: encoders, and JPEGs made from real images."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageOps

from byol_serving.bundle import Bundle, BundleInfo, load_bundle, write_bundle
from byol_serving.images import Pixels, Preprocess, load_input
from byol_training.encoders import build_encoder
from byol_training.export import Precision, export_bundle

DATA = Path(__file__).parents[2] / "shared" / "data"
DIM = 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Load:
    """One of the loads: which encoder, which images."""

    name: str
    bundle: Bundle
    images: Path
    """A folder of JPEGs."""


def photographs(count: int) -> list[bytes]:
    """VGA photographs, 640 x 480, JPEG at quality 90, 108 kB on average."""
    files = []
    for data in islice(_members(DATA / "photos" / "photos.tar"), count):
        with Image.open(io.BytesIO(data)) as photo:
            buffer = io.BytesIO()
            ImageOps.fit(photo.convert("RGB"), (640, 480)).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
    return files


def small_images(count: int) -> list[bytes]:
    """CIFAR-10's JPEGs of 32 x 32, 1 kB."""
    return list(islice(_members(DATA / "cifar10" / "test.tar"), count))


def write_images(folder: Path, files: list[bytes]) -> Path:
    """Writes them into a new folder, in order."""
    folder.mkdir()
    for number, data in enumerate(files):
        (folder / f"{number:04}.jpg").write_bytes(data)
    return folder


def tiny_encoder(path: Path, size: int) -> Bundle:
    """Every eighth pixel (second at 32) times a random matrix: 0.1 ms an image, 512 dimensions.

    It stands in for a GPU that is fast enough, so that the server's own cost is what shows.
    """
    stride = 8 if size > 64 else 2
    side = size // stride
    weights = np.random.default_rng(0).standard_normal((side * side * 3, DIM)).astype(np.float32)
    ints = {"from": [0, 0], "to": [size, size], "axes": [1, 2], "steps": [stride, stride]}
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in ints.items()]
    constants += [
        numpy_helper.from_array(np.array([0, -1]), "flat"),
        numpy_helper.from_array(np.array([1]), "last"),
        numpy_helper.from_array(weights, "weights"),
    ]
    nodes = [
        helper.make_node("Slice", ["images", "from", "to", "axes", "steps"], ["coarse"]),
        helper.make_node("Cast", ["coarse"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["wide", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["projected"]),
        helper.make_node("ReduceL2", ["projected", "last"], ["norms"], keepdims=1),
        helper.make_node("Div", ["projected", "norms"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", DIM])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    golden = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    projected = golden[:, ::stride, ::stride].reshape(2, -1).astype(np.float32) @ weights
    wanted = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    info = BundleInfo(
        name="tiny", encoder_id="", preprocess=Preprocess(size=size), dim=DIM, opset=18
    )
    write_bundle(path, model.SerializeToString(), info, golden, wanted)
    return load_bundle(path)


def untrained_resnet(
    path: Path, samples: Pixels, precision: Precision, *, encoder: str = "resnet18"
) -> Bundle:
    """A ResNet for 224 pixels; untrained, but for the statistics of its batch norms.

    Speed does not depend on the weights. Without such statistics all embeddings would be alike, and
    a cosine between precisions would say nothing.
    """
    torch.manual_seed(0)
    network = build_encoder(encoder).train()
    pixels = torch.from_numpy(samples[:16]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        for _ in range(10):
            network((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    return export_bundle(
        network.eval(),
        path,
        name=f"{encoder}-{precision}",
        preprocess=Preprocess(size=224),
        mean=MEAN,
        std=STD,
        samples=samples,
        training={},
        precision=precision,
    )


def pixels_of(files: list[bytes], size: int) -> Pixels:
    """uint8 [N, size, size, 3]."""
    return np.stack([load_input(data, Preprocess(size=size)) for data in files])


def centred_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The mean cosine of rows after the mean of `b`'s is taken from both: a harder comparison."""
    a, b = a - b.mean(axis=0), b - b.mean(axis=0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).mean())


def _members(path: Path) -> Iterator[bytes]:
    if not path.exists():
        raise SystemExit(f"{path} is not there: this benchmark measures on real images")
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield file.read()
