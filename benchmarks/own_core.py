"""A server that has a core for itself: raw loop and servers run on one, the clients on another.

In serve_load.py the clients take a part of the cores, which differs from server to server and is no
part of what a server costs: in use they are programs on other machines. Here what is missing to the
raw loop is the server's own. Two loads with a tiny encoder: VGA photographs, and JPEGs of 32
pixels. The same windows, peer and definitions as there.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from load_material import Load, photographs, small_images, tiny_encoder, write_images
from load_raw import raw_in_flight, raw_loop
from load_servers import IN_A_LIST, Server, Window, bare, ours, peer
from serve_load import LIST_CLIENTS, latency_shares, percentile_99, unevenness

from byol_serving.encoder import Encoder
from harness import Rate, congestion_control, options, report

CLIENTS = (8, 32, 128)
LISTS = f"lists of {IN_A_LIST}"
RAW = "raw"


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    rounds, seconds = (1, 0.6) if chosen.quick else (7, 2.0)
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        sys.exit("this needs two cores: one for the server, one for its clients")
    os.sched_setaffinity(0, {first})  # and with it all that is started from here
    results: dict[str, Rate] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photos = write_images(scratch / "vga", photographs(16 if chosen.quick else 64))
        small = write_images(scratch / "small", small_images(256))
        for load in (
            Load("vga_tiny", tiny_encoder(scratch / "tiny224", 224), photos),
            Load("tiny", tiny_encoder(scratch / "tiny32", 32), small),
        ):
            rates, tails = measure(load, scratch, others, chosen.peers, rounds, seconds)
            for each, values in rates.items():
                results[f"{load.name} {each}"] = Rate("images/s", tuple(values))
                if each != RAW:
                    ratios[f"{load.name} {each}_vs_raw"] = ratio(rates, each, RAW)
                if each.startswith("ours") and (other := each.replace("ours", "pytriton")) in rates:
                    ratios[f"{load.name} {each}_vs_pytriton"] = ratio(rates, each, other)
            ratios |= {f"{load.name} {each} p99_vs_p50": tail for each, tail in tails.items()}
    report(
        "own_core",
        chosen,
        results,
        ratios,
        packages=["onnxruntime", "grpcio"],
        facts={"rounds": rounds, "seconds": seconds, "TCP": congestion_control()},
    )


def measure(
    load: Load,
    scratch: Path,
    client_cores: Collection[int],
    peers: bool,
    rounds: int,
    seconds: float,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images a second of each round, and how uneven the answers were, by what was measured."""
    files = [path.read_bytes() for path in sorted(load.images.iterdir())]
    encoder = Encoder(load.bundle, device="cpu")
    curve = encoder.warm_up(64)
    rates: dict[str, list[float]] = {}
    windows: dict[str, list[Window]] = {}
    shares: list[float] = []
    with ExitStack() as stack:
        servers = {"gRPC alone": bare(load, scratch), "ours": ours(load, scratch)}
        if peers:
            servers["pytriton"] = peer("pytriton", load, scratch)
        for server in servers.values():
            stack.callback(server.stop)
            server.move_clients(client_cores)
            server.sleep()
        for number in range(rounds + 1):
            raw = raw_loop(files, encoder, curve, load.bundle, seconds)
            latencies = raw_in_flight(files, encoder, load.bundle, seconds)
            if number:  # the first round warms up
                rates.setdefault(RAW, []).append(raw)
                shares += latency_shares(latencies)
            for name, server in servers.items():
                for label, window in windows_of(server, seconds, lists=name != "gRPC alone"):
                    if number:
                        rates.setdefault(f"{name}, {label}", []).append(window.images_per_s)
                        windows.setdefault(f"{name}, {label}", []).append(window)
    tails = {name: unevenness(each) for name, each in windows.items()}
    return rates, {RAW: percentile_99(shares)} | tails


def windows_of(server: Server, seconds: float, *, lists: bool) -> list[tuple[str, Window]]:
    """One of each kind, by what its clients do."""
    with server.awake():
        found = [(f"{n} clients", server.window(n, seconds)) for n in CLIENTS]
        if lists:
            found.append((LISTS, server.window(LIST_CLIENTS, seconds, lists=True)))
    return found


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    """The median over the rounds, each compared within itself."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))


if __name__ == "__main__":
    main()
