"""Two processes of one server, each asked over a connection of its own."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.server import Running

ALONE = (("grpc.use_local_subchannel_pool", 1),)
"""A channel with a connection of its own."""
SPREAD = 40
"""Connections that are tried until each process has one: one is missed once in 2**39 times."""


class Asked:
    """Connections to each of two processes: 0 is the owner, 1 its front."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self.channels = channels
        self.collections: list[Any] = [byol_pb2_grpc.CollectionsStub(c) for c in channels]
        self.embedders: list[Any] = [byol_pb2_grpc.EmbedderStub(c) for c in channels]


def requests_of(port: int | None) -> dict[int, float]:
    """How many calls each process has answered."""
    counts: dict[int, float] = {}
    for name, labels, value in samples(port):
        if name == "byol_requests_total":
            number = int(labels["process"])
            counts[number] = counts.get(number, 0) + value
    return counts


def samples(port: int | None) -> list[tuple[str, dict[str, str], float]]:
    status, text = get(port, "/metrics")
    assert status == 200
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def get(port: int | None, path: str) -> tuple[int, str]:
    assert port is not None
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@asynccontextmanager
async def asked(running: Running) -> AsyncIterator[Asked]:
    """Finds a connection to each process, by who counts what is asked over it."""
    found: dict[int, grpc.aio.Channel] = {}
    async with AsyncExitStack() as stack:
        before = await asyncio.to_thread(requests_of, running.metrics_port)
        for _ in range(SPREAD):
            channel = grpc.aio.insecure_channel(running.address, ALONE)
            await stack.enter_async_context(channel)
            stub: Any = byol_pb2_grpc.EmbedderStub(channel)
            await stub.GetEncoder(pb.GetEncoderRequest(), timeout=20)
            after = await asyncio.to_thread(requests_of, running.metrics_port)
            (number,) = [each for each in after if after[each] != before.get(each, 0)]
            found.setdefault(number, channel)
            before = after
            if len(found) == 2:
                break
        yield Asked([found[0], found[1]])


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Waits for it; `condition` may block."""
    ends = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < ends
        await asyncio.sleep(0.1)


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 20)
    return caught.value


def fronts_of(owner: int) -> list[int]:
    """The further processes of a server, by their command and parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if b"byol_serving.server_front" in command and int(fields[1]) == owner:
            found.append(int(entry.name))
    return found
