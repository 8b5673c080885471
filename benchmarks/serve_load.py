"""The embedding server under load: ours, the raw limit, LitServe and Triton.

Three loads: VGA photographs with ResNet-18 at 224; the same with a tiny encoder; JPEGs of 32 pixels
with a tiny encoder, where the server and not the model is measured. `raw` decodes and runs ONNX
Runtime in one process with as many threads and batches as our server, and no server; `bare gRPC`
is gRPC's core, which receives the same requests and does nothing. Together they give the ceiling of
a server whose clients share its cores, as here, and `p99_vs_p50_LOAD_bare` is how evenly gRPC alone
answers. `raw_in_flight` is how evenly the machine itself does: plain threads with eight images in
flight, and neither server nor clients. Clients have a connection each; of thumbnails, the most also
share one. With the tiny encoders several processes of ours are held against one, and clients also
send lists, as those do who have many images.
All servers are alive together and are measured in rotating windows, while the others are stopped;
peers decode with our decoder.
"""

import math
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from decode import vga_against_pillow
from load_material import (
    Load,
    centred_cosine,
    photographs,
    pixels_of,
    small_images,
    tiny_encoder,
    untrained_resnet,
    write_images,
)
from load_raw import EVEN, raw_in_flight, raw_loop, raw_single_ms
from load_servers import IN_A_LIST, Server, Window, bare, ours, peer

from byol_serving.bundle import Bundle, cosine_distance
from byol_serving.config import available_cpus
from byol_serving.encoder import Encoder
from byol_serving.images import Pixels
from harness import Options, Rate, congestion_control, interleaved, options, report

