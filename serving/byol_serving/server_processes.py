"""Several processes on one port: this one, the owner, starts the others and keeps them running.

    owner (0)                         fronts (1, 2, ...)
    the port, the store      <──      collections and admin calls, images embedded already
    models, embedding                 models, embedding
    loads and switches       ──>      the same, in each

All listen on the port, and the system spreads connections over them. What goes between them goes
over Unix sockets in a folder that only this user can enter. A front gets its settings and commands
on stdin, and ends when it reads the end of that: with the owner, however that ends.
"""

import asyncio
import logging
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from byol_serving.config import ServeConfig
from byol_serving.errors import ByolError, InvalidConfig, Unavailable
from byol_serving.held_port import CAN_BE_SHARED, held_port
from byol_serving.pb.byol.v1 import admin_pb2_grpc
from byol_serving.rpc.forwarding import CHANNEL_OPTIONS

log = logging.getLogger("byol.processes")

METRICS = "/process/Metrics"
"""Method of a front for its owner: bytes in Prometheus' text format."""

_LONGEST_FOLDER = 80
"""A Unix socket's path has at most 107 bytes."""
_SCRAPE_S = 2.0
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Before a front is started again, by how often in a row it did not stay."""
_STAYED_S = 60.0
_LAST_S = 1.0
"""For calls to a front that has ended to find that out, instead of being cancelled."""
_MORE_S = 5.0
"""That a front may take to end, beyond the time to drain."""


def owner_socket(folder: Path) -> str:
    """Where the owner answers its fronts."""
    return f"unix:{folder}/owner"


def front_socket(folder: Path, number: int) -> str:
    """Where a front answers its owner."""
    return f"unix:{folder}/front-{number}"


def rates_folder(folder: Path) -> Path:
    """Where the processes count the requests of tokens together."""
    return folder / "rates"


class _Says(asyncio.Protocol):
    """What a front writes to its stdout: a word a line. It ends when the front does."""

    def __init__(self) -> None:
        self.words: asyncio.Queue[str] = asyncio.Queue()
        self.ended = asyncio.Event()
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.words.put_nowait(line.decode())

    def connection_lost(self, error: Exception | None) -> None:
        self.words.put_nowait("")
        self.ended.set()


class Front:
    """One further process, as the owner sees it."""

    def __init__(self, number: int, config: ServeConfig, folder: Path) -> None:
        """Starts it."""
        self.number = number
        self.began = time.monotonic()
        self._serving = False
        self._says = _Says()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "byol_serving.server_front"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._tell(pickle.dumps((config, number, folder)))
        self._channel = grpc.aio.insecure_channel(front_socket(folder, number), CHANNEL_OPTIONS)
        self.admin: Any = admin_pb2_grpc.AdminStub(self._channel)
        self._metrics: Any = self._channel.unary_unary(METRICS)

    @classmethod
    async def started(cls, number: int, config: ServeConfig, folder: Path) -> Self:
        """A new one that is followed, and not yet up."""
        front = cls(number, config, folder)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: front._says, front._process.stdout)
        return front

    @property
    def serving(self) -> bool:
        """Whether it answers calls."""
        return self._serving and not self._says.ended.is_set()

    async def up(self) -> None:
        """Returns when it can be asked; raises Unavailable if it ends instead."""
        await self._hear("up")

    async def serve(self, default_model: str) -> None:
        """Makes it answer calls; raises Unavailable if it ends instead."""
        self._tell(f"serve {default_model}\n".encode())
        await self._hear("serving")
        self._serving = True

    async def metrics(self) -> bytes | None:
        """What it has to tell; None if it does not answer."""
        try:
            text: bytes = await self._metrics(b"", timeout=_SCRAPE_S)
        except grpc.aio.AioRpcError as failure:
            log.warning("process %d does not tell its metrics: %s", self.number, failure.details())
            return None
        return text

    async def ended(self) -> int:
        """Its exit status, once it has one."""
        await self._says.ended.wait()
        await self._channel.close(_LAST_S)
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await asyncio.to_thread(self._process.wait)

    async def drain(self, seconds: float) -> bool:
        """Makes it answer what it has accepted, and end; whether it answered all."""
        self._tell(f"drain {seconds}\n".encode())
        try:
            async with asyncio.timeout(seconds + _MORE_S):
                return await self.ended() == 0
        except TimeoutError:
            log.warning("process %d did not end: killed", self.number)
            return False
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Ends it at once, if it has not ended."""
        self._process.kill()
        await self.ended()

    def _tell(self, data: bytes) -> None:
        assert self._process.stdin is not None
        # If it has ended, so has what it says, where that is found out.
        with suppress(BrokenPipeError):
            self._process.stdin.write(data)

    async def _hear(self, wanted: str) -> None:
        if await self._says.words.get() != wanted:
            raise Unavailable(
                f"process {self.number} ended with status {await self.ended()} before it was"
                f" {wanted}; the log says why"
            )


