"""Our server under Triton's perf_analyzer, beside our own clients, in turn on the same server.

JPEGs of 32 pixels and a tiny encoder, so that server and clients are what is measured: ours sends
byol.v1 Embed, perf_analyzer the Open Inference Protocol's ModelInfer with BYTES inputs; both keep
the same number of requests in flight. perf_analyzer is in the bin folder of tritonclient 2.41 (the
last that fits our grpcio), or where PERF_ANALYZER says; the libraries that it lacks are among
nvidia-pytriton's.
"""

import base64
import csv
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from load_material import Load, small_images, tiny_encoder, write_images
from load_servers import ours

from harness import PEER_PYTHON, Rate, options, report

IN_FLIGHT = 32
AGREEMENT = 50
"""Percent by which its three last windows may differ; on a busy machine its own 10 never come."""
BINARY = Path(os.environ.get("PERF_ANALYZER", Path(sys.executable).parent / "perf_analyzer"))
LIBRARIES = {"libb64-*": "libb64.so.0d", "libcudart-*": "libcudart.so.12"}


def main() -> None:
    """Measures and prints."""
    chosen = options(__doc__ or "")
    rounds, seconds = (1, 1.0) if chosen.quick else (5, 4.0)
    rates: dict[str, list[float]] = {"ours": [], "perf_analyzer": []}
    tails: dict[str, list[float]] = {"ours": [], "perf_analyzer": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        environment = libraries(scratch)
        run(["--version"], environment)  # it should fail before a server is started
        files = small_images(256)
        bundle = tiny_encoder(scratch / "tiny", 32)
        load = Load("tiny", bundle, write_images(scratch / "jpeg", files))
        inputs = write_inputs(scratch / "inputs.json", files)
        server = ours(load, scratch)
        try:
            for number in range(rounds + 1):  # the first warms up and is not counted
                window = server.window(IN_FLIGHT, seconds)
                rate, tail = analyze(bundle.info.name, server.address, inputs, seconds, environment)
                if number:
                    rates["ours"].append(window.images_per_s)
                    tails["ours"].append(window.p99_ms)
                    rates["perf_analyzer"].append(rate)
                    tails["perf_analyzer"].append(tail)
        finally:
            server.stop()
    results = {f"by {name}": Rate("images/s", tuple(values)) for name, values in rates.items()}
    results |= {f"p99 by {name}": Rate("ms", tuple(values)) for name, values in tails.items()}
    ours_rate, theirs = (results[f"by {name}"].median for name in rates)
    report(
        "perf_analyzer",
        chosen,
        results,
        {"perf_analyzer_vs_ours": theirs / ours_rate},
        packages=["onnxruntime", "grpcio", "tritonclient"],
        facts={"in flight": IN_FLIGHT, "rounds": rounds},
    )


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


def write_inputs(path: Path, files: list[bytes]) -> Path:
    """Its input data: elements of BYTES follow their length, as in the protocol's raw contents."""
    elements = (struct.pack("<I", len(data)) + data for data in files)
    steps = [{"images": {"b64": base64.b64encode(each).decode()}} for each in elements]
    path.write_text(json.dumps({"data": steps}))
    return path


def analyze(
    model: str, address: str, inputs: Path, seconds: float, environment: dict[str, str]
) -> tuple[float, float]:
    """Inferences a second and the 99th percentile in ms, once three windows agree."""
    out = inputs.with_suffix(".csv")
    words = ["-m", model, "-u", address, "-i", "grpc", "--input-data", str(inputs)]
    words += ["--shape", "images:1", "--concurrency-range", str(IN_FLIGHT), "-f", str(out)]
    words += ["--measurement-interval", str(round(seconds * 1000))]
    run([*words, "--stability-percentage", str(AGREEMENT)], environment)
    with out.open() as file:
        (row,) = csv.DictReader(file)
    return float(row["Inferences/Second"]), float(row["p99 latency"]) / 1000


if __name__ == "__main__":
    main()
