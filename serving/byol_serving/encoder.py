"""An encoder bundle in ONNX Runtime: pixels in, embeddings out, on CUDA, TensorRT or CPU.

How the sessions are laid out, by measurement on a CPU (docs/performance.md):

- Batches share one session with few intra-op threads, run by several Python threads at a time:
  ResNet-18 at 224 does 20% more images/s in two such threads than in one that uses both cores.
- A single image that finds the encoder idle runs in a second session with all cores, because
  nobody else wants them and half the latency is worth a second copy of the weights. Where that
  saves less than a quarter (small encoders lose by waking threads), the session is dropped again.
- No spinning: it brings nothing under load, and doubles the CPU time of an idle server.
- The arena stays on: without it a third of the throughput is lost to allocation.

On a GPU there is one session, and each worker has buffers of its own for batches padded to a few
sizes, gathered in pinned memory, from which the GPU copies them. With `cuda_graphs` each worker has
a session of its own beside it, for the sizes that are faster as one recorded launch.
"""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from byol_serving.batch_curve import BatchCurve, measure_curve, sizes_up_to, takes_at_most
from byol_serving.bundle import (
    EMBEDDING,
    GOLDEN_TOLERANCE,
    RAW_EMBEDDING,
    Bundle,
    cosine_distance,
)
from byol_serving.cuda_graphs import record
from byol_serving.cuda_threads import apart_from_recordings
from byol_serving.errors import InvalidBundle, InvalidConfig, InvalidRequest
from byol_serving.images import Pixels
from byol_serving.padded_batches import GPU_MAX_BATCH, Embeddings, PaddedBatches

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

MAX_WORKERS = 8
"""By default; with more cores each batch gets more threads instead."""
GPU_WORKERS = 2
"""One batch computes while the next is stacked and copied."""