class Fronts:
    """All further processes of a server; a context manager that leaves none of them behind."""

    def __init__(self, config: ServeConfig) -> None:
        """Takes the port; `config.processes` is at least 2.

        Raises:
            InvalidConfig: the address is in use, or this system cannot spread connections.
        """
        if not CAN_BE_SHARED:
            raise InvalidConfig(
                f"processes {config.processes}: only Linux spreads the connections of a port; use 1"
            )
        self._held = ExitStack()
        port = self._held.enter_context(held_port(config.host, config.port))
        self.config = replace(config, port=port)
        """With the port that was chosen where 0 was asked for."""
        self.folder = _private_folder()
        self._fronts: dict[int, Front] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()

    async def serve(self, teach: Callable[..., Awaitable[None]]) -> None:
        """Makes all answer calls, and from then on starts anew those that end.

        Args:
            teach: makes the processes it is given load what is loaded here, and serve.

        Raises:
            ByolError: one of them cannot.
        """
        await asyncio.gather(*(front.up() for front in self._fronts.values()))
        await teach(*self._fronts.values())
        self._keepers = [
            asyncio.ensure_future(self._keep(front, teach)) for front in self._fronts.values()
        ]

    def live(self) -> Sequence[Front]:
        """Those that answer calls."""
        return [front for front in self._fronts.values() if front.serving]

    @property
    def ready(self) -> bool:
        """Whether all answer calls."""
        return len(self.live()) == self.config.processes - 1

    def metrics(self) -> Mapping[int, bytes]:
        """What those that answer have to tell; blocks, not for the event loop's thread."""

        async def ask() -> dict[int, bytes]:
            fronts = self.live()
            texts = await asyncio.gather(*(front.metrics() for front in fronts))
            return {
                front.number: text
                for front, text in zip(fronts, texts, strict=True)
                if text is not None
            }

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(2 * _SCRAPE_S)

    async def drain(self, seconds: float) -> bool:
        """Makes all answer what they have accepted, and end; whether they answered all."""
        await self._let_be()
        fronts = self.live()
        drained = await asyncio.gather(*(front.drain(seconds) for front in fronts))
        return all(drained)

    async def __aenter__(self) -> Self:
        """Starts the processes, which take a while until they can be asked."""
        for number in range(1, self.config.processes):
            self._fronts[number] = await Front.started(number, self.config, self.folder)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what is left, gives the port back and removes the folder."""
        await self._let_be()
        await asyncio.gather(*(front.kill() for front in self._fronts.values()))
        self._held.close()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    async def _keep(self, front: Front, teach: Callable[..., Awaitable[None]]) -> None:
        failures = 0
        while True:
            status = await front.ended()
            failures = 1 if time.monotonic() - front.began > _STAYED_S else failures + 1
            pause = _PAUSES_S[min(failures, len(_PAUSES_S)) - 1]
            text = "process %d ended with status %d; starting it again in %g s"
            log.warning(text, front.number, status, pause)
            await asyncio.sleep(pause)
            try:
                front = await Front.started(front.number, self.config, self.folder)
                self._fronts[front.number] = front
                await front.up()
                await teach(front)
                log.warning("process %d answers again", front.number)
            except (ByolError, OSError) as error:
                log.error("process %d cannot be started: %s", front.number, error)
                await front.kill()

    async def _let_be(self) -> None:
        """From now on nothing is started again."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)


def _private_folder() -> Path:
    """A new folder that only this user can enter, with a short path."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="byol-"))
    except OSError as error:
        raise InvalidConfig(
            f"several processes need a temporary folder ({error.strerror}); set TMPDIR to one that"
            " can be written"
        ) from error
    if len(str(folder)) > _LONGEST_FOLDER:
        folder.rmdir()
        raise InvalidConfig(
            f"the path {folder} is too long for Unix sockets (over {_LONGEST_FOLDER} bytes);"
            " set TMPDIR to a shorter one"
        )
    rates_folder(folder).mkdir()
    return folder
