"""Kills the writer again and again, and looks each time whether the store kept its word.

Every acknowledged change must be there, and of a change that had begun all or nothing (it is
indeterminate: the kill may have come just after its commit). What is killed is a process: SIGKILL
says nothing about power loss, for which the promise rests on SQLite's synchronous=FULL.
"""

import copy
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from byol_serving.collections import database
from byol_serving.collections.store import Store
from serving.collections.crash.operations import COLLECTIONS, DIM, OPTIONS, WRITERS, operation
from serving.collections.model import TOLERANCE, Model, clustered

ROOT = Path(__file__).parents[4]
# The begin of what the kill shall fall into, and at most how long after it, in seconds.
MOMENTS = {
    "begin a": 0.01,
    "begin d": 0.01,
    "done": 0.002,
    "compact": 0.02,
    "snapshot": 0.02,
    "make": 0.01,
    "drop": 0.01,
}


class BrokenPromise(AssertionError):
    """The store lost, tore or invented something."""


@dataclass
class Run:
    """A store that is killed over and over."""

    path: Path
    random: random.Random
    early: bool = False
    models: dict[str, Model] = field(default_factory=lambda: {each: Model() for each in WRITERS})
    numbers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WRITERS, 0))
    kills: int = 0
    changes: int = 0
    moments: dict[str, int] = field(default_factory=dict)

    def round(self) -> None:
        """Starts the writer, kills it, and checks. Raises BrokenPromise."""
        said = self._killed()
        self.kills += 1
        temporary = self._said_of_changes(said)
        with Store(self.path, options=OPTIONS) as store:
            if store.failed:
                raise BrokenPromise(f"after the kill, {store.failed} cannot be opened")
            self._check_temporary(store, temporary)
            for name in COLLECTIONS:
                self._check(store, name)

    def _killed(self) -> list[str]:
        """All that a writer said until it was killed at a random moment."""
        begins = [f"{writer}={number}" for writer, number in self.numbers.items()]
        honesty = "early" if self.early else "honest"
        script = Path(__file__).with_name("writer.py")
        command = [sys.executable, str(script), str(self.path), honesty, f"t{self.kills}", *begins]
        paths = [str(ROOT / "tests"), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        moment = self.random.choice(list(MOMENTS))
        self.moments[moment] = self.moments.get(moment, 0) + 1
        least = self.random.randrange(5, 400)
        said: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.strip())
                if len(said) >= least and line.startswith(moment):
                    time.sleep(self.random.uniform(0, MOMENTS[moment]))
                    process.send_signal(signal.SIGKILL)
                    break
            said += [line.strip() for line in process.stdout]
        if process.returncode != -signal.SIGKILL:
            raise BrokenPromise(f"the writer ended by itself: {process.returncode}")
        return said

    def _said_of_changes(self, said: list[str]) -> dict[str, str]:
        """Applies what was acknowledged; returns the last word on each temporary collection."""
        temporary: dict[str, str] = {}
        for line in said:
            match line.split():
                case ["done", writer, number]:
                    operation(writer, int(number)).apply_to(self.models[writer])
                    self.numbers[writer] = int(number) + 1
                    self.changes += 1
                case ["make" | "made" | "drop" | "dropped" as word, name]:
                    temporary[name] = word
        return temporary

    def _check_temporary(self, store: Store, temporary: Mapping[str, str]) -> None:
        there = {each.name for each in store.list()} - set(COLLECTIONS)
        must = {name for name, word in temporary.items() if word == "made"}
        may = must | {name for name, word in temporary.items() if word in ("make", "drop")}
        if not must <= there <= may:
            raise BrokenPromise(f"collections {there} are there; {must} must be, {may} may be")
        for name in there:
            if temporary[name] == "drop" and store.get(name).info.count != 1:
                raise BrokenPromise(f"collection {name} lost its item before it was dropped")
            store.drop(name)

    def _check(self, store: Store, name: str) -> None:
        """Compares one collection with the models of its writers."""
        stored = _stored(self.path / name / database.FILE)
        whole = Model()
        for writer in (each for each, where in WRITERS.items() if where == name):
            mine = {each: item for each, item in stored.items() if each.startswith(writer)}
            self._settle_in_flight(writer, mine)
            whole.vectors |= self.models[writer].vectors
            whole.metadata |= self.models[writer].metadata
        collection = store.get(name)
        if problems := collection.verify().problems:
            raise BrokenPromise(f"index and store of {name} differ: {problems}")
        if len(stored) != len(whole.vectors):
            raise BrokenPromise(f"{name} holds items that nobody wrote")
        if whole.vectors:
            k = min(10, len(whole.vectors))
            whole.check_search(collection, clustered(3, DIM, seed=self.kills), k)

    def _settle_in_flight(self, writer: str, stored: Mapping[str, tuple[object, bytes]]) -> None:
        """The writer's items are those acknowledged, or those with the next change as well."""
        model = self.models[writer]
        change = operation(writer, self.numbers[writer])
        after = copy.deepcopy(model)
        change.apply_to(after)
        if _same(model, stored):
            return
        if not _same(after, stored):
            raise BrokenPromise(
                f"writer {writer}: {len(stored)} items are stored, {len(model.vectors)} were"
                f" acknowledged, {len(after.vectors)} with the {change.kind} in flight: not the"
                " same ones"
            )
        self.models[writer] = after
        self.numbers[writer] += 1


def _stored(path: Path) -> dict[str, tuple[object, bytes]]:
    """Metadata and vector by id, read without any of our code."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        statement = "SELECT id, metadata, vector FROM items LEFT JOIN vectors USING (row)"
        return {
            each: (json.loads(text), blob) for each, text, blob in connection.execute(statement)
        }
    finally:
        connection.close()


def _same(model: Model, stored: Mapping[str, tuple[object, bytes]]) -> bool:
    if stored.keys() != model.vectors.keys():
        return False
    for each, (metadata, blob) in stored.items():
        if metadata != model.metadata[each] or blob is None:
            return False
        vector = np.frombuffer(blob, "<f4")
        if vector.shape != (DIM,) or np.abs(vector - model.vectors[each]).max() > TOLERANCE:
            return False
    return True
