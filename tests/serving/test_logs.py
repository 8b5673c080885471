"""What the log says of a client that leaves while it is being answered."""

import json
import logging
from collections.abc import Iterator

import pytest

from byol_serving import logs

GRPC = logging.getLogger("grpc._cython.cygrpc")


@pytest.fixture
def configured() -> Iterator[None]:
    root = logging.getLogger()
    before, level, filters = list(root.handlers), root.level, list(GRPC.filters)
    yield
    root.handlers[:], GRPC.filters[:] = before, filters
    root.setLevel(level)


@pytest.mark.usefixtures("configured")
def test_a_client_that_left_is_a_line_and_other_errors_stay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("text", "info", calls=False)
    for message in ("ExecuteBatchError raised in core by servicer method [%s]", "Unexpected [%s]"):
        try:
            raise RuntimeError("batch")
        except RuntimeError:
            GRPC.exception(message, "/byol.v1.Embedder/Embed")
    left, other, *trace = capsys.readouterr().err.splitlines()
    assert left.endswith(
        "INFO grpc._cython.cygrpc a client left while it was being answered:"
        " /byol.v1.Embedder/Embed"
    )
    assert " ERROR " in other
    assert trace[-1] == "RuntimeError: batch"


@pytest.mark.usefixtures("configured")
def test_lines_of_several_processes_say_which(capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("text", "json"):
        logs.configure(form, "info", calls=False, process=2)
        logging.getLogger("byol.server").warning("here")
    text, line = capsys.readouterr().err.splitlines()
    assert " [2] WARNING byol.server here" in text
    assert json.loads(line)["process"] == 2
