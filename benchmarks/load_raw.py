"""The raw limits that benchmarks/serve_load.py holds servers against: no server, no clients."""

import itertools
import queue
import statistics
import threading
import time

import numpy as np

from byol_serving.batch_curve import BatchCurve
from byol_serving.bundle import Bundle
from byol_serving.encoder import Encoder
from byol_serving.images import Pixels, load_input

EVEN = 8
"""Images in flight, or clients, whose latencies are to be even."""
MOST_IN_A_BATCH = 16
"""Of the raw loop: larger batches of decoding win nothing, and make its windows coarse."""


def raw_loop(
    files: list[bytes], encoder: Encoder, curve: BatchCurve, bundle: Bundle, seconds: float
) -> float:
    """Images a second of decoding and inference, each in threads of its own, a queue between."""
    how, batch = bundle.info.preprocess, min(curve.best, MOST_IN_A_BATCH)
    source, lock = itertools.cycle(files), threading.Lock()
    decoded: queue.Queue[Pixels | None] = queue.Queue(maxsize=4)
    ended: list[float] = []
    ends = time.perf_counter() + seconds

    def decode() -> None:
        while time.perf_counter() < ends:
            with lock:
                taken = list(itertools.islice(source, batch))
            decoded.put(np.stack([load_input(data, how) for data in taken]))
        decoded.put(None)

    def infer() -> None:
        while (pixels := decoded.get()) is not None:
            encoder.embed(pixels)
            ended.append(time.perf_counter())

    threads = [
        threading.Thread(target=step) for step in (decode, infer) for _ in range(encoder.workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # From the first batch, when the pipeline is full, to the last of those that began in time.
    within = sorted(each for each in ended if each <= ends) or sorted(ended)
    return (len(within) - 1) * batch / max(within[-1] - within[0], 1e-9)


def raw_in_flight(
    files: list[bytes], encoder: Encoder, bundle: Bundle, seconds: float
) -> list[float]:
    """Seconds that images took, EVEN of which are queued or being worked on at any time."""
    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
    source, took = itertools.cycle(files), []
    for data in itertools.islice(source, EVEN):
        waiting.put((time.perf_counter(), data))
    ends = time.perf_counter() + seconds

    def work() -> None:
        while time.perf_counter() < ends:
            queued, data = waiting.get()
            encoder.embed(load_input(data, bundle.info.preprocess)[None])
            now = time.perf_counter()
            took.append(now - queued)
            waiting.put((now, next(source)))

    threads = [threading.Thread(target=work) for _ in range(encoder.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def raw_single_ms(files: list[bytes], bundle: Bundle, encoder: Encoder, seconds: float) -> float:
    """The median time of one image alone: decoded and embedded by a plain call."""
    times = []
    ends = time.perf_counter() + seconds
    for data in itertools.cycle(files):
        began = time.perf_counter()
        encoder.embed(load_input(data, bundle.info.preprocess)[None])
        times.append(time.perf_counter() - began)
        if time.perf_counter() > ends:
            break
    return 1000 * statistics.median(times)
