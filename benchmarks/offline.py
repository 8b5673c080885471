"""Offline indexing: ours against its two limits and the bound that they set together.

ResNet-18 at 224 on photographs, and with the small-image stem at 32 on CIFAR-10, both exported
with untrained weights. `decode` reads and decodes and nothing else, in as many threads as ours;
`processes` does that in as many processes. `encode` embeds pixels that are there already. On a CPU
both want the same cores, so that the bound of any pipeline is 1 / (1 / decode + 1 / encode); on a
GPU it is the lower of the two. `ours` is the whole run, journal and Parquet files included; `ray`
the same on a local Ray cluster, `clip-retrieval` that project's pipeline around the same ONNX file.
"""

import importlib.util
import multiprocessing
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from byol_serving.bundle import MODEL_FILE, Bundle
from byol_serving.encoder import Encoder
from byol_serving.images import ImageLimits, Pixels, Preprocess
from byol_serving.indexing.entries import Entry
from byol_serving.indexing.pipeline import ahead, run
from byol_serving.indexing.plan import EmbedPlan
from byol_serving.indexing.sinks import ParquetSink
from byol_serving.indexing.sources import open_source
from byol_serving.indexing.stages import Decoded, Rejected, decode
from byol_training.config import AugmentConfig
from byol_training.data import list_images, load_images
from byol_training.encoders import build_encoder
from byol_training.export import export_bundle
from harness import CLIP_PYTHON, Options, Peer, Rate, interleaved, options, report

CLIP = "clip-retrieval"
THREADS = EmbedPlan(source="", out=Path()).threads
SHARED = Path(__file__).parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Case:
    """One set of images and the encoder for it."""

    name: str
    images: Path
    size: int
    stem: str
    count: int


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    photos, small = (48, 400) if chosen.quick else (500, 10_000)
    cases = [
        Case("photos", SHARED / "photos" / "photos.tar", 224, "imagenet", photos),
        Case("cifar", SHARED / "cifar10" / "test.tar", 32, "small", small),
    ]
    results: dict[str, Rate] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        on_ray = chosen.peers and importlib.util.find_spec("ray") is not None
        if on_ray:
            stack.enter_context(ray_session())
        spawn = multiprocessing.get_context("spawn")
        processes = stack.enter_context(ProcessPoolExecutor(THREADS, mp_context=spawn))
        for case in cases:
            if not case.images.exists():
                raise SystemExit(f"{case.images} is not there; see benchmarks/README.md")
            scratch_of = Path(scratch) / case.name
            found = measure(case, scratch_of, chosen, processes, stack, on_ray=on_ray)
            ours, bound = found["ours"].median, found["bound"].median
            ratios[f"vs_bound_{case.name}"] = ours / bound
            if on_ray:
                ratios[f"ray_vs_local_{case.name}"] = found["ray"].median / ours
            if CLIP in found:
                ratios[f"vs_{CLIP}_{case.name}"] = ours / found[CLIP].median
            results |= {f"{case.name} {name}": rate for name, rate in found.items()}
    facts = {case.name: f"{case.count} images, ResNet-18 at {case.size}" for case in cases}
    packages = ["onnxruntime", "pyarrow", *(["ray"] if on_ray else [])]
    report("offline", chosen, results, ratios, packages=packages, facts=facts)


def measure(
    case: Case,
    scratch: Path,
    chosen: Options,
    processes: Executor,
    stack: ExitStack,
    *,
    on_ray: bool,
) -> dict[str, Rate]:
    """Every candidate's images/s, and the bound, round by round."""
    scratch.mkdir()
    bundle = export(case, scratch / "bundle")
    encoder = Encoder(bundle)
    source = unpack(islice(open_source(case.images).entries(), case.count), scratch / "images")
    entries = list(open_source(source).entries())
    how = bundle.info.preprocess
    pixels = np.stack([each.pixels for each in decoded(entries, how) if isinstance(each, Decoded)])
    numbers = count()
    candidates: dict[str, Callable[[], float]] = {
        "decode": partial(decode_limit, entries, how),
        "processes": partial(decode_limit, entries, how, processes),
        "encode": partial(encode_limit, encoder, pixels),
        "ours": lambda: ours(source, bundle, encoder, scratch / f"out-{next(numbers)}", case.count),
    }
    if on_ray:
        candidates["ray"] = lambda: on_cluster(
            source, bundle, scratch / f"ray-{next(numbers)}", case.count
        )
    if chosen.peers and CLIP_PYTHON.exists():
        onnx = str(bundle.path / MODEL_FILE)
        peer = Peer("clip_retrieval_peer.py", python=CLIP_PYTHON, onnx=onnx, size=case.size)
        stack.enter_context(peer)
        candidates[CLIP] = lambda: on_clip_retrieval(peer, source, scratch / "clip", case.count)
    found = interleaved(candidates, unit="images/s", repeats=1)
    pairs = zip(found["decode"].values, found["encode"].values, strict=True)
    on_cpu = encoder.provider == "CPUExecutionProvider"
    bounds = (1 / (1 / d + 1 / e) if on_cpu else min(d, e) for d, e in pairs)
    return {**found, "bound": Rate("images/s", tuple(bounds))}


