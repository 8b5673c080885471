"""Online encoder to bundle.

"At the end of training, we only keep the encoder" (paper, section 3.1).

The exported graph takes uint8 pixels and gives L2-normalised embeddings: layout change, scaling,
mean, std and normalisation are inside it. What the normalisation is given is an output too, for who
needs lengths. ONNX Runtime must agree with PyTorch on real images.

fp16 and int8 bundles are smaller and faster, and a little less exact: how much, on real images that
nothing was calibrated on, is measured and written in the bundle.
"""

import copy
import io
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from byol_serving.bundle import (
    EMBEDDING,
    GOLDEN_TOLERANCE,
    RAW_EMBEDDING,
    Bundle,
    BundleInfo,
    cosine_distance,
    write_bundle,
)
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidBundle, InvalidSource
from byol_serving.images import Pixels, Preprocess, to_input
from byol_training.checkpoint import find_checkpoint, load_checkpoint, load_encoder
from byol_training.data import load_images
from byol_training.feature_export import feature_facts, features_parity, raw_parity
from byol_training.precision_cost import Labelled, load_labelled, precision_cost
from byol_training.pretrain import SAMPLES_FILE
from byol_training.quantize import quantize
from byol_training.served import ServedEncoder, ServedOutputs
from byol_training.whitening import Whitening, fit_whitening

Precision = Literal["fp32", "fp16", "int8"]

OPSET = 18
GOLDEN_PAIRS = 8


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
    precision: Precision = "fp32",
    labelled: Labelled | None = None,
    features: Sequence[str] = (),
    whitening: Whitening | None = None,
    keep_weights: bool = False,
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
        precision: of the weights and activations: fp16 halves the file, int8 quarters it and is
            several times as fast on a CPU.
        labelled: measures the change of kNN accuracy too, where the precision is not fp32.
        features: stages of the encoder whose dense feature maps the bundle offers too.
        whitening: of the encoder's outputs, becomes the graph's last layer before normalisation.
        keep_weights: put the encoder's float32 weights beside the graph, for training to start
            from: the graph's are folded and cannot be taken back.
        overwrite: replace a bundle at `path`.

    Raises:
        InvalidBundle: ONNX Runtime and PyTorch differ by more than the precision's
            `GOLDEN_TOLERANCE`.
        InvalidConfig: the encoder has no such stage.
        AlreadyExists: `path` exists and `overwrite` is off.
    """
    plain = encoder.cpu().to(memory_format=torch.contiguous_format)
    served = ServedEncoder(plain, mean, std, whitening).eval()
    wanted = served.embed(samples)
    maps = feature_facts(served, samples[:1], features)
    weights = _serialised(plain) if keep_weights else None
    model, versions = _convert(served, precision, samples, wanted, features)
    info = BundleInfo(
        name=name,
        encoder_id="",
        preprocess=preprocess,
        dim=wanted.shape[1],
        opset=OPSET,
        precision=precision,
        features=maps,
        raw_embedding=True,
        training=training,
        data_fingerprint=data_fingerprint,
        versions=versions,
    )
    with _draft(model, info, samples, wanted) as draft:
        measured = _measure(draft, served, samples, wanted, labelled)
    info = replace(info, scores={**(scores or {}), **measured})
    golden = slice(0, GOLDEN_PAIRS)
    return write_bundle(
        path, model, info, samples[golden], wanted[golden], weights=weights, overwrite=overwrite
    )


def export_run(
    run: Path,
    path: Path,
    *,
    name: str | None = None,
    size: int | None = None,
    crop_fraction: float = 1.0,
    precision: Precision = "fp32",
    measure_on: Path | None = None,
    features: Sequence[str] = (),
    whiten_on: Path | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
) -> Bundle:
    """Exports the online encoder of a run directory; raises as `export_bundle` does.

    Args:
        run: a run directory of `pretrain`.
        path: the bundle to make.
        name: what to call it; the run's name by default.
        size: side of the input in pixels; the training views' by default.
        crop_fraction: part of the short side that the centre crop keeps when serving.
        precision: see `export_bundle`.
        measure_on: a folder or tar with class sub-folders: measures what the precision costs in
            kNN accuracy.
        features: see `export_bundle`.
        whiten_on: images, best those of the run, to fit a whitening of the embedding on.
        keep_weights: see `export_bundle`.
        overwrite: replace a bundle at `path`.

    Raises:
        InvalidSource: the run has no checkpoint, or a damaged one, or no samples; `measure_on` has
            no labels; or there are too few images to whiten on.
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
        precision=precision,
        labelled=None if measure_on is None else load_labelled(measure_on, preprocess),
        features=features,
        whitening=whitening,
        keep_weights=keep_weights,
        overwrite=overwrite,
    )


