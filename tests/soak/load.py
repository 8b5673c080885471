"""The clients of the soak. Each checks what it is answered, and counts how every call ended."""

import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from byol_serving.pb.byol.v1 import admin_pb2, admin_pb2_grpc, byol_pb2_grpc
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from soak.material import BAD, MODEL, SEEDS, Material

PATIENCE_S = 10.0
"""Deadline of calls that are to be answered or refused; the queue holds far less."""
STARVED = "late, the sender was starved"
_STARVED_S = 1.0
_OWN = (("grpc.use_local_subchannel_pool", 1),)
"""Each kind of client has a connection of its own, and so perhaps a process of the server."""
_STEP_S = 0.02
"""Open-loop senders wake up so often."""


@dataclass
class Outcome:
    """How calls ended, by kind of client; what must not be is in `faults`."""

    started: Counter[str] = field(default_factory=Counter)
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Of each good call that was answered."""
    faults: list[str] = field(default_factory=list)

    def count(self, kind: str, code: str) -> None:
        """One call that ended."""
        self.ended[kind, code] += 1

    def fault(self, text: str) -> None:
        """Something that must not be; the first hundred are kept."""
        if len(self.faults) < 100:
            self.faults.append(text)


class Load:
    """All clients against one server; `run` them together until `done` is set."""

    def __init__(self, address: str, material: Material, seed: int = 0) -> None:
        self.address, self.material = address, material
        self.outcome = Outcome()
        self.done = asyncio.Event()
        self._random = random.Random(seed)
        self._starved: list[float] = []
        """When this program itself did not get to run for a second."""

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Images a second that the server answers to clients who wait: its capacity."""
        answered, until = 0, time.monotonic() + seconds

        async def ask(stub: Any) -> None:
            nonlocal answered
            while time.monotonic() < until:
                rows = self._choose(8)
                await self._check_embed(stub, rows, "warm-up")
                answered += len(rows)

        async with grpc.aio.insecure_channel(self.address, _OWN) as channel:
            stub = byol_pb2_grpc.EmbedderStub(channel)
            began = time.monotonic()
            await asyncio.gather(*(ask(stub) for _ in range(clients)))
        return answered / (time.monotonic() - began)

    async def heartbeat(self) -> None:
        """Notes when this program is starved: what is late then is not the server's fault."""
        while not self.done.is_set():
            before = time.monotonic()
            await asyncio.sleep(_STEP_S)
            if time.monotonic() - before > _STARVED_S:
                self._starved.append(time.monotonic())

    async def good(self, images_per_second: float) -> None:
        """Sends at a fixed rate, whatever comes back: each call is answered in time, or refused."""
        await self._at_rate("good", images_per_second / 4.5, lambda stub: self._good(stub))

    async def expiring(self, per_second: float) -> None:
        """Calls whose deadline is near or past when they arrive."""
        await self._at_rate("expiring", per_second, lambda stub: self._expiring(stub))

    async def cancelling(self, per_second: float) -> None:
        """Calls whose caller leaves soon."""
        await self._at_rate("cancelled", per_second, lambda stub: self._cancelled(stub))

    async def bad(self, per_second: float) -> None:
        """Batches with one bad image."""
        await self._at_rate("bad", per_second, lambda stub: self._bad(stub))

    async def features(self, per_second: float) -> None:
        """Dense feature maps."""
        await self._at_rate("features", per_second, lambda stub: self._features(stub))

    async def slow_stream(self) -> None:
        """Streams whose client reads slowly: answers in order, one for each request."""
        while not self.done.is_set():
            batches = [self._choose(4) for _ in range(10)]
            self.outcome.started["stream"] += 1
            async with grpc.aio.insecure_channel(self.address, _OWN) as channel:
                call = byol_pb2_grpc.EmbedderStub(channel).EmbedStream(
                    self._requests(batches), timeout=60
                )
                answers = 0
                try:
                    async for answer in call:
                        if answers < len(batches):
                            self._compare(answer, batches[answers], "stream")
                        answers += 1
                        await asyncio.sleep(0.05)
                except grpc.aio.AioRpcError as error:
                    self.outcome.fault(f"stream: {error.code().name}: {error.details()}")
                    self.outcome.count("stream", error.code().name)
                    continue
            if answers != len(batches):
                self.outcome.fault(f"stream: {answers} answers to {len(batches)} requests")
            self.outcome.count("stream", "OK")

    async def switching(self, every_s: float) -> None:
        """Switches the model to and fro, and unloads the version that was in use."""
        async with grpc.aio.insecure_channel(self.address, _OWN) as channel:
            stub: Any = admin_pb2_grpc.AdminStub(channel)
            while not self.done.is_set():
                for version in reversed(SEEDS):
                    request = admin_pb2.SwitchModelRequest(
                        name=MODEL, version=version, unload_previous=True
                    )
                    self.outcome.started["switch"] += 1
                    try:
                        await stub.SwitchModel(request, timeout=60)
                        self.outcome.count("switch", "OK")
                    except grpc.aio.AioRpcError as error:
                        self.outcome.count("switch", error.code().name)
                        self.outcome.fault(f"switch: {error.code().name}: {error.details()}")
                    await asyncio.sleep(every_s)

    async def killed_clients(self, file: Path) -> None:
        """Processes in the middle of a stream, killed."""
        command = [sys.executable, "-m", "soak.victim", self.address, str(file)]
        while not self.done.is_set():
            victim = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            assert victim.stdout is not None
            self.outcome.started["killed"] += 1
            await victim.stdout.readline()  # it has been answered once
            await asyncio.sleep(self._random.uniform(0, 0.3))
            victim.send_signal(signal.SIGKILL)
            await victim.wait()
            self.outcome.count("killed", "killed")

    async def _at_rate(
        self, kind: str, per_second: float, call: Callable[[Any], Coroutine[Any, Any, str]]
    ) -> None:
        """Starts calls at a rate (Poisson), waiting for none; then waits for all."""
        flying: set[asyncio.Task[None]] = set()

        async def one(stub: Any) -> None:
            self.outcome.count(kind, await call(stub))

        async with grpc.aio.insecure_channel(self.address, _OWN) as channel:
            stub = byol_pb2_grpc.EmbedderStub(channel)
            following = time.monotonic()
            while not self.done.is_set():
                while following <= time.monotonic():
                    following += self._random.expovariate(per_second)
                    self.outcome.started[kind] += 1
                    task = asyncio.ensure_future(one(stub))
                    flying.add(task)
                    task.add_done_callback(flying.discard)
                await asyncio.sleep(_STEP_S)
            await asyncio.gather(*flying)

    async def _good(self, stub: Any) -> str:
        began = time.monotonic()
        code = await self._check_embed(stub, self._choose(8), "good")
        if code == "OK":
            self.outcome.seconds.append(time.monotonic() - began)
        elif code == "DEADLINE_EXCEEDED" and self._starved_since(began):
            return STARVED
        elif code != "RESOURCE_EXHAUSTED":
            self.outcome.fault(f"good: {code} after {time.monotonic() - began:.2f} s")
        return code

    async def _expiring(self, stub: Any) -> str:
        timeout = self._random.choice((0.0005, 0.005, 0.02, 0.05))
        code = await self._check_embed(stub, self._choose(8), "expiring", timeout)
        if code not in ("OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"):
            self.outcome.fault(f"expiring: {code}")
        return code

    async def _cancelled(self, stub: Any) -> str:
        call = stub.Embed(self._request(self._choose(8)), timeout=PATIENCE_S)
        await asyncio.sleep(self._random.uniform(0, 0.1))
        call.cancel()
        code: str = (await call.code()).name
        if code not in ("OK", "CANCELLED", "RESOURCE_EXHAUSTED"):
            self.outcome.fault(f"cancelled: {code}")
        return code

    async def _bad(self, stub: Any) -> str:
        began, rows = time.monotonic(), self._choose(7)
        request = self._request(rows)
        position = self._random.randint(0, len(rows))
        request.images.insert(position, self._random.choice(list(BAD.values())))
        try:
            await stub.Embed(request, timeout=PATIENCE_S)
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            if code == "INVALID_ARGUMENT" and f"image {position}: " in (error.details() or ""):
                return code
        if code == "DEADLINE_EXCEEDED" and self._starved_since(began):
            return STARVED
        if code != "RESOURCE_EXHAUSTED":
            self.outcome.fault(f"bad: image {position} of {len(rows) + 1} gave {code}")
        return code

    async def _features(self, stub: Any) -> str:
        began, rows = time.monotonic(), self._choose(4)
        files = [self.material.files[row] for row in rows]
        request = pb.ExtractFeaturesRequest(images=files, stages=["cells"])
        try:
            answer = await stub.ExtractFeatures(request, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if late and self._starved_since(began):
                return STARVED
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.outcome.fault(f"features: {error.code().name}: {error.details()}")
            return error.code().name
        values = np.frombuffer(answer.maps[0].values.data, "<f4").reshape(len(rows), 3, 4, 4)
        if not np.allclose(values, self.material.cells[rows], atol=1e-5):
            self.outcome.fault(f"features: maps of other images than {rows}")
        return "OK"

    async def _check_embed(
        self, stub: Any, rows: Sequence[int], kind: str, within_s: float = PATIENCE_S
    ) -> str:
        try:
            answer = await stub.Embed(self._request(rows), timeout=within_s)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        self._compare(answer, rows, kind)
        return "OK"

    def _compare(self, answer: pb.EmbedResponse, rows: Sequence[int], kind: str) -> None:
        """Each row must be the golden embedding of its own image, by the encoder that is named."""
        golden = self.material.golden[answer.encoder_id]
        found = np.frombuffer(answer.embeddings.data, "<f4").reshape(len(rows), -1)
        if not np.allclose(found, golden[list(rows)], atol=1e-4):
            self.outcome.fault(f"{kind}: other vectors than those of images {list(rows)}")

    def _starved_since(self, began: float) -> bool:
        return any(at > began for at in self._starved)

    def _choose(self, most: int) -> list[int]:
        count = self._random.randint(1, most)
        return [self._random.randrange(len(self.material.files)) for _ in range(count)]

    def _request(self, rows: Sequence[int]) -> pb.EmbedRequest:
        return pb.EmbedRequest(images=[self.material.files[row] for row in rows])

    async def _requests(self, batches: list[list[int]]) -> AsyncIterator[pb.EmbedRequest]:
        for batch in batches:
            yield self._request(batch)
