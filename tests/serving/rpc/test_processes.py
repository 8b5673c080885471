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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from prometheus_client.parser import text_string_to_metric_families

from byol_serving.client import AsyncClient, Retry
from byol_serving.config import ServeConfig
from byol_serving.errors import (
    InvalidBundle,
    InvalidConfig,
    Overloaded,
)
from byol_serving.pb.byol.v1 import admin_pb2, admin_pb2_grpc, byol_pb2_grpc
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import embeddings_to_tensor, tensor_to_vectors
from byol_serving.rpc.status import error_from
from byol_serving.server import Running, serving
from byol_serving.tokens import Scope, Token, add_token, new_token
from serving.rpc.test_models import broken_bundle
from serving.support import make_bundle, png, random_pixels, reference

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux spreads the connections of a port"
)

PIXELS = random_pixels(4)
FILES = [png(each) for each in PIXELS]
ONCE = Retry(attempts=1)
ALONE = (("grpc.use_local_subchannel_pool", 1),)
"""A channel with a connection of its own."""
_SPREAD = 40
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
        for _ in range(_SPREAD):
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


@pytest.fixture
async def pair(bundle_path: Path, tmp_path: Path) -> AsyncIterator[tuple[Running, Asked]]:
    """Two processes with a store, and the collection `c`, empty."""
    config = ServeConfig(
        bundle=bundle_path, store=tmp_path / "store", port=0, processes=2, metrics_port=0
    )
    async with serving(config) as running, asked(running) as both:
        await both.collections[1].CreateCollection(pb.CreateCollectionRequest(name="c"))
        yield running, both


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 20)
    return caught.value


async def test_a_front_answers_as_the_owner_does(pair: tuple[Running, Asked]) -> None:
    running, both = pair
    rows = [
        (await each.Embed(pb.EmbedRequest(images=FILES))).embeddings.data for each in both.embedders
    ]
    assert rows[0] == rows[1]
    upsert = pb.UpsertRequest(collection="c", ids=["a", "b", "c", "d"], images=FILES)
    assert (await both.collections[1].Upsert(upsert)).inserted == 4
    assert (await both.collections[0].Upsert(upsert)).updated == 4

    def queries() -> Iterator[tuple[str, Message]]:
        images = [pb.Query(image=each) for each in FILES]
        examples = [pb.Example(image=each) for each in FILES]
        pairs = [pb.Pair(left=a, right=b) for a in examples for b in (a, pb.Example(id="b"))]
        like = pb.Examples(like=examples[:2], unlike=[pb.Example(id="d")])
        yield "Search", pb.SearchRequest(collection="c", queries=images, k=2)
        both_kinds = [pb.Query(id="a"), pb.Query(examples=like), images[3]]
        yield "Search", pb.SearchRequest(collection="c", queries=both_kinds, k=3)
        yield "Classify", pb.ClassifyRequest(collection="c", key="k", queries=examples, k=2)
        yield "VerifyPairs", pb.VerifyPairsRequest(collection="c", pairs=pairs, threshold=0.9)
        same = [True, False] * 4
        yield "CalibratePairs", pb.CalibratePairsRequest(collection="c", pairs=pairs, same=same)
        yield "Get", pb.GetRequest(collection="c", ids=["a", "d"], with_vectors=True)

    metadata = pb.SetMetadataRequest(collection="c", ids=["a", "b", "c", "d"])
    for number in range(4):
        metadata.metadata.add().update({"k": number % 2})
    await both.collections[1].SetMetadata(metadata)
    for method, request in queries():
        owner, front = [await getattr(each, method)(request) for each in both.collections]
        assert numbers_rounded(front) == numbers_rounded(owner), method
    images = {
        (labels["process"], labels["step"]): value
        for name, labels, value in await asyncio.to_thread(samples, running.metrics_port)
        if name == "byol_images_total"
    }
    # Each embedded what came to it: nothing of the front's images has reached the owner.
    assert images["0", "inference"] == images["1", "inference"] > 0


def numbers_rounded(message: Message) -> str:
    """As text, with scores to five digits: a vector that has travelled is normalised once more."""
    number = re.compile(r"(?<=: )-?\d[\d.e+-]*")
    return number.sub(lambda found: f"{float(found[0]):.5f}", str(message))


async def test_a_front_refuses_as_the_owner_does(pair: tuple[Running, Asked]) -> None:
    _, both = pair
    await both.collections[0].CreateCollection(
        pb.CreateCollectionRequest(name="foreign", dim=16, encoder_id="another")
    )
    row = embeddings_to_tensor(reference(PIXELS[:1]))
    mine = [pb.Query(image=FILES[0])]
    bad = [pb.Query(image=FILES[0]), pb.Query(image=b"none")]
    wrong: list[tuple[str, Message]] = [
        ("Search", pb.SearchRequest(collection="none", queries=mine, k=1)),
        ("Search", pb.SearchRequest(collection="c", queries=mine, k=9)),
        ("Search", pb.SearchRequest(collection="c", queries=bad, k=1)),
        ("Search", pb.SearchRequest(collection="foreign", queries=mine, k=1)),
        ("Search", pb.SearchRequest(collection="c", queries=mine, k=1, encoder_id="x")),
        ("Search", pb.SearchRequest(collection="c", vectors=row, k=1, encoder_id="x")),
        ("Upsert", pb.UpsertRequest(collection="c", ids=["a"], images=FILES)),
        ("Upsert", pb.UpsertRequest(collection="c", ids=["a"], images=FILES[:1], vectors=row)),
        ("Upsert", pb.UpsertRequest(collection="foreign", ids=["a"], images=FILES[:1])),
        ("Upsert", pb.UpsertRequest(collection="c", ids=["a"], vectors=row, encoder_id="x")),
        ("Get", pb.GetRequest(collection="c", ids=["unknown"])),
        ("Restore", pb.RestoreRequest(backup="b", collection="c")),
    ]
    for method, request in wrong:
        owner, front = [await refused(getattr(each, method)(request)) for each in both.collections]
        assert front.code() is owner.code(), (method, request)
        assert front.details() == owner.details()
        trailers = [dict(tuple(each.trailing_metadata() or ())) for each in (owner, front)]
        for each in trailers:
            assert each.pop("x-request-id")
        assert trailers[0] == trailers[1]
    raw: Any = both.channels[1].unary_unary("/byol.v1.Collections/Search")
    assert (await refused(raw(b"\xff"))).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_request_id_goes_along(pair: tuple[Running, Asked]) -> None:
    _, both = pair
    call = both.collections[1].GetCollection(
        pb.GetCollectionRequest(name="c"), metadata=(("x-request-id", "mine-1"),)
    )
    await call
    assert (await call.trailing_metadata())["x-request-id"] == "mine-1"