_WORTH_A_COPY = 0.75
"""Part of the time of a single image that all cores must not exceed."""

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class Encoder:
    """`embed` is thread-safe and blocking; up to `workers` threads at a time are worth it."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "auto",
        threads: int = 0,
        workers: int = 0,
        cores: int = 0,
        device_id: int = 0,
        cuda_graphs: bool = False,
    ) -> None:
        """Loads the graph.

        Args:
            bundle: whose encoder to load.
            device: auto takes CUDA where ONNX Runtime offers it and a device is there, else CPU.
                TensorRT builds an engine for each padded size at its first use, which takes
                minutes once; engines are kept in the user's cache folder.
            threads: intra-op threads for one batch on the CPU; 0: the cores over `workers`.
            workers: batches at a time; 0: one for each core up to `MAX_WORKERS`, on a GPU two.
            cores: CPUs to use; 0: all that this process may run on.
            device_id: which GPU, as CUDA numbers those that this process may see.
            cuda_graphs: have `warm_up` record the batches of each padded size as a CUDA graph, and
                keep those that are faster; takes memory for the weights once more a worker.

        Raises:
            InvalidConfig: a GPU, or graphs, were asked for and are not to be had (never a silent
                fall back).
            InvalidBundle: ONNX Runtime cannot load the graph, or it is not an encoder.
        """
        self.bundle = bundle
        if not cores:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        gpu = _gpu_provider(device)
        self.workers = workers or (GPU_WORKERS if gpu else min(cores, MAX_WORKERS))
        threads = threads or max(1, cores // self.workers)
        self._session = _open_session(bundle, gpu, threads, device_id)
        self.provider: str = self._session.get_providers()[0]
        if device in _PROVIDERS and self.provider != _PROVIDERS[device]:
            raise InvalidConfig(
                f"device {device} was asked for, but ONNX Runtime fell back to {self.provider};"
                " run byol doctor to see what is missing, or use device=cpu"
            )
        _check_nodes(self._session, bundle)
        self.graph_sizes: list[int] = []
        """Padded sizes that `warm_up` found faster as CUDA graphs, of any worker."""
        self._recording: Callable[[], ort.InferenceSession] | None = None
        if cuda_graphs:
            _check_for_graphs(self.provider)
            self._recording = partial(
                _open_session, bundle, gpu, threads, device_id, cuda_graphs=True
            )
        self._alone = self._session
        self._running = 0
        self._count = threading.Lock()
        self._padded: queue.SimpleQueue[PaddedBatches] | None = None
        if self.provider != "CPUExecutionProvider":
            self._padded = queue.SimpleQueue()
            for _ in range(self.workers):
                self._padded.put(
                    PaddedBatches(self._session, self.image_size, self.dim, "cuda", device_id)
                )
        elif self.workers > 1 and threads < cores:
            self._alone = _open_session(bundle, None, cores)

    @property
    def dim(self) -> int:
        """Dimension D of the embedding."""
        return self.bundle.info.dim

    @property
    def on_gpu(self) -> bool:
        """Whether inference runs beside the CPU's work."""
        return self._padded is not None

    @property
    def image_size(self) -> int:
        """Height and width S of the input."""
        return self.bundle.info.preprocess.size

    def embed(self, pixels: Pixels) -> Embeddings:
        """Embeds uint8 [N, S, S, 3] as L2-normalised float32 [N, D].

        Raises:
            InvalidRequest: another shape or dtype.
        """
        self._check(pixels)
        if len(pixels) == 0:
            return np.empty((0, self.dim), np.float32)
        if self._padded is not None:
            return self._embed_padded(self._padded, pixels)
        with self._count:
            self._running += 1
            session = self._alone if self._running == 1 == len(pixels) else self._session
        try:
            (embedding,) = session.run(["embedding"], {"images": pixels})
        finally:
            with self._count:
                self._running -= 1
        return np.asarray(embedding, np.float32)

    def extract(self, pixels: Pixels, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Any outputs of the graph: `embedding` or `raw_embedding` [N, D], or feature maps.

        Feature maps are [N, C, H, W], each by its name in the bundle.

        ONNX Runtime runs the whole graph once, whichever outputs are asked for; the others cost no
        more than that and are not copied out.

        Args:
            pixels: uint8 [N, S, S, 3], at least one.
            outputs: names that the bundle offers, in the order of the answer.

        Raises:
            InvalidRequest: another shape or dtype.
        """
        self._check(pixels)
        if self.on_gpu:
            apart_from_recordings()
        return list(self._session.run(list(outputs), {"images": pixels}))

    def __del__(self) -> None:
        """The sessions' memory is given back next, by this thread."""
        if getattr(self, "_padded", None) is not None:
            apart_from_recordings()

    def _check(self, pixels: Pixels) -> None:
        size = self.image_size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise InvalidRequest(
                f"pixels are {pixels.dtype} {list(pixels.shape)},"
                f" wanted uint8 [N, {size}, {size}, 3]"
            )

    def warm_up(self, max_batch: int) -> BatchCurve:
        """Runs every layout once, so that no caller pays for it, and measures batches on the way.

        Takes a second or two on a CPU. The curve is that of one worker among idle ones.
        """
        blank = np.zeros((max_batch, self.image_size, self.image_size, 3), np.uint8)
        if self._padded is None:
            run = self._session.run
            curve = measure_curve(lambda n: run(["embedding"], {"images": blank[:n]}), max_batch)
            if self._alone is not self._session:
                wide = partial(self._alone.run, ["embedding"], {"images": blank[:1]})
                if not takes_at_most(_WORTH_A_COPY * curve.seconds[1], wide):
                    self._alone = self._session
            return curve
        runners = [self._padded.get() for _ in range(self.workers)]
        for runner in runners:
            for batch in sizes_up_to(min(max_batch, GPU_MAX_BATCH)):
                runner.embed(blank[:batch])
            if self._recording is not None:
                tolerance = GOLDEN_TOLERANCE[self.bundle.info.precision]
                recorded = record(runner, self._recording, tolerance)
                self.graph_sizes = sorted({*self.graph_sizes, *recorded})
        curve = measure_curve(lambda n: runners[0].embed(blank[:n]), min(max_batch, GPU_MAX_BATCH))
        for runner in runners:
            self._padded.put(runner)
        return curve

    def check_golden(self) -> float:
        """Replays the golden pairs; returns the largest cosine distance to PyTorch's embedding.

        Raises:
            InvalidBundle: past the tolerance of the bundle's precision.
        """
        images, wanted = self.bundle.golden()
        worst = float(cosine_distance(self.embed(images), wanted).max())
        limit = GOLDEN_TOLERANCE[self.bundle.info.precision]
        if not worst <= limit:  # NaN fails too
            raise InvalidBundle(
                f"{self.bundle.path} fails its golden check: cosine distance {worst:.2e} is over"
                f" {limit:.0e} on {self.provider}; export the bundle again"
            )
        return worst

    def _embed_padded(self, free: "queue.SimpleQueue[PaddedBatches]", pixels: Pixels) -> Embeddings:
        runner = free.get()
        try:
            step = GPU_MAX_BATCH
            parts = [runner.embed(pixels[at : at + step]) for at in range(0, len(pixels), step)]
        finally:
            free.put(runner)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _gpu_provider(device: Device) -> str | None:
    """The execution provider to try before the CPU's, or None."""
    if device == "cpu":
        return None
    wanted = _PROVIDERS.get(device, "CUDAExecutionProvider")
    if wanted in ort.get_available_providers():
        return wanted
    if device == "auto":
        return None
    name = "TensorRT" if device == "tensorrt" else "CUDA"
    raise InvalidConfig(
        f"device {device} was asked for, but this ONNX Runtime has no {name} provider;"
        " install byol-server[gpu], or use device=cpu"
    )


def _check_nodes(session: ort.InferenceSession, bundle: Bundle) -> None:
    names = [node.name for node in session.get_inputs()]
    if names != ["images"] or session.get_outputs()[0].name != EMBEDDING:
        raise InvalidBundle(
            f"{bundle.model_path} is not an encoder: its inputs are {names}, wanted ['images']"
        )
    offered = {node.name for node in session.get_outputs()}
    promised = {each.name for each in bundle.info.features}
    if bundle.info.raw_embedding:
        promised.add(RAW_EMBEDDING)
    if missing := promised - offered:
        raise InvalidBundle(
            f"{bundle.model_path} lacks the outputs {', '.join(sorted(missing))} that its"
            " bundle.json names; export the bundle again"
        )


def _check_for_graphs(provider: str) -> None:
    if provider != _PROVIDERS["cuda"]:
        raise InvalidConfig(
            f"cuda_graphs was asked for, but the encoder runs on {provider}; use device=cuda, or"
            " leave it out"
        )
    if not apart_from_recordings():
        raise InvalidConfig(
            "cuda_graphs was asked for, which needs cuda-bindings; install byol-server[gpu], or"
            " leave it out"
        )


def _open_session(
    bundle: Bundle,
    gpu: str | None,
    threads: int,
    device_id: int = 0,
    *,
    cuda_graphs: bool = False,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if gpu is not None:
        apart_from_recordings()
        # HEURISTIC: under EXHAUSTIVE every new batch size stalls for hundreds of milliseconds.
        # kSameAsRequested: the arena never shrinks, so it had better not double.
        cuda = {
            "device_id": str(device_id),
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": str(int(cuda_graphs)),
        }
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    if gpu == "TensorrtExecutionProvider":
        cache = _engine_cache(bundle)
        tensorrt = {
            "device_id": str(device_id),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_fp16_enable": "1" if bundle.info.precision == "fp16" else "0",
            "trt_int8_enable": "1" if bundle.info.precision == "int8" else "0",
        }
        providers.insert(0, ("TensorrtExecutionProvider", tensorrt))
    try:
        return ort.InferenceSession(bundle.model_path, options, providers=providers)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidBundle(f"ONNX Runtime cannot load {bundle.model_path}: {reason}") from error


def _engine_cache(bundle: Bundle) -> Path:
    """A folder for this graph's TensorRT engines, apart from the bundle, which may be read-only."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "byol-server" / "tensorrt" / bundle.info.encoder_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder
