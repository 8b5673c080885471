"""Kills in the middle of a schema migration."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

from byol_serving.collections import database, snapshot
from byol_serving.collections.database import MIGRATIONS
from byol_serving.collections.store import Store
from serving.collections.crash.checking import BrokenPromise

ITEMS = 20_000
_OPEN = """
import os, sys
from byol_serving.collections.database import Database
os.write(1, b"opening\\n")
Database(__import__("pathlib").Path(sys.argv[1])).close()
os.write(1, b"done\\n")
"""


def version_one(folder: Path, items: int) -> Path:
    """A store as the first version of this program left it."""
    path = folder / "version-1"
    with mock.patch.object(database, "MIGRATIONS", MIGRATIONS[:1]), Store(path) as store:
        vectors = np.random.default_rng(0).standard_normal((items, 2), np.float32)
        metadata = [{"n": n} for n in range(items)]
        collection = store.create("c", dim=2, encoder_id="e")
        collection.upsert([str(n) for n in range(items)], vectors, metadata)
    snapshot.discard(path / "c")
    forget_what_is_newer(path)
    assert schema_version(path) == 1
    return path


def forget_what_is_newer(path: Path) -> None:
    """Takes out of a collection what only today's program writes into one of an older schema."""
    connection = sqlite3.connect(path / "c" / database.FILE, isolation_level=None)
    try:
        connection.execute("DELETE FROM meta WHERE key = 'id_type'")
    finally:
        connection.close()


def schema_version(path: Path) -> int:
    """The version that the store's collection is of."""
    connection = sqlite3.connect(path / "c" / database.FILE)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return int(version)
    finally:
        connection.close()


def kill_migrations(folder: Path, moments: random.Random, kills: int) -> tuple[int, int]:
    """Kills so many migrations at random moments; returns (kills, how many came before its end).

    Raises:
        BrokenPromise: a file is neither the old nor the new version, or lost something.
    """
    old, copy = version_one(folder, ITEMS), folder / "migrating"
    shutil.copytree(old, copy)
    seconds = _opened(copy, None)
    before_the_end = 0
    for _ in range(kills):
        shutil.rmtree(copy)
        shutil.copytree(old, copy)
        _opened(copy, moments.uniform(0, seconds))
        unfinished = schema_version(copy) < len(MIGRATIONS)
        before_the_end += unfinished
        # The one that was timed may have met a busier machine than those that are killed.
        seconds *= 1.2 if unfinished else 0.7
        with Store(copy) as store:
            if store.failed:
                raise BrokenPromise(f"killed while migrating, it cannot be opened: {store.failed}")
            collection = store.get("c")
            if (
                collection.info.id_type != "string"
                or collection.info.count != ITEMS
                or not collection.verify().ok
            ):
                raise BrokenPromise("killed while migrating, items are missing")
        if schema_version(copy) != len(MIGRATIONS):
            raise BrokenPromise("the second start did not finish the migration")
    shutil.rmtree(copy)
    return kills, before_the_end


def _opened(path: Path, kill_after: float | None) -> float:
    """Opens the collection in a process of its own; how long that took from its first word."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _OPEN, str(path / "c" / database.FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        begin = time.perf_counter()
        if kill_after is None:
            process.stdout.readline()
        else:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
    return time.perf_counter() - begin
