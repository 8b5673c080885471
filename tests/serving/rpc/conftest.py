"""One real server for all tests that only ask it things, in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvloop

from byol_serving.client import Client
from byol_serving.config import ServeConfig
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.server import Running, serving
from serving.rpc.two_processes import Asked, asked
from serving.support import make_bundle


class ServerThread:
    """`serving(config)` in a thread, so that blocking clients can be tested against it."""

    def __init__(self, config: ServeConfig) -> None:
        """Returns once the server is ready."""
        self._config = config
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server")
        self.address = ""
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        """Drains and returns."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with serving(self._config) as running:
            self.address = running.address
            self._ready.set()
            await self._stop.wait()


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny").path


@pytest.fixture(scope="session")
def address(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServeConfig(
        bundle=bundle_path,
        store=tmp_path_factory.mktemp("store"),
        port=0,
        max_batch=16,
        max_message_bytes=4 * 2**20,
    )
    server = ServerThread(config)
    yield server.address
    server.stop()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout=20) as client:
        yield client


@pytest.fixture
async def pair(bundle_path: Path, tmp_path: Path) -> AsyncIterator[tuple[Running, Asked]]:
    """Two processes with a store, and the collection `c`, empty."""
    config = ServeConfig(
        bundle=bundle_path, store=tmp_path / "store", port=0, processes=2, metrics_port=0
    )
    async with serving(config) as running, asked(running) as both:
        await both.collections[1].CreateCollection(pb.CreateCollectionRequest(name="c"))
        yield running, both