async def read_all(call: Any) -> tuple[int, grpc.StatusCode]:
    """How many answers a stream had, and how it ended."""
    answers = 0
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            answers += 1
    return answers, await call.code()


async def test_streams_through_a_front(pair: tuple[Running, Asked]) -> None:
    _, both = pair
    front = both.collections[1]
    writes = [
        pb.UpsertRequest(collection="c", ids=[f"{n}"], images=[FILES[n % 4]]) for n in range(40)
    ]
    counts = [each.inserted async for each in front.UpsertStream(iter(writes))]
    assert counts == [1] * 40
    asks = [
        pb.SearchRequest(collection="c", queries=[pb.Query(image=FILES[n % 4])], k=1)
        for n in range(20)
    ]
    found = [each.results[0].hits[0].id async for each in front.SearchStream(iter(asks))]
    assert found == [f"{n % 4}" for n in range(20)]

    # What was sent before a bad request is answered, wherever the bad one is found out.
    good, own = asks[0], pb.SearchRequest(collection="c", queries=[pb.Query(id="unknown")], k=1)
    bad = pb.SearchRequest(collection="c", queries=[pb.Query(image=b"none")], k=1)
    codes = grpc.StatusCode
    for wrong, code in ((bad, codes.INVALID_ARGUMENT), (own, codes.NOT_FOUND)):
        for stub in both.collections:
            ended = await read_all(stub.SearchStream(iter([good, good, wrong, good])))
            assert ended == (2, code)


async def test_deadline_and_cancellation_go_along(pair: tuple[Running, Asked]) -> None:
    running, both = pair
    request = pb.SearchRequest(collection="c", queries=[pb.Query(image=FILES[0])], k=1)
    error = await refused(both.collections[1].Search(request, timeout=1e-4))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    upsert = pb.UpsertRequest(collection="c", ids=["a"], images=FILES[:1])

    async def one_and_wait() -> AsyncIterator[pb.UpsertRequest]:
        yield upsert
        await asyncio.Event().wait()

    stream = both.collections[1].UpsertStream(one_and_wait(), timeout=2.0)
    assert await read_all(stream) == (1, grpc.StatusCode.DEADLINE_EXCEEDED)
    call = both.collections[1].UpsertStream(one_and_wait())
    await call.read()
    call.cancel()

    def in_flight() -> float:
        return sum(
            value
            for name, _, value in samples(running.metrics_port)
            if name == "byol_requests_in_flight"
        )

    await until(lambda: in_flight() == 0)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Waits for it; `condition` may block."""
    ends = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < ends
        await asyncio.sleep(0.1)


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
    async with AsyncClient(running.address, timeout=20) as client:
        np.testing.assert_allclose(await client.embed(FILES), reference(PIXELS), atol=1e-5)
    assert (await asyncio.to_thread(get, running.metrics_port, "/readyz"))[0] == 503
    await until(lambda: get(running.metrics_port, "/readyz")[0] == 200)
    assert fronts_of(os.getpid()) not in ([], [front])
    assert "process 1 ended with status -9; starting it again in 0.5 s" in caplog.text
    async with asked(running) as anew:
        search = pb.SearchRequest(collection="c", queries=[pb.Query(image=FILES[0])], k=1)
        answer = await anew.collections[1].Search(search)
        assert answer.results[0].hits[0].id == "a"


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
        answered = [await ask(running.address, secrets[0]) for _ in range(30)]
        assert answered == [True] * 5 + [False] * 25
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
        # A front that is started again takes what is in use, which is not the newest.
        os.kill(front, signal.SIGKILL)
        await until(lambda: get(running.metrics_port, "/readyz")[0] == 503)
        await until(lambda: get(running.metrics_port, "/readyz")[0] == 200)
        async with asked(running) as anew:
            answer = await anew.embedders[1].GetEncoder(pb.GetEncoderRequest())
            assert answer.version == "v1"


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
    bundle = make_bundle(tmp_path / "slow", work=6).path
    answers: list[Any] = []

    def ask() -> None:
        with grpc.insecure_channel(running.address, ALONE) as channel:
            stub: Any = byol_pb2_grpc.EmbedderStub(channel)
            answers.append(stub.Embed(pb.EmbedRequest(images=FILES * 16), timeout=60))

    with command(bundle) as running:
        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        if group:
            os.killpg(running.process.pid, signal.SIGINT)
        else:
            running.process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(60)
        log = running.ended()
        assert running.process.returncode == 0
    assert len(answers) == 8
    rows = reference(np.concatenate([PIXELS] * 16))
    for answer in answers:
        np.testing.assert_allclose(tensor_to_vectors(answer.embeddings, ndim=2), rows, atol=1e-5)
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
