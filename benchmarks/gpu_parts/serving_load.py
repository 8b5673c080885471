"""Item 4: embeddings a second of the server, in fp16, against ONNX Runtime alone."""

import threading
import time
from collections.abc import Sequence

from gpu_parts import copies, graphs
from gpu_parts.rows import Asked, Row
from load_material import photographs, pixels_of, untrained_resnet
from load_servers import Bodies, Window, our_server

from byol_serving.bundle import Bundle
from byol_serving.encoder import Encoder
from byol_serving.images import Pixels
from byol_serving.padded_batches import GPU_MAX_BATCH
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import pixels_to_tensor
from byol_training.export import Precision

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
IN_A_REQUEST = 16


def resnet18(asked: Asked) -> list[Row]:
    """ResNet-18 at 224."""
    return _measure(asked, "resnet18")


def resnet50(asked: Asked) -> list[Row]:
    """ResNet-50 at 224."""
    return _measure(asked, "resnet50")


def _measure(asked: Asked, network: str) -> list[Row]:
    photos = photographs(4 if asked.quick else 64)
    pixels = pixels_of(photos, 224)
    precision: Precision = "fp16" if asked.on_gpu else "fp32"
    bundle = untrained_resnet(asked.scratch / network, pixels, precision, encoder=network)
    size = 2 if asked.quick else IN_A_REQUEST
    starts = range(0, len(photos), size)
    raw = [pb.EmbedRequest(pixels=pixels_to_tensor(pixels[at : at + size])) for at in starts]
    files = [pb.EmbedRequest(images=photos[at : at + size]) for at in starts]
    name = f"{network} at 224, {precision}"
    limit = _onnx_runtime(asked, bundle, pixels)
    rows = [Row(what=f"{name}: ONNX Runtime alone", value=limit, unit="images/s")]
    rows += _served(asked, f"{name}, from pixels", bundle, raw, size)
    rows += _served(asked, f"{name}, from JPEG", bundle, files, size)
    return rows


def _onnx_runtime(asked: Asked, bundle: Bundle, pixels: Pixels) -> float:
    """Images a second of full batches, in as many threads as the encoder is worth."""
    encoder = Encoder(bundle, device="cuda" if asked.on_gpu else "cpu")
    batch = pixels.repeat(-(-GPU_MAX_BATCH // len(pixels)), axis=0)[:GPU_MAX_BATCH]
    batch = batch[: len(pixels)] if asked.quick else batch
    rounds = 1 if asked.quick else 50

    def embed() -> None:
        for _ in range(rounds):
            encoder.embed(batch)

    encoder.embed(batch)
    threads = [threading.Thread(target=embed) for _ in range(encoder.workers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(threads) * rounds * len(batch) / (time.perf_counter() - began)


def _served(
    asked: Asked, name: str, bundle: Bundle, requests: Sequence[pb.EmbedRequest], size: int
) -> list[Row]:
    """The best of some numbers of clients, and the latency where the rate is nearest to half."""
    bodies = asked.scratch / name.replace(" ", "-").replace(",", "")
    bodies.mkdir()
    for number, request in enumerate(requests):
        (bodies / f"{number:04}").write_bytes(request.SerializeToString())
    server = our_server(bundle, Bodies(bodies, size))
    try:
        clients, seconds = ((1, 2), 2.0) if asked.quick else (CLIENTS, 5.0)
        windows = [(count, server.window(count, seconds)) for count in clients]
    finally:
        server.stop()
    most = max(window.images_per_s for _, window in windows)
    if most == 0:
        raise SystemExit(f"{name}: no answer within {seconds:g} s")

    def from_half(found: tuple[int, Window]) -> float:
        return abs(found[1].images_per_s - most / 2)

    count, half = min(windows, key=from_half)
    load = f"{half.images_per_s / most:.0%} of the best, {count} clients, {size} images a request"
    return [
        Row(what=f"{name}: over gRPC", value=most, unit="images/s"),
        Row(what=f"{name}: p99 at half load", value=half.p99_ms, unit="ms", note=load),
    ]


CHECKS = {
    "ResNet-18 at 224": resnet18,
    "ResNet-50 at 224": resnet50,
    "CUDA graphs": graphs.resnet18,
    "pinned memory": copies.to_device,
}
