"""Servers and clients as processes, for benchmarks/serve_load.py: start, watch, stop."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_material import DIM, Load

from byol_serving.bundle import Bundle
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from harness import HERE, PEER_PYTHON

SERVING = HERE.parent / "serving"
_TICK = os.sysconf("SC_CLK_TCK")
_START_S = 90.0


@dataclass(frozen=True)
class Window:
    """What happened in some seconds of load on one server."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """Of the server, for each image."""
    client_cpu_ms: float
    failed: int


class Server:
    """A server in a process group of its own, with a process of clients beside it."""

    def __init__(
        self, name: str, command: Sequence[str], facts: dict[str, Any], bodies: Path
    ) -> None:
        """Starts both; `facts` is where it will be, unless it says so itself."""
        self.name = name
        self._stack = ExitStack()
        environment = os.environ | {"PYTHONPATH": str(SERVING), "PYTHONWARNINGS": "ignore"}
        log = self._stack.enter_context((bodies.parent / f"{bodies.name}.log").open("w"))
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._family: set[int] = set()
        self._stack.callback(self._end)
        facts = {**facts, **self._line(self._process)}
        self.address: str = facts["address"]
        self._wait_until_reachable(self.address)
        self._clients = subprocess.Popen(
            [sys.executable, str(HERE / "load_client.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(self._clients.kill)
        self._ask({**facts, "bodies": str(bodies), "answer_bytes": 4 * DIM})
        self._wait_until_it_answers()

    def window(self, clients: int, seconds: float) -> Window:
        """Closed-loop load by so many clients."""
        began, before = time.monotonic(), self._cpu_s()
        answer = self._ask({"clients": clients, "seconds": seconds})
        # Of the window and the moments before and after it, when the load was the same.
        used = (self._cpu_s() - before) * answer["seconds"] / (time.monotonic() - began)
        latencies = sorted(answer["latencies"])
        count = len(latencies)
        if not count:
            return Window(0.0, float("nan"), float("nan"), 0.0, 0.0, answer["failed"])
        return Window(
            images_per_s=count / answer["seconds"],
            p50_ms=1000 * statistics.median(latencies),
            p99_ms=1000 * latencies[min(count - 1, int(count * 0.99))],
            cpu_ms=1000 * used / count,
            client_cpu_ms=1000 * answer["client_cpu_s"] / count,
            failed=answer["failed"],
        )

    def memory_mb(self) -> float:
        """Proportional set size of all its processes, which counts shared pages once."""
        total = 0
        for pid in self._processes():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def stop(self) -> None:
        """Ends the clients, and every process of the server."""
        self._stack.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._clients.stdin is not None
        self._clients.stdin.write(json.dumps(request) + "\n")
        self._clients.stdin.flush()
        return self._line(self._clients)

    def _line(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        """The next line that is JSON: some peers print what nobody asked for."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self.name} ended early, exit code {process.wait()}")

    def _wait_until_reachable(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            try:
                with socket.create_connection((host, int(port)), timeout=1):
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"{self.name} did not listen within {_START_S:.0f} s")

    def _wait_until_it_answers(self) -> None:
        until, seconds = time.monotonic() + _START_S, 0.3
        while time.monotonic() < until:
            window = self.window(1, seconds)
            if window.images_per_s > 0 and not window.failed:
                return
            seconds *= 2  # one answer of a large encoder on a busy machine may take longer
        raise SystemExit(f"{self.name} listens, but does not answer as it should")

    def _cpu_s(self) -> float:
        total = 0
        for pid in self._processes():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            total += int(fields[11]) + int(fields[12])
        return total / _TICK

    def _processes(self) -> set[int]:
        """The server's process and its descendants, also those whose parent has ended."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry.name)] = int(fields[1])
        family = {self._process.pid} | (self._family & parents.keys())
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        self._family = family
        return family

    def _end(self) -> None:
        family = self._processes()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in family:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            if number is signal.SIGTERM:
                try:
                    self._process.wait(5)
                except subprocess.TimeoutExpired:
                    continue
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()


def ours(load: Load, scratch: Path) -> Server:
    """`byol serve`."""
    bodies = scratch / f"{load.name}-ours"
    bodies.mkdir()
    for path in load.images.iterdir():
        request = pb.EmbedRequest(images=[path.read_bytes()])
        (bodies / path.name).write_bytes(request.SerializeToString())
    return our_server(load.bundle, bodies)


def our_server(bundle: Bundle, bodies: Path) -> Server:
    """`byol serve` with clients that send serialised EmbedRequests, the files in `bodies`."""
    port = free_port()
    command = [sys.executable, "-m", "byol_cli.main", "serve", "--json", "--port", str(port)]
    facts = {
        "protocol": "grpc",
        "method": "/byol.v1.Embedder/Embed",
        "address": f"127.0.0.1:{port}",
    }
    return Server("ours", [*command, "--bundle", str(bundle.path)], facts, bodies)


def peer(name: str, load: Load, scratch: Path) -> Server:
    """A script of benchmarks/peers, in their environment."""
    if not PEER_PYTHON.exists():
        raise SystemExit("peers are not installed: run make bench-peers, or give --no-peers")
    bodies = scratch / f"{load.name}-{name}"
    bodies.mkdir()
    setup = {
        "model": str(load.bundle.model_path),
        "size": load.bundle.info.preprocess.size,
        "images": str(load.images),
        "bodies": str(bodies),
        "port": free_port(),
    }
    script = HERE / "peers" / f"{name}_peer.py"
    return Server(name, [str(PEER_PYTHON), str(script), json.dumps(setup)], {}, bodies)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
