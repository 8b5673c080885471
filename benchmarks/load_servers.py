"""Servers and clients as processes, for benchmarks/serve_load.py: start, watch, stop."""

import json
import math
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
_PATIENCE_S = 90.0
"""For what a window takes beyond its seconds; a lost call ends after load_client.CALL_S."""
_ANSWER_BYTES = 4 * DIM
"""At least, in each answer, for each image."""
IN_A_LIST = 16
"""Images in one call, of clients that send lists."""
_EDGE = "edge-of-a-part"
_OURS = {"protocol": "grpc", "method": "/byol.v1.Embedder/Embed"}
_PEERS: dict[str, dict[str, str]] = {
    "litserve": {
        "protocol": "http",
        "method": "/predict",
        "content": f"multipart/form-data; boundary={_EDGE}",
    },
    "pytriton": {"protocol": "grpc", "method": "/inference.GRPCInferenceService/ModelInfer"},
}
"""How each server is asked."""


@dataclass(frozen=True)
class Bodies:
    """Ready-made requests: the files of a folder, and the images in each."""

    folder: Path
    images: int = 1


@dataclass(frozen=True)
class Window:
    """What happened in some seconds of load on one server."""

    images_per_s: float
    latencies_ms: Sequence[float]
    """Of each call that was answered, sorted."""
    cpu_ms: float
    """Of the server, for each image."""
    client_cpu_ms: float
    failed: int

    @property
    def p50_ms(self) -> float:
        """The median; no number where nothing was answered."""
        return statistics.median(self.latencies_ms) if self.latencies_ms else math.nan

    @property
    def p99_ms(self) -> float:
        """Which one call of a hundred exceeds."""
        count = len(self.latencies_ms)
        return self.latencies_ms[min(count - 1, int(count * 0.99))] if count else math.nan


