"""Calls a second of our gRPC server, of grpc.aio's, and of gRPC's core alone, all doing nothing.

Each answers thumbnails with as many bytes as an embedding has. Clients have a connection each, and
the most also share one. The servers are alive together and are measured in rotating windows, while
the others are stopped; clients share the machine's cores.
"""

import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from load_material import Load, small_images, tiny_encoder, write_images
from load_servers import bare

from harness import Rate, congestion_control, options, report

KINDS = ("core", "ours", "aio", "aio-64")
CLIENTS = (1, 8, 32, 128)
SHARED = "128 on one connection"


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    rounds, seconds = (2, 0.5) if chosen.quick else (7, 2.0)
    plan = {f"{count} clients": (count, False) for count in CLIENTS} | {SHARED: (128, True)}
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        images = write_images(scratch / "small", small_images(256))
        load = Load("tiny", tiny_encoder(scratch / "tiny32", 32), images)
        servers = {kind: bare(load, scratch, kind=kind) for kind in KINDS}
        for server in servers.values():
            stack.callback(server.stop)
            server.sleep()
        for number in range(rounds + 1):
            for kind, server in servers.items():
                with server.awake():
                    for label, (count, one) in plan.items():
                        window = server.window(count, seconds, one_connection=one)
                        if window.failed:
                            sys.exit(f"{kind}: {window.failed} calls of {label} failed")
                        if number:
                            rates.setdefault(f"{kind}, {label}", []).append(window.images_per_s)
    ratios = {}
    for label in plan:
        for other in ("core", "aio", "aio-64"):
            pairs = zip(rates[f"ours, {label}"], rates[f"{other}, {label}"], strict=True)
            ratios[f"ours_vs_{other}, {label}"] = statistics.median(a / b for a, b in pairs)
    report(
        "rpc_server",
        chosen,
        {name: Rate("calls/s", tuple(values)) for name, values in rates.items()},
        ratios,
        packages=["grpcio", "uvloop"],
        facts={"rounds": rounds, "seconds": seconds, "TCP": congestion_control()},
    )


if __name__ == "__main__":
    main()
