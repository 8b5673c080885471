"""Our server in a process of its own, and what it takes in a second."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from byol_serving.client import Client
from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.pb.byol.v1 import byol_pb2_grpc
from byol_serving.rpc.convert import embeddings_to_tensor
from harness import Rate
from search_data import Vectors

_PER_REQUEST = 1000
_SERVE = """
import sys
from pathlib import Path
from byol_serving.config import ServeConfig
from byol_serving.server import run_server
config = ServeConfig(store=Path(sys.argv[1]), port=0, index_gpu_memory=int(sys.argv[2]))
sys.exit(run_server(config, lambda address: print(address, flush=True)))
"""


class Server:
    """`byol serve` on a store."""

    def __init__(self, store: Path, *, index_gpu_memory: int = 0) -> None:
        """Returns once it is ready."""
        command = [sys.executable, "-c", _SERVE, str(store), str(index_gpu_memory)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def memory_mb(self) -> int:
        """Resident memory now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (each for each in status.splitlines() if each.startswith("VmRSS"))
        return int(line.split()[1]) // 1024

    def __enter__(self) -> Self:
        """The server itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it; the store is a copy."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def durable_inserts(address: str, vectors: Vectors, repeats: int) -> Rate:
    """Items a second through one UpsertStream, each request acknowledged when it is on disk."""
    rates = []
    with (
        Client(address) as client,
        grpc.insecure_channel(address) as channel,
    ):
        stub = byol_pb2_grpc.CollectionsStub(channel)
        for number in range(repeats):
            name = f"inserts-{number}"
            client.create_collection(name, dim=vectors.shape[1], encoder_id="bench")
            requests = list(_requests(name, vectors))
            started = time.perf_counter()
            inserted = sum(answer.inserted for answer in stub.UpsertStream(iter(requests)))
            rates.append(inserted / (time.perf_counter() - started))
            assert inserted == len(vectors)
            client.drop_collection(name)
    return Rate("items/s", tuple(rates))


def _requests(name: str, vectors: Vectors) -> Iterator[pb.UpsertRequest]:
    for start in range(0, len(vectors), _PER_REQUEST):
        part = vectors[start : start + _PER_REQUEST]
        yield pb.UpsertRequest(
            collection=name,
            ids=[f"item-{start + n}" for n in range(len(part))],
            vectors=embeddings_to_tensor(part),
        )
