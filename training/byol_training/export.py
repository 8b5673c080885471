"""Online encoder to bundle.

"At the end of training, we only keep the encoder" (paper, section 3.1).

The exported graph takes uint8 pixels and gives L2-normalised embeddings: layout change, scaling,
mean, std and normalisation are inside it. ONNX Runtime must agree with PyTorch on real images.
"""

import io
import logging
import platform
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from byol_serving.bundle import Bundle, BundleInfo, cosine_distance, write_bundle
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidSource
from byol_serving.images import Pixels, Preprocess, to_input
from byol_training.checkpoint import find_checkpoint, load_checkpoint, load_encoder
from byol_training.data import load_images
from byol_training.pretrain import SAMPLES_FILE
from byol_training.served import ServedEncoder
from byol_training.whitening import Whitening, fit_whitening

OPSET = 18
GOLDEN_PAIRS = 8
PARITY_TOLERANCE = 1e-4
"""Largest cosine distance between ONNX Runtime and PyTorch at fp32 on real images."""


def export_bundle(
    encoder: nn.Module,
    path: Path,
    *,
    name: str,
    preprocess: Preprocess,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    samples: Pixels,
    training: Mapping[str, Any],
    data_fingerprint: str = "",
    scores: Mapping[str, float] | None = None,
    whitening: Whitening | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Exports, checks and writes a bundle.

    Args:
        encoder: float32 [N, 3, S, S] -> [N, D]; taken to the CPU and to eval mode.
        path: the directory to make.
        name: what to call it.
        preprocess: how bytes become the encoder's input.
        mean: of R, G and B: subtracted from pixels scaled to 0..1.
        std: divides them, likewise.
        samples: real images, uint8 [N, S, S, 3], at least one: parity is measured on all of them
            and the first become the golden pairs.
        training: the run's configuration, kept in bundle.json.
        data_fingerprint: of the training images.
        scores: measures to keep in bundle.json.
        whitening: of the encoder's outputs, becomes the graph's last layer before normalisation.
        overwrite: replace a bundle at `path`.

    Raises:
        InvalidBundle: ONNX Runtime and PyTorch differ by more than `PARITY_TOLERANCE`.
        AlreadyExists: `path` exists and `overwrite` is off.
    """
    plain = encoder.cpu().to(memory_format=torch.contiguous_format)
    served = ServedEncoder(plain, mean, std, whitening).eval()
    wanted = served.embed(samples)
    model = _to_onnx(served, samples[:2])
    info = BundleInfo(
        name=name,
        encoder_id="",
        preprocess=preprocess,
        dim=wanted.shape[1],
        opset=OPSET,
        training=training,
        data_fingerprint=data_fingerprint,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
    )
    distance = _parity(model, info, samples, wanted)
    info = replace(info, scores={**(scores or {}), "parity_max_cosine_distance": distance})
    golden = slice(0, GOLDEN_PAIRS)
    return write_bundle(path, model, info, samples[golden], wanted[golden], overwrite=overwrite)


def export_run(
    run: Path,
    path: Path,
    *,
    name: str | None = None,
    size: int | None = None,
    crop_fraction: float = 1.0,
    whiten_on: Path | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Exports the online encoder of a run directory; raises as `export_bundle` does.

    Args:
        run: a run directory of `pretrain`.
        path: the bundle to make.
        name: what to call it; the run's name by default.
        size: side of the input in pixels; the training views' by default.
        crop_fraction: part of the short side that the centre crop keeps when serving.
        whiten_on: images, best those of the run, to fit a whitening of the embedding on.
        overwrite: replace a bundle at `path`.

    Raises:
        InvalidSource: the run has no checkpoint, or a damaged one, or no samples; or too few images
            to whiten on.
    """
    newest = find_checkpoint(run)
    encoder, config = load_encoder(newest)
    preprocess = Preprocess(size=size or config.image_size, crop_fraction=crop_fraction)
    try:
        stored = np.load(run / SAMPLES_FILE)
    except (OSError, ValueError) as error:
        raise InvalidSource(
            f"{run / SAMPLES_FILE} cannot be read ({error}); it is written by byol train"
        ) from error
    whitening = None
    if whiten_on is not None:
        images = load_images(whiten_on, preprocess.size, crop_fraction=crop_fraction)
        served = ServedEncoder(encoder, config.augment.mean, config.augment.std)
        whitening = fit_whitening(served.embed(images.pixels, normalised=False))
    return export_bundle(
        encoder,
        path,
        name=name or run.resolve().name,
        preprocess=preprocess,
        mean=config.augment.mean,
        std=config.augment.std,
        samples=np.stack([to_input(image, preprocess) for image in stored]),
        training=config.to_dict(),
        data_fingerprint=load_checkpoint(newest).fingerprint,
        whitening=whitening,
        overwrite=overwrite,
    )


def _to_onnx(served: ServedEncoder, example: Pixels) -> bytes:
    """The graph by torch's current exporter, batch dynamic, checked by onnx.checker."""
    pixels = torch.from_numpy(np.repeat(example[:1], 2, axis=0))  # a batch of 1 would be fixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        program = torch.onnx.export(
            served,
            (pixels,),
            input_names=["images"],
            output_names=["embedding"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=65536)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise InvalidBundle("torch.onnx.export gave no program; see its messages above")
    onnx.checker.check_model(program.model_proto, full_check=True)
    buffer = io.BytesIO()
    onnx.save_model(program.model_proto, buffer)
    return buffer.getvalue()


def _parity(model: bytes, info: BundleInfo, samples: Pixels, wanted: NDArray[np.float32]) -> float:
    """Runs the graph in ONNX Runtime from a scratch bundle; returns the worst cosine distance."""
    with tempfile.TemporaryDirectory() as scratch:
        draft = write_bundle(Path(scratch) / "draft", model, info, samples[:1], wanted[:1])
        got = Encoder(draft, device="cpu").embed(samples)
    worst = float(cosine_distance(got, wanted).max())
    if not worst <= PARITY_TOLERANCE:
        raise InvalidBundle(
            f"ONNX Runtime differs from PyTorch by a cosine distance of {worst:.2e}, over"
            f" {PARITY_TOLERANCE:.0e}; the encoder holds an operation that exports inexactly"
        )
    return max(worst, 0.0)
