"""SIGKILL at random moments; at length with `make crash-test`. See crash/checking.py."""

import random
from pathlib import Path

import pytest

from serving.collections.crash.checking import BrokenPromise, Run
from serving.collections.crash.migrating import kill_migrations

KILLS = 20


def _kill(run: Run) -> None:
    for _ in range(KILLS):
        run.round()


def test_what_was_acknowledged_survives_kills(tmp_path: Path) -> None:
    run = Run(tmp_path / "store", random.Random())
    _kill(run)
    assert run.changes > KILLS


def test_acknowledging_before_commit_is_caught(tmp_path: Path) -> None:
    """The negative control: without it the test above would prove nothing."""
    run = Run(tmp_path / "store", random.Random(), early=True)
    with pytest.raises(BrokenPromise, match="were acknowledged"):
        _kill(run)


def test_a_migration_is_whole_or_has_not_begun(tmp_path: Path) -> None:
    kills, before_the_end = kill_migrations(tmp_path, random.Random(), 8)
    assert 0 < before_the_end <= kills == 8
