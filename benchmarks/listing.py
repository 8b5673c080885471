"""Files listed a second: a folder tree of 1,000,000 images (20,000 with --quick), of empty files.

`ours` gives sorted names; `with times` also the size and time of change of each, by which a cache
of decoded images is known again. `scandir` is the limit: names alone, in no order. `torchvision` is
how ImageFolder lists, which most training code starts with; it needs class folders.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from byol_training.sources import list_source, stamp
from harness import interleaved, options, report

PER_FOLDER = 1000


def main() -> None:
    """Makes the tree, measures, prints."""
    chosen = options(__doc__ or "")
    count, repeats = (20_000, 3) if chosen.quick else (1_000_000, 3)
    with tempfile.TemporaryDirectory() as scratch:
        make_tree(Path(scratch), count)
        candidates: dict[str, Callable[[], int]] = {
            "ours": lambda: len(list_source(Path(scratch)).names),
            "with times": lambda: stamped(Path(scratch)),
            "scandir": lambda: scandir(scratch),
        }
        if chosen.peers:
            candidates["torchvision"] = lambda: image_folder(scratch)
        timed = {name: rate_of(listed, count) for name, listed in candidates.items()}
        results = interleaved(timed, unit="files/s", repeats=repeats)
    ours = results["ours"].median
    others = results.keys() - {"ours", "with times"}
    ratios = {f"ours_vs_{name}": ours / results[name].median for name in sorted(others)}
    ratios["seconds_for_a_million"] = 1e6 / ours
    facts = {"files": count, "in folders of": PER_FOLDER}
    report("listing", chosen, results, ratios, packages=["torchvision"], facts=facts)


def make_tree(root: Path, count: int) -> None:
    """`count` empty files in sub-folders."""
    for folder in range(count // PER_FOLDER):
        inside = f"{root}/{folder:05d}"
        os.mkdir(inside)  # noqa: PTH102 - as below
        for number in range(PER_FOLDER):
            # No Path: a million of them would take longer than the files.
            os.close(os.open(f"{inside}/{number:06d}.jpg", os.O_CREAT | os.O_WRONLY))


def rate_of(listed: Callable[[], int], count: int) -> Callable[[], float]:
    """Files a second, when called."""

    def measure() -> float:
        started = time.perf_counter()
        found = listed()
        seconds = time.perf_counter() - started
        if found != count:
            raise SystemExit(f"{found} of {count} files were listed")
        return count / seconds

    return measure


def stamped(root: Path) -> int:
    """How many names a cache's key is made of."""
    listing = list_source(root)
    stamp(listing)
    return len(listing.names)


def scandir(root: str) -> int:
    """How many names there are."""
    return sum(len(files) for _, _, files in os.walk(root))


def image_folder(root: str) -> int:
    """How many samples torchvision finds."""
    _, classes = find_classes(root)
    return len(make_dataset(root, classes, extensions=IMG_EXTENSIONS))


if __name__ == "__main__":
    main()
