"""The crash test at length: python tests/serving/collections/crash/run.py --kills 200"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[4]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "serving")]

from serving.collections.crash.checking import BrokenPromise, Run  # noqa: E402  needs the paths
from serving.collections.crash.migrating import kill_migrations  # noqa: E402


def main() -> None:
    """Kills as often as asked, then shows that the check would have seen a broken promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many times (200)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run's random moments")
    given = parser.parse_args()
    seed = random.randrange(2**32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "store", random.Random(seed))
        for _ in range(given.kills):
            run.round()
            print(f"\r{run.kills} kills, {run.changes:,} changes kept", end="", flush=True)
        print(f"\nkilled at: {run.moments}")
        kills, early = kill_migrations(Path(folder), random.Random(seed), max(5, given.kills // 10))
        print(f"{kills} kills while migrating, {early} of them before it was done: all kept")
        print(f"negative control, acknowledging before commit: {control(Path(folder), seed)}")


def control(folder: Path, seed: int) -> str:
    """Kills a writer that acknowledges too early until the check sees it."""
    run = Run(folder / "control", random.Random(seed), early=True)
    for _ in range(50):
        try:
            run.round()
        except BrokenPromise as seen:
            return f"seen at kill {run.kills} ({seen})"
    raise SystemExit("the negative control was not seen in 50 kills: this test proves nothing")


if __name__ == "__main__":
    main()