CLIENTS = (1, 8, 32, 128)
PEERS = ("litserve", "pytriton")
OF_TINY = ("processes", "bare lists")
"""Servers that are measured with the tiny encoders only."""
PEER_CLIENTS = 32
"""Where a model bounds them all; of thumbnails, peers are asked by as many clients as ours."""
PROCESSES = max(2, available_cpus() // 4)
SEVERAL = f"{PROCESSES} processes, {PEER_CLIENTS} clients"
LIST_CLIENTS = 8
"""Who send lists."""
ONE_LISTS = f"1 process, lists of {IN_A_LIST}"
SEVERAL_LISTS = f"{PROCESSES} processes, lists of {IN_A_LIST}"
BARE_LISTS = f"bare gRPC, lists of {IN_A_LIST}"
TRITON_LISTS = f"pytriton, lists of {IN_A_LIST}"


@dataclass(frozen=True)
class Step:
    """One window of each round."""

    label: str
    server: str
    clients: int
    one_connection: bool = False
    lists: bool = False
    """Whether not single images are sent."""


@dataclass(frozen=True)
class Measured:
    """A load's windows, by what was measured, and what else was seen."""

    rates: dict[str, list[float]]
    windows: dict[str, list[Window]]
    memory_mb: dict[str, float]
    raw_single_ms: list[float]
    raw_shares: list[float]
    """Latencies of `raw_in_flight` over their medians."""

    def ratio(self, name: str, other: str) -> float:
        """The median over the rounds, each compared within itself."""
        pairs = zip(self.rates[name], self.rates[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended too
    rounds, seconds = (1, 0.6) if chosen.quick else (7, 3.0)
    photos, small = photographs(16 if chosen.quick else 64), small_images(256)
    results: dict[str, Rate] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        samples = pixels_of(photos, 224)
        vga = write_images(scratch / "vga", photos)
        full = untrained_resnet(scratch / "resnet18", samples, "fp32")
        loads = (
            Load("resnet18", full, vga),
            Load("vga_tiny", tiny_encoder(scratch / "tiny224", 224), vga),
            Load(
                "tiny",
                tiny_encoder(scratch / "tiny32", 32),
                write_images(scratch / "small", small),
            ),
        )
        for load in loads:
            # A quick run has time for the peers on one load only: where they differ most.
            peers = PEERS if chosen.peers and (load.name == "tiny" or not chosen.quick) else ()
            found = measure(load, scratch, peers, rounds, seconds)
            print_windows(load, found)
            for each, values in found.rates.items():
                results[f"{load.name} {each}"] = Rate("images/s", tuple(values))
            ratios |= ratios_of(load.name, found, peers)
        low = untrained_resnet(scratch / "int8", samples, "int8")
        results |= (speeds := precision_speeds(full, low, chosen))
        ratios["int8_vs_fp32"] = speeds["int8 session"].median / speeds["fp32 session"].median
        ratios |= precision_cosines(full, low, samples[1::2])
    ratios["decode_vs_pillow"] = vga_against_pillow(photos)
    report(
        "serve_load",
        chosen,
        results,
        ratios,
        packages=["onnxruntime", "grpcio", "simplejpeg"],
        facts={
            "photographs": len(photos),
            "rounds": rounds,
            "seconds": seconds,
            "TCP": congestion_control(),
        },
    )


def measure(
    load: Load, scratch: Path, peers: tuple[str, ...], rounds: int, seconds: float
) -> Measured:
    """Rotating windows, the first round not counted; all servers are there throughout."""
    files = [path.read_bytes() for path in sorted(load.images.iterdir())]
    encoder = Encoder(load.bundle, device="cpu")
    curve = encoder.warm_up(64)
    rates: dict[str, list[float]] = {}
    windows: dict[str, list[Window]] = {}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in ("ours", "bare", *peers, *([] if load.name == "resnet18" else OF_TINY)):
            servers[name] = started(name, load, scratch)
            stack.callback(servers[name].stop)
            servers[name].sleep()
        plan = planned(load, peers, quick=seconds < 1)
        singles: list[float] = []
        shares: list[float] = []
        for number in range(rounds + 1):
            lasts = seconds if number else min(seconds, 1.0)
            raw = raw_loop(files, encoder, curve, load.bundle, lasts)
            latencies = raw_in_flight(files, encoder, load.bundle, lasts)
            single = raw_single_ms(files, load.bundle, encoder, lasts)
            if number:
                rates.setdefault("raw", []).append(raw)
                shares += latency_shares(latencies)
                singles.append(single)
            for step in plan:
                with servers[step.server].awake() as server:
                    window = server.window(
                        step.clients, lasts, one_connection=step.one_connection, lists=step.lists
                    )
                if number:
                    rates.setdefault(step.label, []).append(window.images_per_s)
                    windows.setdefault(step.label, []).append(window)
        memory = {name: server.memory_mb() for name, server in servers.items()}
    return Measured(rates, windows, memory, singles, shares)


def started(name: str, load: Load, scratch: Path) -> Server:
    """One of the servers that are measured."""
    match name:
        case "ours":
            return ours(load, scratch)
        case "processes":
            return ours(load, scratch, PROCESSES)
        case "bare":
            return bare(load, scratch)
        case "bare lists":
            return bare(load, scratch, IN_A_LIST)
        case _:
            return peer(name, load, scratch)


def planned(load: Load, peers: tuple[str, ...], *, quick: bool) -> list[Step]:
    """The windows of a round."""
    # Many requests to a large encoder take seconds, which a quick run does not have.
    slow = load.name == "resnet18"
    most = (8 if slow else 32) if quick else max(CLIENTS)
    crowds = [n for n in CLIENTS[1:] if n <= most] if load.name == "tiny" else [PEER_CLIENTS]
    plan = [Step(f"ours, {n} clients", "ours", n) for n in CLIENTS if n <= most]
    plan += [Step(bare_label(n), "bare", n) for n in sorted({EVEN, *crowds})]
    plan += [Step(f"{name}, {n} clients", name, n) for name in peers for n in crowds]
    if not slow:  # which the encoder bounds, in any number of processes and calls
        plan += [
            Step(SEVERAL, "processes", PEER_CLIENTS),
            Step(ONE_LISTS, "ours", LIST_CLIENTS, lists=True),
            Step(SEVERAL_LISTS, "processes", LIST_CLIENTS, lists=True),
            Step(BARE_LISTS, "bare lists", LIST_CLIENTS),
        ]
    if not slow and "pytriton" in peers:  # LitServe takes one image a request
        plan.append(Step(TRITON_LISTS, "pytriton", LIST_CLIENTS, lists=True))
    if load.name == "tiny":
        sharing = ["ours", "bare", *(name for name in peers if name == "pytriton")]
        plan += [Step(shared_label(name), name, most, one_connection=True) for name in sharing]
    return plan


def ratios_of(load: str, found: Measured, peers: tuple[str, ...]) -> dict[str, float]:
    """The ratios that the project's targets speak of."""
    ours_all = [name for name in found.windows if name.startswith("ours")]
    busy = max(ours_all, key=lambda name: found.ratio(name, "raw"))
    names = {"resnet18": "saturated_vs_raw", "vga_tiny": "vga_tiny_vs_raw", "tiny": "tiny_vs_raw"}
    ratios = {names[load]: found.ratio(busy, "raw")}
    ceiling = ceiling_vs_raw(found, bare_label(PEER_CLIENTS))
    ratios[f"{load}_vs_ceiling"] = found.ratio(busy, "raw") / ceiling
    for name in peers:
        ratios |= against(load, found, name)
    if SEVERAL in found.rates:
        one = f"ours, {PEER_CLIENTS} clients"
        ratios[f"{load}_processes_vs_one"] = found.ratio(SEVERAL, one)
        ratios[f"{load}_processes_vs_raw"] = found.ratio(SEVERAL, "raw")
        ratios[f"{load}_lists_vs_raw"] = found.ratio(ONE_LISTS, "raw")
        ratios[f"{load}_processes_lists_vs_raw"] = found.ratio(SEVERAL_LISTS, "raw")
        ratios[f"{load}_ceiling_of_lists_vs_raw"] = ceiling_vs_raw(found, BARE_LISTS)
    if TRITON_LISTS in found.rates:
        ratios[f"{load}_lists_vs_pytriton"] = found.ratio(ONE_LISTS, TRITON_LISTS)
        ratios[f"{load}_processes_lists_vs_pytriton"] = found.ratio(SEVERAL_LISTS, TRITON_LISTS)
    if shared := found.windows.get(shared_label("ours")):
        ratios[f"p99_vs_p50_{load}_one_connection"] = unevenness(shared)
    if (theirs := shared_label("pytriton")) in found.rates:
        for name in ("ours", "bare"):
            key = f"{load}_{name}_one_connection_vs_pytriton"
            ratios[key] = found.ratio(shared_label(name), theirs)
    ratios[f"p99_vs_p50_{load}"] = unevenness(found.windows[f"ours, {EVEN} clients"])
    ratios[f"p99_vs_p50_{load}_raw"] = percentile_99(found.raw_shares)
    ratios[f"p99_vs_p50_{load}_bare"] = unevenness(found.windows[bare_label(EVEN)])
    for clients in CLIENTS[2:]:
        if crowded := found.windows.get(f"ours, {clients} clients"):
            ratios[f"p99_vs_p50_{load}_{clients}"] = unevenness(crowded)
    alone = zip(found.windows["ours, 1 clients"], found.raw_single_ms, strict=True)
    key = "idle_overhead_ms" if load == "vga_tiny" else f"{load}_idle_overhead_ms"
    ratios[key] = statistics.median(window.p50_ms - raw for window, raw in alone)
    return ratios


def against(load: str, found: Measured, peer: str) -> dict[str, float]:
    """Ours over a peer: each with the clients that it does best with, and both with as many."""
    asked = [n for n in CLIENTS if f"{peer}, {n} clients" in found.rates]

    def best(name: str) -> str:
        labels = [f"{name}, {n} clients" for n in asked]
        return max(labels, key=lambda label: statistics.median(found.rates[label]))

    ratios = {f"{load}_vs_{peer}": found.ratio(best("ours"), best(peer))}
    for n in asked:
        same = found.ratio(f"ours, {n} clients", f"{peer}, {n} clients")
        ratios[f"{load}_vs_{peer}_{n}"] = same
        ceiling = ceiling_vs_raw(found, bare_label(n)) * found.ratio("raw", f"{peer}, {n} clients")
        ratios[f"{load}_ceiling_vs_{peer}_{n}"] = ceiling
    return ratios


def ceiling_vs_raw(found: Measured, bare: str) -> float:
    """Of the raw loop, what is left for a server whose calls cost no more than gRPC's own.

    Both saturate the cores, which the clients share: an image takes 1 / raw + 1 / bare seconds. It
    is no hard limit, since gRPC's part is of a server that answers each request by itself.
    """
    return 1 / (1 + found.ratio("raw", bare))


def bare_label(clients: int) -> str:
    """Of its windows."""
    return f"bare gRPC, {clients} clients"


def shared_label(server: str) -> str:
    """Of the windows in which all clients share a connection."""
    return f"{server}, 1 connection"


def unevenness(windows: list[Window]) -> float:
    """The 99th percentile over the median of all rounds' latencies.

    Each is divided by its own round's median first: a machine that drifts is not uneven answers.
    """
    return percentile_99([each for w in windows for each in latency_shares(w.latencies_ms)])


def latency_shares(latencies: Sequence[float]) -> list[float]:
    """Each over the median of them all."""
    median = statistics.median(latencies) if latencies else math.nan
    return [each / median for each in latencies]


def percentile_99(values: list[float]) -> float:
    """Which one in a hundred exceeds; no number where there are none."""
    return sorted(values)[int(len(values) * 0.99)] if values else math.nan


def print_windows(load: Load, found: Measured) -> None:
    """What the report's table has no columns for."""
    single = statistics.median(found.raw_single_ms)
    print(f"\n{load.name}: one image alone takes {single:.2f} ms raw")
    print(f"  {'':24}images/s   p50 ms   p99 ms  CPU ms/image  of clients   failed")
    for label, windows in found.windows.items():

        def median(of: Callable[[Window], float], among: list[Window] = windows) -> float:
            return statistics.median(map(of, among))

        print(
            f"  {label:24}{median(lambda w: w.images_per_s):8.1f}"
            f" {median(lambda w: w.p50_ms):8.2f} {median(lambda w: w.p99_ms):8.2f}"
            f" {median(lambda w: w.cpu_ms):13.2f} {median(lambda w: w.client_cpu_ms):11.2f}"
            f" {sum(w.failed for w in windows):8}"
        )
    print("  memory:", ", ".join(f"{name} {mb:.0f} MB" for name, mb in found.memory_mb.items()))


def precision_speeds(full: Bundle, low: Bundle, chosen: Options) -> dict[str, Rate]:
    """Images a second of the two sessions alone, both cores, batches of 8."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)

    def speed(bundle: Bundle) -> Callable[[], float]:
        encoder = Encoder(bundle, device="cpu")

        def run() -> float:
            def batches() -> None:
                for _ in range(2 if chosen.quick else 5):
                    encoder.embed(pixels)

            threads = [threading.Thread(target=batches) for _ in range(encoder.workers)]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            images = len(threads) * (2 if chosen.quick else 5) * len(pixels)
            return images / (time.perf_counter() - began)

        return run

    candidates = {"fp32 session": speed(full), "int8 session": speed(low)}
    return interleaved(candidates, unit="images/s", repeats=3 if chosen.quick else 7)


def precision_cosines(full: Bundle, low: Bundle, held_out: Pixels) -> dict[str, float]:
    """On real images that calibrated nothing; centred is the harder comparison."""
    wanted = Encoder(full, device="cpu").embed(held_out)
    got = Encoder(low, device="cpu").embed(held_out)
    return {
        "int8_cosine_min": float(1 - cosine_distance(got, wanted).max()),
        "int8_cosine_centred": centred_cosine(got, wanted),
    }


if __name__ == "__main__":
    main()
