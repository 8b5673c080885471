"""Our server and Triton under Triton's perf_analyzer, whose clients are C++.

JPEGs of 32 pixels and a tiny encoder, so that server and clients are what is measured: to both
servers it sends the Open Inference Protocol's ModelInfer with the same files as BYTES, in turn.
Beside it our server is asked by the clients of serve_load.py, which are Python and cost more. With
--no-peers Triton is left out. perf_analyzer is in the bin folder of tritonclient 2.41 (the last
that fits our grpcio), or where PERF_ANALYZER says; the libraries that it lacks are among
nvidia-pytriton's.
"""

import base64
import csv
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from load_material import Load, small_images, tiny_encoder, write_images
from load_servers import Server, ours, peer

from harness import PEER_PYTHON, Rate, congestion_control, options, report

CLIENTS = (8, 32, 128)
AGREEMENT = 50
"""Percent by which its three last windows may differ; on a busy machine its own 10 never come."""
BINARY = Path(os.environ.get("PERF_ANALYZER", Path(sys.executable).parent / "perf_analyzer"))
LIBRARIES = {"libb64-*": "libb64.so.0d", "libcudart-*": "libcudart.so.12"}


@dataclass(frozen=True)
class Target:
    """A server, and how perf_analyzer asks it."""

    server: Server
    model: str
    inputs: Path
    more: Sequence[str] = ()
    """Arguments beside those that all have."""


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    rounds, seconds = (1, 1.0) if chosen.quick else (5, 2.0)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        environment = libraries(scratch)
        run(["--version"], environment)  # it should fail before a server is started
        targets = started(scratch, stack, peers=chosen.peers)
        rates = measured(targets, rounds, seconds, environment)
    ratios = {}
    for clients in CLIENTS:
        asked = rates[f"ours, {clients} clients"]
        own = rates[f"ours, {clients} clients in Python"]
        ratios[f"perf_analyzer_vs_python_clients_{clients}"] = ratio(asked, own)
        if theirs := rates.get(f"pytriton, {clients} clients"):
            ratios[f"vs_pytriton_{clients}"] = ratio(asked, theirs)
    report(
        "perf_analyzer",
        chosen,
        {
            name: Rate("ms" if name.endswith("p99") else "images/s", tuple(values))
            for name, values in rates.items()
        },
        ratios,
        packages=["onnxruntime", "grpcio", "tritonclient"],
        facts={"rounds": rounds, "seconds": seconds, "TCP": congestion_control()},
    )


def measured(
    targets: dict[str, Target], rounds: int, seconds: float, environment: dict[str, str]
) -> dict[str, list[float]]:
    """Rates and 99th percentiles by what was measured; the first round is not counted."""
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for label, target in targets.items():
            for clients in CLIENTS:
                with target.server.awake():
                    rate, tail = analyze(target, clients, seconds, environment)
                if number:
                    found.setdefault(f"{label}, {clients} clients", []).append(rate)
                    found.setdefault(f"{label}, {clients} clients, p99", []).append(tail)
        for clients in CLIENTS:
            with targets["ours"].server.awake() as server:
                window = server.window(clients, seconds)
            if number:
                own = found.setdefault(f"ours, {clients} clients in Python", [])
                own.append(window.images_per_s)
    return found


def started(scratch: Path, stack: ExitStack, *, peers: bool) -> dict[str, Target]:
    """The servers, asleep."""
    files = small_images(256)
    bundle = tiny_encoder(scratch / "tiny", 32)
    load = Load("tiny", bundle, write_images(scratch / "jpeg", files))
    inputs = write_inputs(scratch / "ours.json", "images", files)
    shape = ["--shape", "images:1"]  # of any number of images, which it wants to be told
    targets = {"ours": Target(ours(load, scratch), bundle.info.name, inputs, shape)}
    stack.callback(targets["ours"].server.stop)
    if peers:
        inputs = write_inputs(scratch / "pytriton.json", "image", files)
        targets["pytriton"] = Target(peer("pytriton", load, scratch), "embed", inputs)
        stack.callback(targets["pytriton"].server.stop)
    for target in targets.values():
        target.server.sleep()
    return targets


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds, each compared within itself."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def libraries(scratch: Path) -> dict[str, str]:
    """The environment in which perf_analyzer finds what it is linked with."""
    folder = scratch / "libraries"
    folder.mkdir()
    peers = PEER_PYTHON.parents[1]
    for pattern, name in LIBRARIES.items():
        for found in peers.glob(f"lib/python*/site-packages/nvidia_pytriton.libs/{pattern}"):
            (folder / name).symlink_to(found.resolve())
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def run(words: list[str], environment: dict[str, str]) -> None:
    """Runs perf_analyzer; ends the benchmark with the reason where that does not work."""
    try:
        found = subprocess.run(
            [str(BINARY), *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=600,
        )
    except OSError as error:
        raise SystemExit(f"{BINARY} cannot be run: {error.strerror}") from error
    if found.returncode:
        raise SystemExit(f"{BINARY} failed: {found.stderr.strip() or found.stdout.strip()}")


def write_inputs(path: Path, name: str, files: list[bytes]) -> Path:
    """Its input data: elements of BYTES follow their length, as in the protocol's raw contents."""
    elements = (struct.pack("<I", len(data)) + data for data in files)
    steps = [{name: {"b64": base64.b64encode(each).decode()}} for each in elements]
    path.write_text(json.dumps({"data": steps}))
    return path


def analyze(
    target: Target, clients: int, seconds: float, environment: dict[str, str]
) -> tuple[float, float]:
    """Inferences a second and the 99th percentile in ms, once three windows agree."""
    out = target.inputs.with_suffix(".csv")
    words = ["-m", target.model, "-u", target.server.address, "-i", "grpc", *target.more]
    words += ["--input-data", str(target.inputs), "--concurrency-range", str(clients)]
    words += ["--measurement-interval", str(round(seconds * 1000)), "-f", str(out)]
    run([*words, "--stability-percentage", str(AGREEMENT)], environment)
    with out.open() as file:
        (row,) = csv.DictReader(file)
    return float(row["Inferences/Second"]), float(row["p99 latency"]) / 1000


if __name__ == "__main__":
    main()