def export(case: Case, path: Path) -> Bundle:
    """An untrained ResNet-18 as a bundle."""
    torch.manual_seed(0)
    samples = load_images(case.images, case.size, only=list_images(case.images)[:8]).pixels
    normal = AugmentConfig()
    return export_bundle(
        build_encoder("resnet18", case.stem),
        path,
        name=case.name,
        preprocess=Preprocess(size=case.size),
        mean=normal.mean,
        std=normal.std,
        samples=samples,
        training={},
    )


def unpack(entries: Iterable[Entry], folder: Path) -> Path:
    """The images as files; in the page cache afterwards, so that no run waits for the disk."""
    for entry in entries:
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.load(2**30).data)
    return folder


def decoded(
    entries: Iterable[Entry], how: Preprocess, processes: Executor | None = None
) -> Iterator[Decoded | Rejected]:
    """What the decode stage gives for each entry: in threads, or in processes, 16 at a time."""
    call = partial(decode, how=how, limits=ImageLimits(), ids="name")
    if processes is not None:
        yield from processes.map(call, entries, chunksize=16)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(call, entries)


def decode_limit(entries: list[Entry], how: Preprocess, processes: Executor | None = None) -> float:
    """Reading and decoding alone."""
    began = time.perf_counter()
    deque(decoded(entries, how, processes), maxlen=0)
    return len(entries) / (time.perf_counter() - began)


def encode_limit(encoder: Encoder, pixels: Pixels, batch: int = 64) -> float:
    """The encoder alone, with as many batches at a time as it takes."""
    batches = [pixels[at : at + batch] for at in range(0, len(pixels), batch)]
    began = time.perf_counter()
    with ThreadPoolExecutor(encoder.workers) as pool:
        deque(ahead(pool, encoder.embed, batches, encoder.workers + 1), maxlen=0)
    return len(pixels) / (time.perf_counter() - began)


def ours(source: Path, bundle: Bundle, encoder: Encoder, out: Path, images: int) -> float:
    """The whole run into Parquet files."""
    info = bundle.info
    plan, sink = EmbedPlan(source=source, out=out), ParquetSink(info.dim, info.encoder_id)
    began = time.perf_counter()
    summary = run(plan, [encoder] * encoder.workers, sink)
    rate = images / (time.perf_counter() - began)
    assert summary.done == images, summary
    shutil.rmtree(out)
    return rate


def on_cluster(source: Path, bundle: Bundle, out: Path, images: int) -> float:
    """The same on Ray; shards are small enough that every processor has some."""
    from byol_serving.indexing import ray_engine

    info = bundle.info
    plan = EmbedPlan(source=source, out=out, shard_size=min(512, -(-images // 8)))
    began = time.perf_counter()
    summary = ray_engine.run(plan, bundle, ParquetSink(info.dim, info.encoder_id), device="cpu")
    rate = images / (time.perf_counter() - began)
    assert summary.done == images, summary
    shutil.rmtree(out)
    return rate


def on_clip_retrieval(peer: Peer, source: Path, out: Path, images: int) -> float:
    """clip-retrieval with its batch size, and as many loading processes as there are cores."""
    asked = {"source": str(source), "out": str(out), "batch": 256, "workers": THREADS}
    return images / float(peer.ask(**asked)["seconds"])


@contextmanager
def ray_session() -> Iterator[None]:
    """A local cluster that all repeats use: a cluster is started once, and runs for days."""
    import ray

    ray.init(address="local", log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
