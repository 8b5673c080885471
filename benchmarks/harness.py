"""What every benchmark shares: options, interleaved repeats, peers, output."""

import argparse
import importlib.metadata
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
PEER_PYTHON = Path(os.environ.get("PEER_PYTHON", HERE.parent / ".venv-peers" / "bin" / "python"))
"""The peers' environment; the variable of the same name chooses another."""
CLIP_PYTHON = Path(os.environ.get("CLIP_PYTHON", HERE.parent / ".venv-clip" / "bin" / "python"))
"""That of clip-retrieval, whose requirements exclude other peers'."""


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    quick: bool
    json: bool
    peers: bool
    given: argparse.Namespace = field(default_factory=argparse.Namespace)
    """All of it, with what only this benchmark has."""


@dataclass(frozen=True)
class Rate:
    """Repeated measurements of one thing; larger is better."""

    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.values)


def options(
    description: str, more: Callable[[argparse.ArgumentParser], object] | None = None
) -> Options:
    """Reads the command line that every benchmark has, and what `more` adds to it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--no-peers", action="store_true", help="ours and the raw limit only")
    if more is not None:
        more(parser)
    given = parser.parse_args()
    return Options(given.quick, given.json, not given.no_peers, given)


def interleaved(
    candidates: Mapping[str, Callable[[], float]], *, unit: str, repeats: int
) -> dict[str, Rate]:
    """Runs the candidates in turn, A B C A B C ..., so that a machine that drifts drifts for all.

    The first round warms up and is not counted.
    """
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(repeats + 1):
        for name, measure in candidates.items():
            value = measure()
            if number > 0:
                values[name].append(value)
    return {name: Rate(unit, tuple(each)) for name, each in values.items()}


def report(
    benchmark: str,
    chosen: Options,
    results: Mapping[str, Rate],
    ratios: Mapping[str, float],
    *,
    packages: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Prints the table, and with --json the object on the last line."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(f"\n{benchmark}: {', '.join(f'{key} {value}' for key, value in facts.items())}")
    print(f"{machine()}; {', '.join(f'{name} {v}' for name, v in versions.items())}\n")
    width = max(map(len, [*results, *ratios]))
    for name, rate in results.items():
        low, high = min(rate.values), max(rate.values)
        print(f"  {name:{width}}  {rate.median:12,.1f} {rate.unit}  ({low:,.1f} .. {high:,.1f})")
    print()
    for name, ratio in ratios.items():
        print(f"  {name:{width}}  {ratio:.3f}")
    if chosen.json:
        found = {
            "benchmark": benchmark,
            "machine": machine(),
            "versions": versions,
            "facts": dict(facts),
            "results": {
                name: {"median": r.median, "values": r.values, "unit": r.unit}
                for name, r in results.items()
            },
            "ratios": dict(ratios),
            "command": " ".join(sys.argv),
        }
        print(json.dumps(found))


def machine() -> str:
    """Processor, how many of them, Python, and how fast that is built: builds differ by a fifth."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), name)
    python = f"Python {platform.python_version()} (a call takes {python_call_ns():.0f} ns)"
    return f"{len(os.sched_getaffinity(0))} x {name}, {python}"


def congestion_control() -> str:
    """Of the system's TCP: with BBR, photographs over loopback are 5% fewer than with CUBIC."""
    setting = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return setting.read_text().strip() if setting.exists() else "unknown"


def python_call_ns() -> float:
    """Of a function that adds 1, with its loop."""
    count = 100_000
    loop = timeit.Timer(
        "for each in many: add(each)", "def add(x): return x + 1", globals={"many": range(count)}
    )
    return 1e9 * min(loop.repeat(5, number=1)) / count


class Peer:
    """A peer's script in .venv-peers, kept running so that it can be measured in turn with ours.

    It reads one JSON object a line and answers with one; benchmarks/peers/ holds the scripts.
    """

    def __init__(
        self,
        script: str,
        *,
        python: Path = PEER_PYTHON,
        patience: float | None = None,
        **setup: Any,
    ) -> None:
        """Raises TimeoutError, and ends it, where its setup takes more than `patience` seconds."""
        if not python.exists():
            raise SystemExit("peers are not installed: run make bench-peers, or give --no-peers")
        self._process = subprocess.Popen(
            [str(python), str(HERE / "peers" / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send(setup)
        assert self._process.stdout is not None
        if patience is not None and not select.select([self._process.stdout], [], [], patience)[0]:
            self.__exit__(None, None, None)
            raise TimeoutError(f"not ready within {patience:.0f} s")
        self.setup = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        self._send(request)
        return self._answer()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a peer ended early: exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        """The peer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
