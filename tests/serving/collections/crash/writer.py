"""The process that is killed: changes, snapshots, compactions and drops, all at once, for ever.

It says on standard output what it begins and what was acknowledged, a line each:

    begin WRITER NUMBER / done WRITER NUMBER
    compact / snapshot
    make NAME / made NAME / drop NAME / dropped NAME
"""

import os
import sys
import threading
from pathlib import Path

from byol_serving.collections.store import Store
from serving.collections.crash.operations import COLLECTIONS, OPTIONS, WRITERS, operation
from serving.collections.model import clustered


def say(*words: object) -> None:
    """One line, in one system call: what was said before a kill stays in the pipe."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write(store: Store, writer: str, number: int, *, early: bool) -> None:
    """Changes without end. With `early`, acknowledges before it commits: the negative control."""
    collection = store.get(WRITERS[writer])
    while True:
        change = operation(writer, number)
        say("begin", writer, number)
        if early:
            say("done", writer, number)
        change.apply(collection)
        if not early:
            say("done", writer, number)
        number += 1


def reorganise(store: Store) -> None:
    """Snapshots and compactions without end."""
    while True:
        for name in COLLECTIONS:
            collection = store.get(name)
            say("compact")
            collection.settle()
            say("snapshot")
            collection.snapshot()


def make_and_drop(store: Store, prefix: str) -> None:
    """Collections that come and go."""
    number = 0
    while True:
        name = f"{prefix}-{number}"
        say("make", name)
        collection = store.create(name, dim=4, encoder_id="e")
        say("made", name)
        collection.upsert(["x"], clustered(1, 4))
        collection.snapshot()
        say("drop", name)
        store.drop(name)
        say("dropped", name)
        number += 1


def main() -> None:
    """Arguments: the store, `honest` or `early`, a prefix, and WRITER=NUMBER to go on from."""
    path, honesty, prefix, *begins = sys.argv[1:]
    store = Store(Path(path), options=OPTIONS)
    known = {each.name for each in store.list()}
    for name, kind in COLLECTIONS.items():
        if name not in known:
            store.create(name, dim=16, encoder_id="e", index=kind)
    say("ready")
    threads = [
        threading.Thread(target=reorganise, args=(store,)),
        threading.Thread(target=make_and_drop, args=(store, prefix)),
    ]
    for begin in begins:
        writer, number = begin.split("=")
        early = {"early": honesty == "early"}
        threads.append(
            threading.Thread(target=write, args=(store, writer, int(number)), kwargs=early)
        )
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
