"""Calls a second of gRPC's core and of grpc.aio's server, for several versions of grpcio.

Each version is installed into an environment of its own and answers thumbnails there with a
constant (bare_server.py); the clients are the same for all, 32 with a connection each. Our server
is built on the core, our clients use grpc.aio. pyproject.toml pins the line that wins here.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from load_material import Load, small_images, tiny_encoder, write_images
from load_servers import bare

from harness import Options, Rate, report

VERSIONS = ("1.78.0", "1.80.0", "1.83.0", "1.85.1")
QUICK_VERSIONS = ("1.78.0", "1.85.1")
KINDS = ("core", "aio")
CLIENTS = 32


def main() -> None:
    """Installs, measures in turn, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two versions, short windows")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--versions", help="comma-separated, instead of the usual ones")
    given = parser.parse_args()
    versions = QUICK_VERSIONS if given.quick else VERSIONS
    if given.versions:
        versions = tuple(given.versions.split(","))
    rounds, seconds = (2, 1.0) if given.quick else (7, 3.0)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        scratch = Path(name)
        images = write_images(scratch / "small", small_images(256))
        load = Load("tiny", tiny_encoder(scratch / "tiny32", 32), images)
        servers = {}
        for version in versions:
            python = installed(version, scratch / version)
            for kind in KINDS:
                server = bare(load, scratch / version, kind=kind, python=python)
                stack.callback(server.stop)
                server.sleep()
                servers[f"{kind} {version}"] = server
        for number in range(rounds + 1):
            for label, server in servers.items():
                with server.awake():
                    window = server.window(CLIENTS, seconds)
                if number:
                    rates.setdefault(label, []).append(window.images_per_s)
    results = {label: Rate("calls/s", tuple(values)) for label, values in rates.items()}
    ratios: dict[str, float] = {}
    for kind in KINDS:
        medians = {version: results[f"{kind} {version}"].median for version in versions}
        best = max(medians.values())
        ratios |= {f"{kind}_{version}_vs_best": rate / best for version, rate in medians.items()}
    report(
        "grpc_versions",
        Options(quick=given.quick, json=given.json, peers=True),
        results,
        ratios,
        packages=["uvloop"],
        facts={"clients": CLIENTS},
    )


def installed(version: str, folder: Path) -> Path:
    """The Python of a new environment with this version of grpcio."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*map(str, install), f"grpcio=={version}", "uvloop"], check=True)
    found = subprocess.check_output(
        [str(python), "-c", "import grpc; print(grpc.__version__)"], text=True
    ).strip()
    if found != version:
        raise SystemExit(f"asked for grpcio {version}, and {found} runs")
    return python


if __name__ == "__main__":
    main()
