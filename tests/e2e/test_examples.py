"""The examples for clients, run as they stand, and the commands of docs/clients.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from byol_serving.config import ServeConfig
from byol_serving.pb.byol.v1 import admin_pb2, byol_pb2
from serving.rpc.conftest import ServerThread
from serving.support import make_bundle, png, random_pixels, reference

ROOT = Path(__file__).parents[2]
CLIENTS = (ROOT / "docs" / "clients.md").read_text()
PIXELS = random_pixels(3)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("examples")
    bundle = make_bundle(folder / "tiny").path
    server = ServerThread(ServeConfig(bundle=bundle, store=folder / "store", port=0))
    yield server.address
    server.stop()


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    for number, pixels in enumerate(PIXELS):
        (tmp_path / f"{number}.png").write_bytes(png(pixels))
    return [str(tmp_path / f"{number}.png") for number in range(len(PIXELS))]


def run(*words: str, **environment: str) -> str:
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python(address: str, photos: list[str]) -> None:
    said = run(sys.executable, str(ROOT / "examples" / "python" / "client.py"), address, *photos)
    assert "embedded (3, 16) float32" in said
    assert "streamed 100" in said
    assert "feature map doubled (2, 3, 4, 4) stride 8" in said
    assert f"1.000 {photos[0]}" in said
    assert "refused: image 1: not an image file" in said


def test_node(address: str, photos: list[str]) -> None:
    folder = ROOT / "examples" / "node"
    if shutil.which("node") is None:
        pytest.skip("needs node")
    if not (folder / "node_modules").exists():
        pytest.skip("needs npm install in examples/node")
    first, second = run("node", str(folder / "client.mjs"), address, *photos).splitlines()
    seen, wanted = json.loads(first), reference(PIXELS)
    assert (seen["model"], seen["dim"], seen["count"]) == ("tiny", 16, 3)
    assert seen["cosine"] == pytest.approx(float(wanted[0] @ wanted[2]), abs=1e-4)
    refused = json.loads(second)
    assert refused["code"] == 3
    assert refused["refused"].startswith("image 3: not an image file")


def test_the_grpcurl_commands_call_what_exists() -> None:
    methods = {
        f"{service.full_name}/{method.name}": method
        for file in (byol_pb2, admin_pb2, health_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    commands = re.findall(r"grpcurl .*-d '(.*)' \S+ (\S+/\S+)", CLIENTS)
    assert len(commands) >= 5
    for data, name in commands:
        request = GetMessageClass(methods[name].input_type)()
        json_format.Parse(re.sub(r"'\$\(.*?\)'", "aGVsbG8=", data), request)


def test_the_triton_example_is_that_of_the_protocol() -> None:
    assert 'triton.InferInput("images", [len(files)], "BYTES")' in CLIENTS
    assert 'as_numpy("embedding")' in CLIENTS
    for name in re.findall(r"\]\(\.\./((?!https?:)[^)#]+)\)", CLIENTS):
        assert (ROOT / name).exists(), name
