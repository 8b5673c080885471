"""Everything that touches CUDA, on an NVIDIA GPU without network: is it right, and how fast?

    python benchmarks/gpu.py --items 1,2 --json gpu.json

1 correctness against the processor; 2 training throughput; 3 the CIFAR-10 recipe; 4 serving; 5
FAISS. Every check of an item runs for itself: one that fails, or whose package is not there, says
so in its line of the table and stops no other. Item 5 is FAISS in process: our collections search
on the processor, over gRPC too (benchmarks/search.py). gpu_wheels.py brings what the machine lacks.

--device cpu --quick runs every check in tiny sizes where there is no GPU; comparisons with the GPU
are then of the processor with itself, and no figure means anything.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from gpu_parts.rows import Asked, Row

import harness

ITEMS = {
    1: ("correctness", "correctness"),
    2: ("training", "throughput"),
    3: ("CIFAR-10", "record"),
    4: ("serving", "serving_load"),
    5: ("search", "neighbours"),
}
"""Number: title, and module of gpu_parts: imported when run, since each needs other packages."""
PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime"),
    *("faiss-gpu-cuvs", "faiss-gpu", "faiss-cpu", "grpcio"),
)
Check = Callable[[Asked], list[Row]]


def main() -> int:
    """Runs, prints; 1 where a check failed or missed its aim."""
    given = options()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; give --device cpu --quick to try the script")
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="byol-gpu-") as scratch:
        asked = Asked(
            device=given.device,
            quick=given.quick,
            record_seconds=given.record_seconds,
            scratch=Path(scratch),
        )
        for item in given.items:
            title, module = ITEMS[item]
            found[f"{item} {title}"] = run_item(module, asked)
            # After every item: a lease may end before the last.
            report(found, given)
    rows = [row for rows in found.values() for row in rows]
    return int(any(row.met is False for row in rows))


def options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=numbers, default=list(ITEMS), help="like 1,2; all if left")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only that it works")
    parser.add_argument("--record-seconds", type=float, default=0.0, help="a longer run of item 3")
    parser.add_argument("--json", type=Path, help="file to write: rows, machine, versions, command")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """The items of 1,2,5."""
    chosen = [int(part) for part in text.split(",")]
    if unknown := [item for item in chosen if item not in ITEMS]:
        raise argparse.ArgumentTypeError(f"no item {unknown[0]}; there are 1 to {len(ITEMS)}")
    return chosen


def run_item(module: str, asked: Asked) -> list[Row]:
    """All checks of a part; one row that says why where the part cannot be imported."""
    found: dict[str, Check] = {}

    def load(asked: Asked) -> list[Row]:
        found.update(importlib.import_module(f"gpu_parts.{module}").CHECKS)
        return []

    rows = guarded(module, load, asked)
    rows += [row for name, check in found.items() for row in guarded(name, check, asked)]
    if asked.quick and module != "correctness":  # tiny sizes meet or miss nothing
        rows = [row if row.value is None else replace(row, aim="", met=None) for row in rows]
    return rows


def guarded(name: str, check: Check, asked: Asked) -> list[Row]:
    """The rows of a check, or one that says why there are none."""
    print(f"gpu: {name} ...", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        rows = check(asked)
    except ImportError as error:
        rows = [Row(what=name, value=None, note=f"not run: {error}")]
    except (Exception, SystemExit) as error:  # whatever it is, the next check is to run
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        rows = [Row(what=name, value=None, met=False, note=f"failed: {reason}")]
    print(f"gpu: {name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return rows


def report(found: dict[str, list[Row]], given: argparse.Namespace) -> None:
    """Prints the table, and writes the JSON where it was asked for."""
    facts = {
        "machine": harness.machine(),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "versions": versions(),
        "command": " ".join(sys.argv),
        "quick": given.quick,
    }
    print(f"\n{facts['device']}; {facts['machine']}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    if given.quick:
        print("--quick: tiny sizes, no figure means anything")
    for title, rows in found.items():
        print(f"\n{title}")
        for row in rows:
            print("  " + line(row))
    if given.json:
        items = {title: [asdict(row) for row in rows] for title, rows in found.items()}
        given.json.write_text(json.dumps(facts | {"items": items}, indent=1) + "\n")


def line(row: Row) -> str:
    """A row of the table."""
    value = "-" if row.value is None else f"{row.value:,.4g}" if abs(row.value) < 100 else ""
    value = value or f"{row.value:,.0f}"
    verdict = {None: "", True: "met", False: "MISSED" if row.value is not None else "FAILED"}
    aim = f"{row.aim} {verdict[row.met]}".strip()
    return f"{row.what:62} {value:>12} {row.unit:10} {aim:18} {row.note}".rstrip()


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
