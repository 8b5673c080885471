"""Empty unary calls a second of grpc.aio, for several versions of grpcio.

Each version is installed into an environment of its own and serves and calls itself over loopback:
one process of each, 32 calls at a time, uvloop. pyproject.toml pins the line that wins here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Options, Rate, report

VERSIONS = ("1.76.0", "1.78.0", "1.80.0", "1.83.0", "1.85.1")
QUICK_VERSIONS = ("1.78.0", "1.85.1")

SCRIPT = """
import asyncio, json, multiprocessing, sys, time
import grpc, uvloop

METHOD, CLIENTS = "/empty.Empty/Call", 32

async def serve(pipe):
    async def call(request, context):
        return b""
    handler = grpc.unary_unary_rpc_method_handler(call)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("empty.Empty", {"Call": handler}),))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await asyncio.Event().wait()

def serve_process(pipe):
    uvloop.install()
    asyncio.run(serve(pipe))

async def load(port, seconds):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call, done = channel.unary_unary(METHOD), 0
        ends = time.perf_counter() + seconds
        async def client():
            nonlocal done
            while time.perf_counter() < ends:
                await call(b"")
                done += 1
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done / seconds

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve_process, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    uvloop.install()
    print(json.dumps({"version": grpc.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asyncio.run(load(port, float(line)))), flush=True)
    server.kill()
"""


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
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "empty_calls.py"
        script.write_text(SCRIPT)
        running = {version: start(version, Path(scratch), script) for version in versions}
        try:
            rates: dict[str, list[float]] = {version: [] for version in versions}
            for number in range(rounds + 1):
                for version, process in running.items():
                    rate = float(ask(process, f"{seconds}\n"))
                    if number:
                        rates[version].append(rate)
        finally:
            for process in running.values():
                process.communicate()  # the end of its input ends it, and its server
    results = {name: Rate("calls/s", tuple(values)) for name, values in rates.items()}
    best = max(results, key=lambda name: results[name].median)
    ratios = {
        f"{name}_vs_best": rate.median / results[best].median for name, rate in results.items()
    }
    report(
        "grpc_versions",
        Options(quick=given.quick, json=given.json, peers=True),
        results,
        ratios,
        packages=["grpcio", "uvloop"],
        facts={"best": best, "clients": 32},
    )


def start(version: str, scratch: Path, script: Path) -> "subprocess.Popen[str]":
    """An environment with this version, and the script running in it."""
    folder = scratch / version
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*map(str, install), f"grpcio=={version}", "uvloop"], check=True)
    process = subprocess.Popen(
        [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(ask(process, ""))["version"]
    if found != version:
        raise SystemExit(f"asked for grpcio {version}, and {found} runs")
    return process


def ask(process: "subprocess.Popen[str]", line: str) -> str:
    """Writes a line, if there is one, and reads one."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"a version's process ended early: exit code {process.wait()}")
    return answer


if __name__ == "__main__":
    main()