def _convert(
    served: ServedEncoder,
    precision: Precision,
    samples: Pixels,
    wanted: NDArray[np.float32],
    features: Sequence[str],
) -> tuple[bytes, dict[str, str]]:
    """The graph in a precision, and the versions of what made it."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }
    match precision:
        case "fp32":
            return _to_onnx(served, samples[:2], features), versions
        case "fp16":
            return _to_onnx(_half(served), samples[:2], features), versions
        case "int8":
            quantized = quantize(_to_onnx(served, samples[:2], features), samples, wanted)
            return quantized.model, versions | {"calibration": quantized.method}


def _measure(
    draft: Encoder,
    served: ServedEncoder,
    samples: Pixels,
    wanted: NDArray[np.float32],
    labelled: Labelled | None,
) -> dict[str, float]:
    """How far the graph is from PyTorch, and what its precision costs."""
    info, encode = draft.bundle.info, partial(_embed, draft)
    measured = {"parity_max_cosine_distance": _parity(encode, info.precision, samples, wanted)}
    measured |= raw_parity(draft, served, samples[:GOLDEN_PAIRS])
    if info.features:
        measured |= features_parity(draft, served, samples[:GOLDEN_PAIRS])
    if info.precision != "fp32":
        measured |= precision_cost(encode, served, samples, wanted, labelled)
    return measured


def _serialised(encoder: nn.Module) -> bytes:
    """The weights as safetensors; cloned, since it refuses tensors that share memory."""
    data: bytes = save({name: value.clone() for name, value in encoder.state_dict().items()})
    return data


def _to_onnx(served: ServedEncoder, example: Pixels, features: Sequence[str]) -> bytes:
    """The graph by torch's current exporter, batch dynamic, checked by onnx.checker."""
    module = ServedOutputs(served, features).eval()
    pixels = torch.from_numpy(np.repeat(example[:1], 2, axis=0))  # a batch of 1 would be fixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            (pixels,),
            input_names=["images"],
            output_names=[EMBEDDING, RAW_EMBEDDING, *features],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=65536)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise InvalidBundle("torch.onnx.export gave no program; see its messages above")
    # Once more: what the embedding and the maps share was merged last, and batch norms before that.
    program.optimize()
    onnx.checker.check_model(program.model_proto, full_check=True)
    buffer = io.BytesIO()
    onnx.save_model(program.model_proto, buffer)
    return buffer.getvalue()


def _half(served: ServedEncoder) -> ServedEncoder:
    """A copy whose encoder is float16.

    In PyTorch and not by converting the graph: converters also lower the scaling and the
    normalisation around the encoder, at a thousand times the error.
    """
    half = copy.deepcopy(served)
    half.encoder.half()
    return half


@contextmanager
def _draft(
    model: bytes, info: BundleInfo, samples: Pixels, wanted: NDArray[np.float32]
) -> Iterator[Encoder]:
    """The graph in ONNX Runtime, from a scratch bundle."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_bundle(Path(scratch) / "draft", model, info, samples[:1], wanted[:1])
        yield Encoder(bundle, device="cpu")


def _embed(encoder: Encoder, pixels: Pixels) -> NDArray[np.float32]:
    """uint8 [N, S, S, 3] to float32 [N, D]."""
    return np.concatenate([encoder.embed(pixels[at : at + 64]) for at in range(0, len(pixels), 64)])


def _parity(
    encode: Callable[[Pixels], NDArray[np.float32]],
    precision: str,
    samples: Pixels,
    wanted: NDArray[np.float32],
) -> float:
    """The worst cosine distance between ONNX Runtime and PyTorch."""
    worst = float(cosine_distance(encode(samples), wanted).max())
    limit = GOLDEN_TOLERANCE[precision]
    if not worst <= limit:
        cause = "the encoder holds an operation that exports inexactly"
        if precision != "fp32":
            cause = f"{precision} is too coarse for this encoder; export it as fp32"
        raise InvalidBundle(
            f"ONNX Runtime differs from PyTorch by a cosine distance of {worst:.2e}, over"
            f" {limit:.0e}; {cause}"
        )
    return max(worst, 0.0)
