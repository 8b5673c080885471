"""Several processes on one port, as one server: real processes, asked over real connections."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from byol_serving.client import AsyncClient, ClientTls, Retry
from byol_serving.config import ServeConfig, TlsConfig
from byol_serving.errors import (
    InvalidBundle,
    InvalidConfig,
    Overloaded,
    Unavailable,
)
from byol_serving.pb.byol.v1 import admin_pb2, admin_pb2_grpc, byol_pb2_grpc
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import tensor_to_vectors
from byol_serving.rpc.status import error_from
from byol_serving.server import Running, serving
from byol_serving.tokens import Scope, Token, add_token, new_token
from serving.certificates import Authority
from serving.rpc.test_models import broken_bundle
from serving.rpc.two_processes import (
    ALONE,
    SPREAD,
    Asked,
    asked,
    fronts_of,
    get,
    refused,
    requests_of,
    samples,
    until,
)
from serving.support import make_bundle, png, random_pixels, reference

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux spreads the connections of a port"
)

PIXELS = random_pixels(4)
FILES = [png(each) for each in PIXELS]
ONCE = Retry(attempts=1)


async def test_metrics_say_which_process_and_probes_need_all(pair: tuple[Running, Asked]) -> None:
    running, both = pair
    for each in both.embedders:
        await each.Embed(pb.EmbedRequest(images=FILES))
    found = await asyncio.to_thread(samples, running.metrics_port)
    assert {labels["process"] for _, labels, _ in found} == {"0", "1"}
    embedded = [
        value
        for name, labels, value in found
        if name == "byol_requests_total" and labels["method"] == "/byol.v1.Embedder/Embed"
    ]
    assert embedded == [1, 1]
    # What goes from process to process is no call of a client, and is counted once.
    methods = [labels["method"] for name, labels, _ in found if name == "byol_requests_total"]
    assert methods.count("/byol.v1.Collections/CreateCollection") == 1
    assert sum(name == "process_resident_memory_bytes" for name, _, _ in found) == 2
    assert await asyncio.to_thread(get, running.metrics_port, "/readyz") == (200, "ready\n")


async def test_a_front_that_dies_is_started_again(
    pair: tuple[Running, Asked], caplog: pytest.LogCaptureFixture
) -> None:
    running, both = pair
    (front,) = fronts_of(os.getpid())
    await both.collections[1].Upsert(pb.UpsertRequest(collection="c", ids=["a"], images=FILES[:1]))
    os.kill(front, signal.SIGKILL)
    # The owner hears of it a moment later, which an answer may well precede.
    unready = asyncio.ensure_future(until(lambda: get(running.metrics_port, "/readyz")[0] == 503))
    async with AsyncClient(running.address, timeout=20) as client:
        np.testing.assert_allclose(await client.embed(FILES), reference(PIXELS), atol=1e-5)
    await unready
    await until(lambda: get(running.metrics_port, "/readyz")[0] == 200)
    assert fronts_of(os.getpid()) not in ([], [front])
    assert "process 1 ended with status -9; starting it again in 0.5 s" in caplog.text
    async with asked(running) as anew:
        search = pb.SearchRequest(collection="c", queries=[pb.Query(image=FILES[0])], k=1)
        answer = await anew.collections[1].Search(search)
        assert answer.results[0].hits[0].id == "a"


async def test_the_rate_of_a_token_holds_over_all_processes(
    bundle_path: Path, tmp_path: Path
) -> None:
    secrets = []
    for name, rate in (("slow", 0.1), ("free", None)):
        secret, digest = new_token()
        scopes: frozenset[Scope] = frozenset({"read"})
        entry = Token(name=name, sha256=digest, scopes=scopes, rate=rate, burst=5 if rate else None)
        add_token(tmp_path / "tokens.toml", entry)
        secrets.append(secret)
    config = ServeConfig(bundle=bundle_path, tokens=tmp_path / "tokens.toml", port=0, processes=2)
    hints: list[float] = []

    async def ask(address: str, secret: str) -> bool:
        async with grpc.aio.insecure_channel(address, ALONE) as channel:
            stub: Any = byol_pb2_grpc.EmbedderStub(channel)
            bearer = (("authorization", f"Bearer {secret}"),)
            try:
                await stub.GetEncoder(pb.GetEncoderRequest(), metadata=bearer, timeout=20)
            except grpc.aio.AioRpcError as failure:
                trailers: Any = failure.trailing_metadata()
                error = error_from(failure.code(), failure.details() or "", tuple(trailers))
                assert isinstance(error, Overloaded)
                hints.append(error.retry_after_s)
                return False
            return True

    async with serving(config) as running:
        answered = [await ask(running.address, secrets[0]) for _ in range(16)]
        assert answered == [True] * 5 + [False] * 11
        assert all(0 < hint <= 10 for hint in hints)
        assert await ask(running.address, secrets[1])


async def test_models_change_in_all_processes_and_fail_no_request(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    seeds = {"v1": 1, "v2": 2}
    bundles = {v: make_bundle(folder / "cats" / v, seed=seed) for v, seed in seeds.items()}
    versions = {bundle.info.encoder_id: version for version, bundle in bundles.items()}
    wanted = {version: reference(PIXELS, seed) for version, seed in seeds.items()}
    config = ServeConfig(models=folder, port=0, processes=2, metrics_port=0)
    done, answers = asyncio.Event(), dict.fromkeys(seeds, 0)

    async def ask(stub: Any) -> None:
        while not done.is_set():
            answer = await stub.Embed(pb.EmbedRequest(images=FILES), timeout=20)
            version = versions[answer.encoder_id]
            rows = tensor_to_vectors(answer.embeddings, ndim=2)
            np.testing.assert_allclose(rows, wanted[version], atol=1e-5)
            answers[version] += 1

    async def loaded(stub: Any) -> list[str]:
        answer = await stub.ListModels(admin_pb2.ListModelsRequest())
        return [each.version for each in answer.models]

    async def now() -> list[str]:
        found = [await each.GetEncoder(pb.GetEncoderRequest()) for each in both.embedders]
        return [each.version for each in found]

    async with serving(config) as running, asked(running) as both:
        owner, by_front = (admin_pb2_grpc.AdminStub(each) for each in both.channels)

        async def switch(stub: Any, version: str) -> None:
            request = admin_pb2.SwitchModelRequest(
                name="cats", version=version, unload_previous=True
            )
            await stub.SwitchModel(request, timeout=30)

        assert await now() == ["v2", "v2"]
        asking = [asyncio.ensure_future(ask(stub)) for stub in both.embedders * 2]
        for stub, version in ((owner, "v1"), (by_front, "v2"), (by_front, "v1")):
            await asyncio.sleep(0.1)
            await switch(stub, version)
            assert await now() == [version] * 2
        done.set()
        await asyncio.gather(*asking)
        assert min(answers.values()) > 0

        broken_bundle(folder / "cats" / "v9")
        error = await refused(switch(by_front, "v9"))
        assert "fails its golden check" in (error.details() or "")
        assert await now() == ["v1", "v1"]
        # One that only the front cannot load is taken back everywhere.
        (front,) = fronts_of(os.getpid())
        late = make_bundle(folder / "cats" / "v3", seed=3)
        os.kill(front, signal.SIGSTOP)
        loading = asyncio.ensure_future(refused(switch(owner, "v3")))
        async with asyncio.timeout(20):
            while await loaded(owner) == ["v1"]:
                continue
        late.model_path.write_bytes(b"damaged")
        os.kill(front, signal.SIGCONT)
        assert re.match("process 1: .*truncated or altered", (await loading).details() or "")
        assert await now() == ["v1", "v1"]
        assert await loaded(owner) == await loaded(by_front) == ["v1"]
        # One that ends meanwhile holds nothing up. Started again, it takes what is in use, and not
        # the newest in the folder.
        make_bundle(folder / "cats" / "v10", seed=10)
        os.kill(front, signal.SIGSTOP)
        switching = asyncio.ensure_future(switch(owner, "v2"))
        async with asyncio.timeout(20):
            while await loaded(owner) == ["v1"]:
                continue
        os.kill(front, signal.SIGKILL)
        await switching
        await until(lambda: get(running.metrics_port, "/readyz")[0] == 200)
        async with asked(running) as anew:
            for stub in anew.embedders:
                assert (await stub.GetEncoder(pb.GetEncoderRequest())).version == "v2"


async def test_a_reload_reaches_all_processes(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "own", seed=1).path
    config = ServeConfig(bundle=path, port=0, processes=2, metrics_port=0)
    async with serving(config) as running, asked(running) as both:
        shutil.rmtree(path)
        make_bundle(path, seed=2)
        await running.reload()
        for stub in both.embedders:
            answer = await stub.Embed(pb.EmbedRequest(images=FILES))
            rows = tensor_to_vectors(answer.embeddings, ndim=2)
            np.testing.assert_allclose(rows, reference(PIXELS, 2), atol=1e-5)


async def test_a_second_server_on_the_port_is_refused(bundle_path: Path) -> None:
    async with serving(ServeConfig(bundle=bundle_path, port=0, processes=2)) as running:
        port = int(running.address.rpartition(":")[2])
        for processes in (1, 2):
            with pytest.raises(InvalidConfig, match=f"cannot listen on 127.0.0.1:{port}"):
                async with serving(ServeConfig(bundle=bundle_path, port=port, processes=processes)):
                    pass
    async with serving(ServeConfig(bundle=bundle_path, port=port, processes=2)):
        pass  # and it is free again


async def test_a_damaged_bundle_leaves_no_process(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    bundle.model_path.write_bytes(bundle.model_path.read_bytes()[:-7])
    with pytest.raises(InvalidBundle, match="truncated or altered"):
        async with serving(ServeConfig(bundle=bundle.path, port=0, processes=2)):
            pass
    assert not fronts_of(os.getpid())


def is_running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


class Command:
    """`byol serve --processes 3` as a command."""

    def __init__(self, bundle: Path, *options: str) -> None:
        words = ["--bundle", str(bundle), "--port", "0", "--processes", "3", "--json", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "byol_cli.main", "serve", *words, "--log-format", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.address: str = json.loads(self.process.stdout.readline())["serving"]
        self.fronts = fronts_of(self.process.pid)
        assert len(self.fronts) == 2

    def ended(self) -> list[dict[str, Any]]:
        """Its log, once all of its processes have ended."""
        _, log = self.process.communicate(timeout=30)  # all hold the same stderr
        ends = time.monotonic() + 10
        while any(map(is_running, self.fronts)):  # which they are for a moment without a stderr
            assert time.monotonic() < ends
            time.sleep(0.02)
        return [json.loads(line) for line in log.splitlines()]


@contextmanager
def command(bundle: Path, *options: str) -> Iterator[Command]:
    running = Command(bundle, *options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate(timeout=30)


@pytest.mark.parametrize("group", [False, True])
def test_a_signal_drains_all_processes(tmp_path: Path, group: bool) -> None:
    """`group`: as Ctrl-C does, to every process of the terminal."""
    bundle = make_bundle(tmp_path / "slow", work=3).path
    batch = pb.EmbedRequest(images=FILES * 16)
    answered: list[int] = []
    begun = threading.Semaphore(0)

    def ask() -> None:
        rows = reference(np.concatenate([PIXELS] * 16))
        with grpc.insecure_channel(running.address, ALONE) as channel:
            stub: Any = byol_pb2_grpc.EmbedderStub(channel)
            answers = 0
            for answer in stub.EmbedStream(iter([batch] * 4), timeout=60):
                found = tensor_to_vectors(answer.embeddings, ndim=2)
                np.testing.assert_allclose(found, rows, atol=1e-5)
                answers += 1
                begun.release()
            answered.append(answers)

    with command(bundle) as running:
        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        for _ in asking:
            assert begun.acquire(timeout=30)
        if group:
            os.killpg(running.process.pid, signal.SIGINT)
        else:
            running.process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(60)
        log = running.ended()
        assert running.process.returncode == 0
    assert answered == [4] * 8
    assert {line["process"] for line in log} == {0, 1, 2}


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_owner(tmp_path: Path, kill: signal.Signals) -> None:
    """After kill -9, and after a second signal, which stops at once."""
    bundle = make_bundle(tmp_path / "tiny").path
    with (
        command(bundle, "--drain-seconds", "60") as running,
        grpc.insecure_channel(running.address, ALONE) as channel,
    ):
        stub: Any = byol_pb2_grpc.EmbedderStub(channel)
        held = stub.EmbedStream(iter_forever())  # which a drain would wait for
        assert next(held).encoder_id
        running.process.send_signal(kill)
        if kill is signal.SIGTERM:
            time.sleep(0.3)
            running.process.send_signal(kill)
        log = running.ended()
        assert running.process.returncode == (-9 if kill is signal.SIGKILL else 1)
        held.cancel()
    if kill is signal.SIGKILL:
        left = [line for line in log if "that owns this one has ended" in line["message"]]
        assert {line["process"] for line in left} == {1, 2}


def iter_forever() -> Iterator[pb.EmbedRequest]:
    yield pb.EmbedRequest(images=FILES)
    threading.Event().wait(30)


async def test_all_processes_speak_tls(bundle_path: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    config = ServeConfig(
        bundle=bundle_path, port=0, processes=2, metrics_port=0, tls=TlsConfig(cert=cert, key=key)
    )
    tls = ClientTls(ca=authority.ca)
    async with serving(config) as running:
        for _ in range(SPREAD):
            async with AsyncClient(running.address, tls=tls, timeout=20) as client:
                await client.encoder()
            if len(await asyncio.to_thread(requests_of, running.metrics_port)) == 2:
                break
        answered = await asyncio.to_thread(requests_of, running.metrics_port)
        assert min(answered[0], answered[1]) > 0
        async with AsyncClient(running.address, retry=ONCE, timeout=20) as plain:
            with pytest.raises(Unavailable):
                await plain.encoder()
