"""How the lines of the log look."""

import json
import logging
from collections.abc import Iterator

import pytest

from byol_serving import logs


@pytest.fixture
def configured() -> Iterator[None]:
    root, calls = logging.getLogger(), logging.getLogger("byol.rpc")
    before, levels = list(root.handlers), (root.level, calls.level)
    yield
    root.handlers[:] = before
    root.setLevel(levels[0])
    calls.setLevel(levels[1])


@pytest.mark.usefixtures("configured")
def test_lines_of_several_processes_say_which(capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("text", "json"):
        logs.configure(form, "info", calls=False, process=2)
        logging.getLogger("byol.server").warning("here")
    text, line = capsys.readouterr().err.splitlines()
    assert " [2] WARNING byol.server here" in text
    assert json.loads(line)["process"] == 2
