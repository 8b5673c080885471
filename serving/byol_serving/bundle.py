"""The encoder bundle: the one thing that training hands to serving, a directory of few files.

    encoder.onnx   images uint8 [N, S, S, 3] RGB -> embedding float32 [N, D], L2-normalised,
                   raw_embedding float32 [N, D], the same before that (and after any whitening),
                   and dense feature maps float32 [N, C, H, W] where the export was asked for them
    bundle.json    what it is, how bytes become pixels, where it came from, what it scored
    golden.npz     a few inputs and the embeddings PyTorch gave for them
    weights.safetensors   where asked for: the encoder's weights, for training to go on from

Mean, std, layout change and normalisation are inside the graph, so that they cannot drift. The
directory is written under a temporary name and renamed: a bundle is whole or not there.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byol_serving.errors import AlreadyExists, FailedPrecondition, InvalidBundle, InvalidRequest
from byol_serving.images import Pixels, Preprocess

FORMAT_VERSION = 1
MODEL_FILE = "encoder.onnx"
INFO_FILE = "bundle.json"
GOLDEN_FILE = "golden.npz"
WEIGHTS_FILE = "weights.safetensors"

EMBEDDING = "embedding"
RAW_EMBEDDING = "raw_embedding"
"""Names of the graph's outputs that are no feature maps."""

GOLDEN_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}
"""Largest cosine distance between ONNX Runtime's and PyTorch's embedding of one golden image."""


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A dense output of the graph, float32 [N, channels, side, side]."""

    name: str
    channels: int
    side: int
    stride: int
    """Input pixels from one column, or row, to the next."""


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """bundle.json, apart from the format version and the checksums."""

    name: str
    encoder_id: str
    """sha256 of encoder.onnx, in hexadecimal: the identity that collections record."""
    preprocess: Preprocess
    dim: int
    opset: int
    precision: str = "fp32"
    features: tuple[FeatureMap, ...] = ()
    raw_embedding: bool = False
    """Whether the graph gives the embedding before its normalisation too; older ones do not."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The configuration of the run that made it."""
    data_fingerprint: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Measures of the encoder, for instance knn_accuracy, parity_max_cosine_distance."""
    versions: Mapping[str, str] = field(default_factory=dict)
    weights_sha256: str = ""
    """Of weights.safetensors; empty where the bundle has none."""

    def check_raw(self) -> None:
        """Raises FailedPrecondition where the graph has no un-normalised embedding."""
        if not self.raw_embedding:
            raise FailedPrecondition(
                f"encoder {self.name!r} was exported before bundles held un-normalised embeddings;"
                " export it again with byol export"
            )


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose checksums were verified."""

    path: Path
    info: BundleInfo

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL_FILE

    @property
    def weights_path(self) -> Path | None:
        """The encoder's weights by PyTorch's names, float32; None where they were not kept."""
        return self.path / WEIGHTS_FILE if self.info.weights_sha256 else None

    def golden(self) -> tuple[Pixels, NDArray[np.float32]]:
        """Inputs uint8 [G, S, S, 3] and PyTorch's embeddings float32 [G, D] of them."""
        with np.load(self.path / GOLDEN_FILE) as arrays:
            return arrays["images"], arrays["embeddings"]


def write_bundle(
    path: Path,
    model: bytes,
    info: BundleInfo,
    golden_images: Pixels,
    golden_embeddings: NDArray[np.float32],
    *,
    weights: bytes | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Writes a bundle to `path`; the checksums in `info` are set here, from the files' bytes.

    Args:
        path: the directory to make.
        model: a serialised ONNX model.
        info: its facts.
        golden_images: uint8 [G, S, S, 3].
        golden_embeddings: float32 [G, D].
        weights: the encoder's, as safetensors, to keep beside the graph.
        overwrite: replace a bundle that stands at `path`; anything else there is never replaced.

    Raises:
        AlreadyExists: `path` exists, and is not a bundle or may not be overwritten.
    """
    if path.exists() and not (overwrite and (path / INFO_FILE).exists()):
        raise AlreadyExists(f"{path} exists; choose another path, or overwrite a bundle there")
    info = dataclasses.replace(
        info,
        encoder_id=hashlib.sha256(model).hexdigest(),
        weights_sha256=hashlib.sha256(weights).hexdigest() if weights is not None else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (scratch / MODEL_FILE).write_bytes(model)
    if weights is not None:
        (scratch / WEIGHTS_FILE).write_bytes(weights)
    np.savez(scratch / GOLDEN_FILE, images=golden_images, embeddings=golden_embeddings)
    facts = {
        "format_version": FORMAT_VERSION,
        "golden_sha256": _sha256(scratch / GOLDEN_FILE),
        **dataclasses.asdict(info),
    }
    (scratch / INFO_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    for file in scratch.iterdir():
        _fsync(file)
    if path.exists():
        shutil.rmtree(path)
    scratch.rename(path)
    _fsync(path.parent)
    return Bundle(path, info)


def load_bundle(path: Path) -> Bundle:
    """Opens a bundle and verifies that its files are those that were written.

    Raises:
        InvalidBundle: not a bundle, of a later format, truncated or altered.
    """
    try:
        facts = json.loads((path / INFO_FILE).read_text())
    except OSError as error:
        raise InvalidBundle(
            f"{path} is not an encoder bundle: {INFO_FILE} cannot be read ({error.strerror});"
            " make one with byol export"
        ) from error
    except ValueError as error:
        raise InvalidBundle(f"{path / INFO_FILE} is not JSON; export the bundle again") from error
    info = _parse(path, facts)
    sums = {MODEL_FILE: info.encoder_id, GOLDEN_FILE: facts["golden_sha256"]}
    if info.weights_sha256:
        sums[WEIGHTS_FILE] = info.weights_sha256
    for name, wanted in sums.items():
        if not (path / name).is_file():
            raise InvalidBundle(f"{path / name} is missing; copy or export the bundle again")
        if (found := _sha256(path / name)) != wanted:
            raise InvalidBundle(
                f"{path / name} is truncated or altered: sha256 {found[:12]}, written"
                f" {wanted[:12]}; copy or export the bundle again"
            )
    return Bundle(path, info)


def cosine_distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 - cos of the rows of two arrays [N, D]; NaN where a row is not finite or zero."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(wide_a, axis=1) * np.linalg.norm(wide_b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance: NDArray[np.float64] = 1.0 - (wide_a * wide_b).sum(axis=1) / norms
    return distance


def _parse(path: Path, facts: dict[str, Any]) -> BundleInfo:
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version != FORMAT_VERSION:
        raise InvalidBundle(
            f"{path} has bundle format {version!r}, this version reads {FORMAT_VERSION};"
            " export the bundle again with this version"
        )
    known = {f.name for f in dataclasses.fields(BundleInfo)}
    try:
        fields = {key: value for key, value in facts.items() if key in known}
        fields["preprocess"] = Preprocess(**facts["preprocess"])
        fields["features"] = tuple(FeatureMap(**each) for each in facts["features"])
        sums = (facts["golden_sha256"], facts.get("weights_sha256", ""))
        if not all(isinstance(each, str) for each in sums):
            raise TypeError("a checksum is not a string")
        return BundleInfo(**fields)
    except (KeyError, TypeError, InvalidRequest) as error:
        raise InvalidBundle(
            f"{path / INFO_FILE} lacks or misstates a field ({error}); export the bundle again"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
