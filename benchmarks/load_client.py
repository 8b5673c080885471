"""Clients of one server, in a process of their own: benchmarks/serve_load.py starts it.

The first line on stdin says where the server is; each further line is a window of load, names a
folder of ready-made request bodies, so that the clients cost as little as possible, and is answered
with what happened in it. Closed loop: each client sends the next request when it has an answer.
"""

import asyncio
import functools
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import uvloop

CALL_S = 30.0
"""A call without an answer is lost after so long, and counted as failed."""
Send = Callable[[bytes], Awaitable[int]]
"""Sends a request's body and returns the size of the answer's."""


async def main() -> None:
    """Serves the windows."""
    setup = json.loads(sys.stdin.readline())
    connect = grpc_sender if setup["protocol"] == "grpc" else http_sender
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        window = json.loads(line)
        senders = await connect(setup, window["clients"], window["connections"])
        bodies = all_in(Path(window["bodies"]))
        answer = await load(senders, bodies, window["seconds"], window["answer_bytes"])
        print(json.dumps(answer), flush=True)


@functools.cache
def all_in(folder: Path) -> Iterator[bytes]:
    """The files of a folder in order, again and again; where the last window left off."""
    return itertools.cycle([path.read_bytes() for path in sorted(folder.iterdir())])


async def load(
    senders: list[Send], bodies: Iterator[bytes], seconds: float, answer_bytes: int
) -> dict[str, Any]:
    """All clients at once; the window begins when each has had about one answer.

    A request that is under way when the window begins or ends counts by the part of its time that
    lies in it. Whole answers would count batches, and a window that begins just after one has one
    too many: of images that take 20 ms, a tenth in three seconds.
    """
    calls: list[tuple[float, float]] = []
    """When each good one was sent and answered."""
    failed = answered = 0
    begin = asyncio.Event()
    stopping = False

    async def client(send: Send) -> None:
        nonlocal failed, answered
        while not stopping:
            sent = time.perf_counter()
            try:
                good = await send(next(bodies)) >= answer_bytes
            except (grpc.RpcError, OSError, asyncio.IncompleteReadError, TimeoutError):
                good = False
                await asyncio.sleep(0.05)  # a dead connection fails without giving others a turn
            answered += 1
            if good:
                calls.append((sent, time.perf_counter()))
            if begin.is_set():
                failed += not good
            elif answered >= len(senders):
                begin.set()

    clients = [asyncio.ensure_future(client(send)) for send in senders]
    await begin.wait()
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    ended, used = time.perf_counter(), time.process_time() - cpu
    stopping = True  # and not cancelled: peers were seen to hang after calls that were given up
    await asyncio.gather(*clients)
    return {
        "requests": sum(
            max(0.0, min(done, ended) - max(sent, began)) / (done - sent) for sent, done in calls
        ),
        "latencies": [done - sent for sent, done in calls if began <= done <= ended],
        "seconds": ended - began,
        "failed": failed,
        "client_cpu_s": used,
    }


async def grpc_sender(setup: dict[str, Any], clients: int, connections: int) -> list[Send]:
    """HTTP/2 carries many calls at a time; clients that are programs have a connection each."""
    while len(_channels) < connections:
        own = (("grpc.use_local_subchannel_pool", 1),)
        _channels.append(grpc.aio.insecure_channel(setup["address"], own))

    def sender(channel: grpc.aio.Channel) -> Send:
        call: Any = channel.unary_unary(setup["method"])  # bytes in, bytes out

        async def send(body: bytes) -> int:
            return len(await call(body, timeout=CALL_S))

        return send

    return [sender(_channels[each % connections]) for each in range(clients)]


async def http_sender(setup: dict[str, Any], clients: int, connections: int) -> list[Send]:
    """A connection for each client, new in each window: servers end those that were idle."""
    host, _, port = setup["address"].rpartition(":")
    while _connections:
        _connections.pop()[1].close()
    opening = (asyncio.open_connection(host, int(port)) for _ in range(clients))
    _connections.extend(await asyncio.gather(*opening))
    head = (
        f"POST {setup['method']} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {setup['content']}\r\n"
    )

    def sender(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Send:
        async def send(body: bytes) -> int:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            writer.write(body)
            async with asyncio.timeout(CALL_S):
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
                named = (ln for ln in lines if ln.startswith("content-length"))
                length = int(next(named).split(":")[1])
                await reader.readexactly(length)
            return length if lines[0].split()[1] == "200" else -1

        return send

    return [sender(*connection) for connection in _connections]


_channels: list[grpc.aio.Channel] = []
_connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
