"""clip-retrieval's inference pipeline around our encoder, for benchmarks/offline.py.

Its reader, runner, writer and logger as `clip-retrieval inference` puts them together for a folder
of files; only the model is ours, the same ONNX file, instead of a CLIP that would be downloaded.
"""

import json
import os
import shutil
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from clip_retrieval.clip_inference.logger import LoggerWriter
from clip_retrieval.clip_inference.reader import FilesReader
from clip_retrieval.clip_inference.runner import Runner
from clip_retrieval.clip_inference.writer import NumpyWriter
from PIL import Image
from torchvision import transforms


class Mapper:
    """As its ClipMapper: a batch of the reader to what the writer wants."""

    def __init__(self, onnx: str) -> None:
        self.session = ort.InferenceSession(onnx, providers=["CPUExecutionProvider"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Uint8 [N, S, S, 3] in, float16 rows out, as its own."""
        (rows,) = self.session.run(["embedding"], {"images": batch["image_tensor"].numpy()})
        return {
            "image_embs": rows.astype(np.float16),
            "image_filename": batch["image_filename"],
            "text_embs": None,
            "text": None,
            "metadata": None,
        }


class Preprocess:
    """CLIP's: shorter side and centre crop; bytes, since the graph normalises."""

    def __init__(self, size: int) -> None:
        bicubic = transforms.InterpolationMode.BICUBIC
        steps = [transforms.Resize(size, interpolation=bicubic), transforms.CenterCrop(size)]
        self.steps = transforms.Compose(steps)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Uint8 [S, S, 3]."""
        return torch.from_numpy(np.array(self.steps(image.convert("RGB"))))


def run(*, onnx: str, size: int, source: str, batch: int, workers: int, out: str) -> float:
    """The whole run; seconds."""
    began = time.perf_counter()
    kinds = {"enable_text": False, "enable_image": True, "enable_metadata": False}
    runner = Runner(
        reader_builder=lambda sampler: FilesReader(
            sampler, Preprocess(size), None, source, batch, workers, **kinds
        ),
        mapper_builder=lambda: Mapper(onnx),
        writer_builder=lambda part: NumpyWriter(part, out, *kinds.values(), 1),
        logger_builder=lambda part: LoggerWriter(part, out + "/stats"),
        output_partition_count=1,
    )
    runner(0)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # its logger prints
    setup = json.loads(sys.stdin.readline())
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps({"seconds": run(**setup, **json.loads(line))}) + "\n")
