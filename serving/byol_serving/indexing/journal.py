"""Which shards are finished, on disk beside the output: what makes a run resumable.

    OUT/part-00000.*                   the rows, where the sink writes files
    OUT/_byol/manifest.json            encoder, source, shard size, ids, output, columns: must not
                                       change
    OUT/_byol/journal/part-00000.jsonl one line an entry of a finished shard, in source order
    OUT/_byol/rejected.jsonl           path and reason, made anew at the end of each run
    OUT/_byol/next/                    shards of an unfinished sync, and COMMIT once it is whole

Readers of Parquet folders pass over names that begin with `_`, so OUT as a whole is a data set.

A shard's record is renamed into place after its rows are on disk, so a record means rows. A sync
shifts entries between shards while it still reads old ones, so it writes to next/ and then moves
everything at once: COMMIT is the point of no return, and what it began is completed at next open.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from byol_serving.collections.disk import sync
from byol_serving.errors import (
    EncoderMismatch,
    InvalidConfig,
    StoreCorrupt,
    StoreError,
    StoreLocked,
)
from byol_serving.indexing.durable import write_durably
from byol_serving.indexing.entries import Entry

State = Literal["ok", "rejected", "duplicate"]
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one entry."""

    name: str
    fingerprint: str
    state: State
    text: str
    """The id, or why it was rejected."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What all runs into one output folder have in common."""

    encoder_id: str
    source: str
    shard_size: int
    ids: str
    output: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    """See `Columns.facts`; absent from older files, which held none."""


class Journal:
    """The records of one output folder, held by one process at a time."""

    def __init__(self, out: Path, manifest: Manifest) -> None:
        """Opens or begins a journal, and completes a sync that was being committed.

        Raises:
            StoreLocked: another run writes there.
            StoreError: the folder cannot be made or written.
            EncoderMismatch: it was begun with another encoder.
            InvalidConfig: it was begun with another source, shard size, kind of ids, output or
                columns.
            StoreCorrupt: the manifest is not one.
        """
        self._out = out
        self.state = out / "_byol"
        """Folder of everything but the rows."""
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.state)
        except OSError as error:
            raise StoreError(f"{out} cannot be written ({error.strerror or error})") from error
        try:
            self._check(manifest)
            self._roll_forward()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Lets the next run in."""
        self._lock.close()

    def vectors(self, *, staged: bool = False) -> Path:
        """Folder of the shards' rows."""
        return self.state / "next" / "vectors" if staged else self._out

    def record(self, number: int, *, staged: bool = False) -> list[Line] | None:
        """The lines of a finished shard, or None; raises StoreCorrupt."""
        path = self._record_path(number, staged)
        try:
            with path.open(encoding="utf-8") as file:
                return [Line(*json.loads(text)) for text in file]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise StoreCorrupt(f"{path} is damaged; delete it: its shard is made again") from error

    def records(self) -> Iterator[tuple[int, list[Line]]]:
        """All finished shards, in order; what is staged is left out."""
        for number in _numbers(self.state / "journal"):
            if (lines := self.record(number)) is not None:
                yield number, lines

    def finish(self, number: int, lines: Sequence[Line], *, staged: bool) -> None:
        """Records a shard whose rows are on disk. Thread-safe for different shards."""

        def write(path: Path) -> None:
            rows = ([line.name, line.fingerprint, line.state, line.text] for line in lines)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        write_durably(self._record_path(number, staged), write)

    def drop_staged_from(self, number: int) -> None:
        """Forgets what an unfinished sync made from this shard on: the source changed since."""
        for folder in (self.state / "next" / "journal", self.state / "next" / "vectors"):
            _truncate(folder, number)

    def commit(self, shards: int, *, staged: bool) -> None:
        """Makes the output exactly `shards` shards, the staged ones in place of the old."""
        if staged:
            commit = self.state / "next" / "COMMIT"
            write_durably(commit, lambda path: _write(path, f"{shards}\n"))
        self._roll_forward()

    def write_rejected(self, *, some: bool) -> Path:
        """Makes rejected.jsonl from the records (none are read unless `some`); where it is."""

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8") as file:
                for _, lines in self.records() if some else ():
                    for line in lines:
                        if line.state == "rejected":
                            fact = {"path": line.name, "reason": line.text}
                            file.write(json.dumps(fact) + "\n")

        path = self.state / "rejected.jsonl"
        write_durably(path, write)
        return path

    def _record_path(self, number: int, staged: bool) -> Path:
        folder = self.state / "next" if staged else self.state
        return folder / "journal" / f"{part_name(number)}.jsonl"

    def _roll_forward(self) -> None:
        """Completes a committed sync; each step may be repeated."""
        staging = self.state / "next"
        try:
            shards = int((staging / "COMMIT").read_text())
        except FileNotFoundError:
            return
        targets = {"vectors": self._out, "journal": self.state / "journal"}
        for kind, target in targets.items():  # rows before records, as ever
            target.mkdir(exist_ok=True)
            for file in sorted((staging / kind).glob("part-*")):
                file.replace(target / file.name)
            _truncate(target, shards)
            sync(target)
        shutil.rmtree(staging)

    def _check(self, wanted: Manifest) -> None:
        path = self.state / "manifest.json"
        if not path.exists():
            if _numbers(self.state / "journal"):
                raise StoreCorrupt(f"{path} is missing beside a journal; choose another output")
            text = json.dumps({"format": FORMAT, **vars(wanted)}, indent=2) + "\n"
            write_durably(path, lambda scratch: _write(scratch, text))
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version = found.pop("format")
        except (ValueError, KeyError, AttributeError) as error:
            raise StoreCorrupt(f"{path} is damaged; choose another output") from error
        if version != FORMAT:
            raise InvalidConfig(f"{path} has format {version}, this version writes {FORMAT}")
        for key, value in vars(wanted).items():
            if found.get(key, {} if key == "columns" else None) != value:
                mismatch = EncoderMismatch if key == "encoder_id" else InvalidConfig
                raise mismatch(
                    f"{self._out} was begun with {key} {found.get(key)}, not {value};"
                    " go on with that, or choose another output"
                )


def part_name(number: int) -> str:
    """part-00000, without suffix."""
    return f"part-{number:05d}"


def matches(lines: Sequence[Line], entries: Sequence[Entry]) -> bool:
    """Whether a record is of exactly these entries."""
    return len(lines) == len(entries) and all(
        line.name == entry.name and line.fingerprint == entry.fingerprint
        for line, entry in zip(lines, entries, strict=True)
    )


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.jsonl"))


def _truncate(folder: Path, shards: int) -> None:
    for path in folder.glob("part-*"):
        if int(path.name.removeprefix("part-").partition(".")[0]) >= shards:
            path.unlink()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _lock(folder: Path) -> IO[str]:
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StoreLocked(
            f"another run writes to {folder.parent}; wait for it, or stop it"
        ) from error
    return file
