"""A server under fire: `make soak`, or python -m soak.run --seconds 300 with tests/ in the path.

First its capacity is measured with clients who wait. Then it gets twice that in good requests, and
at the same time bad images, slow streams, expired and cancelled requests, model switches and
clients that are killed. What must hold afterwards:

- every call ended exactly once, and every answer held the golden embeddings of its own images;
- a good request was refused at once or answered within its deadline, never anything else;
- nothing is left in the queues, and the log has no traceback;
- memory has not grown past `MEMORY_FACTOR` times what it was after the first part of the load,
  plus `MEMORY_BYTES`, plus `SWITCH_BYTES` for each switch of the model in each process.

Exit status 0 if all of it holds. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from soak.load import Load
from soak.material import BAD, MODEL, Material, make_material

MEMORY_FACTOR = 1.25
MEMORY_BYTES = 64 * 2**20
SWITCH_BYTES = 2 * 2**20
"""For each switch in between. None was seen to cost any for good: 24 on an idle server and 46 under
this load left the process no larger than before. Loads and trims in between move it by 40 MiB."""
OVERLOAD = 2.0
QUEUE = 64
LEFT_OVER = ("byol_requests_in_flight", "byol_accepted_images", "byol_queue_images")


@dataclass(frozen=True)
class Server:
    """A running `byol serve`."""

    address: str
    metrics: str
    log: Path
    processes: int

    def samples(self) -> dict[str, float]:
        """Each metric's value, summed over its labels."""
        with urllib.request.urlopen(self.metrics, timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found


@contextlib.contextmanager
def served(material: Material, folder: Path, processes: int = 1) -> Iterator[Server]:
    """`byol serve`, started and drained at the end, which must take no error."""
    log = folder / "server.log"
    port = _free_port()
    command = [
        *(sys.executable, "-m", "byol_cli.main", "serve", "--json", "--port", "0"),
        *("--models", str(material.folder), "--default-model", MODEL),
        *("--max-queued-images", str(QUEUE), "--metrics-port", str(port), "--max-batch", "16"),
        *("--device", "cpu", "--processes", str(processes)),
    ]
    with log.open("w") as sink:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        address = json.loads(line)["serving"]
        yield Server(address, f"http://127.0.0.1:{port}/metrics", log, processes)
        server.terminate()
        if (status := server.wait(60)) != 0:
            raise SystemExit(f"the server ended with status {status}:\n{log.read_text()[-5000:]}")
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


async def soak(server: Server, material: Material, seconds: float, folder: Path) -> dict[str, Any]:
    """Loads the server for about `seconds`; what was seen, with everything wrong in `faults`."""
    load = Load(server.address, material)
    image = folder / "image.jpg"
    image.write_bytes(material.files[0])
    capacity = await load.closed_loop(clients=8, seconds=max(1.0, seconds * 0.1))
    clients = asyncio.gather(
        load.heartbeat(),
        load.good(capacity * OVERLOAD),
        load.expiring(capacity * 0.05),
        load.cancelling(capacity * 0.05),
        load.bad(capacity * 0.03),
        load.features(capacity * 0.02),
        load.slow_stream(),
        load.slow_stream(),
        load.switching(every_s=0.3),
        load.killed_clients(image),
    )
    await asyncio.sleep(seconds * 0.3)
    before = (await asyncio.to_thread(server.samples))["process_resident_memory_bytes"]
    switches = load.outcome.ended["switch", "OK"]
    await asyncio.sleep(seconds * 0.6)
    load.done.set()
    await clients
    idle = await _until_idle(server)
    switches = load.outcome.ended["switch", "OK"] - switches
    limit = before * MEMORY_FACTOR + MEMORY_BYTES + SWITCH_BYTES * switches * server.processes
    return _report(load, server, capacity, before, limit, idle)


async def _until_idle(server: Server) -> dict[str, float]:
    """The metrics once nothing is left to do, or after half a minute."""
    for _ in range(300):
        found = await asyncio.to_thread(server.samples)
        if not any(found[name] for name in LEFT_OVER):
            break
        await asyncio.sleep(0.1)
    return found


def _report(
    load: Load,
    server: Server,
    capacity: float,
    before: float,
    limit: float,
    idle: dict[str, float],
) -> dict[str, Any]:
    outcome = load.outcome
    ended: dict[str, dict[str, int]] = {}
    for (kind, code), count in sorted(outcome.ended.items()):
        ended.setdefault(kind, {})[code] = count
    for kind, count in outcome.started.items():
        if (finished := sum(ended.get(kind, {}).values())) != count:
            outcome.fault(f"{kind}: {count} calls started and {finished} ended")
    for name in LEFT_OVER:
        if idle[name]:
            outcome.fault(f"{name} is {idle[name]:g} after the load")
    after = idle["process_resident_memory_bytes"]
    if after > limit:
        outcome.fault(f"memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    log = server.log.read_text()
    if errors := [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]:
        outcome.fault(f"the log has errors: {errors[:5]}")
    for kind, code in (("good", "OK"), ("good", "RESOURCE_EXHAUSTED"), ("switch", "OK")):
        if not ended.get(kind, {}).get(code):
            outcome.fault(f"no {kind} call ended with {code}: the load was not what it should be")
    waits = sorted(outcome.seconds) or [0.0]
    return {
        "capacity_images_per_s": round(capacity, 1),
        "ended": ended,
        "answered_p50_ms": round(waits[len(waits) // 2] * 1000, 1),
        "answered_p99_ms": round(waits[len(waits) * 99 // 100] * 1000, 1),
        "answered_max_ms": round(waits[-1] * 1000, 1),
        "memory_before_mib": round(before / 2**20, 1),
        "memory_after_mib": round(after / 2**20, 1),
        "memory_limit_mib": round(limit / 2**20, 1),
        "kinds_of_bad_image": sorted(BAD),
        "faults": outcome.faults,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> None:
    """Runs it and exits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long; default 300")
    parser.add_argument("--processes", type=int, default=1, help="of the server; default 1")
    given = parser.parse_args()
    seconds = given.seconds
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        material = make_material(Path(scratch) / "models")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the clients that are killed
        with served(material, Path(scratch), given.processes) as server:
            report = asyncio.run(soak(server, material, seconds, Path(scratch)))
    for fault in report["faults"]:
        print(f"FAULT {fault}", file=sys.stderr)
    print(json.dumps({**report, "seconds": round(time.monotonic() - began, 1)}))
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
