"""CUDA graphs: as far as a machine without a GPU can tell, and on one that has one."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from byol_serving import cuda_threads
from byol_serving.bundle import Bundle
from byol_serving.cuda_graphs import record
from byol_serving.cuda_threads import apart_from_recordings
from byol_serving.encoder import Encoder
from byol_serving.errors import InvalidConfig
from byol_serving.padded_batches import PaddedBatches
from serving.support import DIM, SIZE, make_bundle, random_pixels, reference

runtime = pytest.importorskip("cuda.bindings.runtime")
GOOD = runtime.cudaError_t.cudaSuccess
HAS_GPU = (
    runtime.cudaGetDeviceCount()[0] == GOOD
    and "CUDAExecutionProvider" in ort.get_available_providers()
)
TOLERANCE = 1e-4


class Watched(ort.InferenceSession):  # type: ignore[misc]  # ONNX Runtime has no types
    """A real session on the CPU that notes its runs; a slow one stands for many launches."""

    def __init__(self, bundle: Bundle, seconds: float = 0.0) -> None:
        super().__init__(bundle.model_path, providers=["CPUExecutionProvider"])
        self._seconds = seconds
        self.runs: list[tuple[str, int]] = []
        """The number of the graph, and the thread."""

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        time.sleep(self._seconds)
        number = "" if run_options is None else run_options.get_run_config_entry("gpu_graph_id")
        self.runs.append((number, threading.get_ident()))
        super().run_with_iobinding(iobinding, run_options)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def used(session: ort.InferenceSession, *sizes: int) -> PaddedBatches:
    """Batches of the session that have embedded these sizes."""
    padded = PaddedBatches(session, SIZE, DIM, "cpu")
    for size in sizes:
        padded.embed(random_pixels(size, seed=9))
    return padded


def test_batches_are_repeated_by_the_thread_that_recorded_them(bundle: Bundle) -> None:
    graphs = Watched(bundle)
    plain = Watched(bundle, seconds=0.02)
    padded = used(plain, 1, 4)
    assert record(padded, lambda: graphs, TOLERANCE) == [1, 4]
    before = len(plain.runs)
    for count in (1, 3, 4):
        pixels = random_pixels(count)
        first = padded.embed(pixels)
        padded.embed(random_pixels(count, seed=6))  # must not write into the answer above
        np.testing.assert_allclose(first, reference(pixels), atol=1e-6)
    assert len(plain.runs) == before
    numbers, threads = zip(*graphs.runs, strict=True)
    assert set(numbers) == {"1", "4"}
    assert set(threads) != {threading.get_ident()}
    assert len(set(threads)) == 1
    padded.embed(random_pixels(2))  # a size that was not recorded
    assert len(plain.runs) == before + 1


def test_a_recording_that_is_no_faster_is_left(bundle: Bundle) -> None:
    graphs = Watched(bundle, seconds=0.02)
    plain = Watched(bundle)
    padded = used(plain, 2)
    assert record(padded, lambda: graphs, TOLERANCE) == []
    seen = len(graphs.runs)
    pixels = random_pixels(2)
    np.testing.assert_allclose(padded.embed(pixels), reference(pixels), atol=1e-6)
    assert len(graphs.runs) == seen


def fails() -> ort.InferenceSession:
    raise RuntimeError("not all nodes are\non the GPU")


@pytest.mark.parametrize(
    ("opens", "says"),
    [
        (lambda other: Watched(other), "a batch of 2 differs, cosine distance"),
        (lambda _: fails(), "not all nodes are on the GPU"),
    ],
    ids=["wrong", "impossible"],
)
def test_what_cannot_be_recorded_runs_as_before(
    opens: Callable[[Bundle], ort.InferenceSession],
    says: str,
    bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = make_bundle(tmp_path / "other", seed=1)
    padded = used(Watched(bundle, seconds=0.02), 2)
    with caplog.at_level(logging.WARNING):
        assert record(padded, lambda: opens(other), TOLERANCE) == []
    (message,) = caplog.messages
    assert says in message
    pixels = random_pixels(2)
    np.testing.assert_allclose(padded.embed(pixels), reference(pixels), atol=1e-6)


def test_warming_up_records_for_every_worker(bundle: Bundle) -> None:
    """On the CPU, in an encoder that takes itself for one on a GPU."""
    encoder = Encoder(bundle, device="cpu", workers=2)
    encoder._padded = queue.SimpleQueue()
    for _ in range(2):
        encoder._padded.put(used(Watched(bundle, seconds=0.02)))
    opened: list[Watched] = []

    def opens() -> Watched:
        opened.append(Watched(bundle))
        return opened[-1]

    encoder._recording = opens
    encoder.warm_up(2)
    assert [{number for number, _ in each.runs} for each in opened] == [{"1", "2"}, {"1", "2"}]
    assert opened[0].runs[0][1] != opened[1].runs[0][1]
    pixels = random_pixels(2)
    np.testing.assert_allclose(encoder.embed(pixels), reference(pixels), atol=1e-6)


def test_graphs_are_never_silently_left_out(bundle: Bundle) -> None:
    with pytest.raises(InvalidConfig, match="runs on CPUExecutionProvider"):
        Encoder(bundle, device="cpu", cuda_graphs=True)


def test_a_thread_takes_its_mode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    local = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    taken: list[tuple[object, int]] = []

    def exchange(mode: object) -> tuple[object, object]:
        taken.append((mode, threading.get_ident()))
        return GOOD, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal

    monkeypatch.setattr(runtime, "cudaThreadExchangeStreamCaptureMode", exchange)
    monkeypatch.setattr(cuda_threads, "_thread", threading.local())
    found: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: found.extend((apart_from_recordings(), apart_from_recordings()))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert [mode for mode, _ in taken] == [local, local]


def test_without_a_gpu_no_thread_has_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime.cudaGetDeviceCount()[0] == GOOD:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(cuda_threads, "_thread", threading.local())
    assert not apart_from_recordings()


@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device, or an ONNX Runtime without CUDA")
def test_a_real_gpu_records_while_others_compute(bundle: Bundle) -> None:
    pixels = random_pixels(8)
    other = Encoder(bundle, device="cuda")
    other.warm_up(8)
    failures: list[Exception] = []
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            try:
                other.embed(pixels)
                PaddedBatches(other._session, SIZE, DIM, "cuda").embed(pixels)  # allocates
            except Exception as error:
                failures.append(error)

    beside = threading.Thread(target=compute)
    beside.start()
    encoder = Encoder(bundle, device="cuda", cuda_graphs=True)
    encoder.warm_up(8)
    stop.set()
    beside.join()
    assert not failures
    for count in (1, 3, 8):
        found = encoder.embed(pixels[:count])
        np.testing.assert_allclose(found, reference(pixels[:count]), atol=1e-3)