class Server:
    """A server in a process group of its own, with a process of clients beside it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        facts: dict[str, Any],
        bodies: Bodies,
        lists: Bodies | None = None,
    ) -> None:
        """Starts both; `facts` says where it will be and how it is asked."""
        self.name = name
        self._bodies, self._lists = bodies, lists
        self.address: str = facts["address"]
        self._family: set[int] = set()
        with ExitStack() as stack:
            log = stack.enter_context(bodies.folder.with_suffix(".log").open("w"))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                # Not a pipe: a server that logs would stop once it is full. (Triton's lines were
                # seen in the middle of what a peer said there, too.)
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(SERVING), "PYTHONWARNINGS": "ignore"},
                start_new_session=True,
            )
            stack.callback(self._end)
            self._wait_until_reachable(self.address)
            self._clients = subprocess.Popen(
                [sys.executable, str(HERE / "load_client.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(self._clients.kill)
            self._ask(facts)
            self._wait_until_it_answers()
            self._stack = stack.pop_all()

    def window(
        self, clients: int, seconds: float, *, one_connection: bool = False, lists: bool = False
    ) -> Window:
        """Closed-loop load by so many clients, with a connection each, or one if that is gRPC."""
        bodies = self._lists if lists else self._bodies
        assert bodies is not None, f"{self.name} has no lists to be sent"
        began, before = time.monotonic(), self._cpu_s()
        connections = 1 if one_connection else clients
        load = {"clients": clients, "seconds": seconds, "connections": connections}
        answer_bytes = _ANSWER_BYTES * bodies.images
        answer = self._ask(load | {"bodies": str(bodies.folder), "answer_bytes": answer_bytes})
        # Of the window and the moments before and after it, when the load was the same.
        used = (self._cpu_s() - before) * answer["seconds"] / (time.monotonic() - began)
        images = max(answer["requests"] * bodies.images, 1e-9)
        return Window(
            images_per_s=images / answer["seconds"],
            latencies_ms=sorted(1000 * each for each in answer["latencies"]),
            cpu_ms=1000 * used / images,
            client_cpu_ms=1000 * answer["client_cpu_s"] / images,
            failed=answer["failed"],
        )

    @contextmanager
    def awake(self) -> Iterator["Server"]:
        """Lets a server that `sleep` stopped run for a while."""
        self._signal(signal.SIGCONT)
        yield self
        self.sleep()

    def sleep(self) -> None:
        """Stops its processes: LitServe's took a third of a core from the others, with no calls."""
        self._signal(signal.SIGSTOP)

    def move_clients(self, cores: Collection[int]) -> None:
        """Has them run on these cores only."""
        for thread in Path(f"/proc/{self._clients.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)

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
        answers = self._clients.stdout
        assert answers is not None
        patience = request.get("seconds", 0.0) + _PATIENCE_S
        if not select.select([answers], [], [], patience)[0]:
            raise SystemExit(f"{self.name}: its clients gave no account within {patience:.0f} s")
        if not (line := answers.readline()):
            raise SystemExit(f"{self.name}: its clients ended, status {self._clients.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _wait_until_reachable(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if (status := self._process.poll()) is not None:
                raise SystemExit(f"{self.name} ended early, exit status {status}")
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
            if window.failed:
                continue  # some listen before they have loaded their model
            if window.images_per_s > 0:
                return
            seconds *= 2  # one answer of a large encoder on a busy machine may take longer
        raise SystemExit(f"{self.name} listens, but does not answer as it should")

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

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
        family = ({self._process.pid} | self._family) & parents.keys()
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        self._family = family
        return family

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGKILL):
            self._signal(number)
            if number is signal.SIGCONT:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
        self._process.wait()


def ours(load: Load, scratch: Path, processes: int = 1) -> Server:
    """`byol serve`."""
    bodies, lists = (
        embed_bodies(load, scratch / f"{load.name}-ours-{processes}-{images}", images)
        for images in (1, IN_A_LIST)
    )
    return our_server(load.bundle, bodies, processes, lists)


def bare(
    load: Load, scratch: Path, images: int = 1, *, kind: str = "core", python: Path | None = None
) -> Server:
    """GRPC that receives requests of so many images and does nothing with them.

    `kind` is as in bare_server.py; `python`, if not this one, has another grpcio.
    """
    port = free_port()
    size = str(_ANSWER_BYTES * images)
    command = [str(python or sys.executable), str(HERE / "bare_server.py"), str(port), size, kind]
    facts = _OURS | {"address": f"127.0.0.1:{port}"}
    bodies = embed_bodies(load, scratch / f"{load.name}-{kind}-{images}", images)
    return Server(kind, command, facts, bodies)


def embed_bodies(load: Load, folder: Path, images: int = 1) -> Bodies:
    """A new folder of serialised EmbedRequests, each of so many of the images."""
    folder.mkdir()
    paths = sorted(load.images.iterdir())
    for at in range(0, len(paths) - images + 1, images):
        request = pb.EmbedRequest(images=[path.read_bytes() for path in paths[at : at + images]])
        (folder / paths[at].name).write_bytes(request.SerializeToString())
    return Bodies(folder, images)


def our_server(
    bundle: Bundle, bodies: Bodies, processes: int = 1, lists: Bodies | None = None
) -> Server:
    """`byol serve` with clients that send serialised EmbedRequests."""
    port = free_port()
    command = [sys.executable, "-m", "byol_cli.main", "serve", "--json", "--port", str(port)]
    facts = _OURS | {"address": f"127.0.0.1:{port}"}
    command += ["--bundle", str(bundle.path), "--processes", str(processes)]
    return Server("ours", command, facts, bodies, lists)


def peer(name: str, load: Load, scratch: Path) -> Server:
    """A script of benchmarks/peers, in their environment."""
    if not PEER_PYTHON.exists():
        raise SystemExit("peers are not installed: run make bench-peers, or give --no-peers")
    bodies, lists = (
        Bodies(scratch / f"{load.name}-{name}-{images}", images) for images in (1, IN_A_LIST)
    )
    for each in (bodies, lists):
        each.folder.mkdir()
    port = free_port()
    setup = {
        "model": str(load.bundle.model_path),
        "size": load.bundle.info.preprocess.size,
        "images": str(load.images),
        "bodies": str(bodies.folder),
        "lists": str(lists.folder),
        "in_a_list": lists.images,
        "port": port,
        "edge": _EDGE,
    }
    facts = _PEERS[name] | {"address": f"127.0.0.1:{port}"}
    script = HERE / "peers" / f"{name}_peer.py"
    command = [str(PEER_PYTHON), str(script), json.dumps(setup)]
    try:
        return Server(name, command, facts, bodies, lists)
    except SystemExit as failure:  # pytriton was seen to start without its model, once in many runs
        print(f"{failure}; starting it once more", file=sys.stderr)
        return Server(name, command, facts, bodies, lists)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
