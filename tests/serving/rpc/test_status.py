"""The table between errors and statuses: complete, and the same in both directions."""

from collections.abc import Iterator

import pytest
from grpc import StatusCode

from byol_serving.errors import (
    ByolError,
    ImageTooLarge,
    InvalidImage,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from byol_serving.rpc.status import CODES, code_of, error_from, trailers_of


def tree(kind: type[ByolError]) -> Iterator[type[ByolError]]:
    for child in kind.__subclasses__():
        if child.__module__ == "byol_serving.errors":
            yield child
            yield from tree(child)


def test_every_error_is_in_the_table() -> None:
    missing = [kind.__name__ for kind in tree(ByolError) if kind not in CODES]
    assert not missing, f"add {missing} to CODES in byol_serving/rpc/status.py"


def test_a_subclass_of_another_module_has_its_parents_status() -> None:
    class Odd(Unavailable):
        pass

    assert code_of(Odd("odd")) is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", [k for k in tree(ByolError) if k is not Overloaded])
def test_errors_survive_the_wire(kind: type[ByolError]) -> None:
    error = kind("what, the limit, the remedy")
    back = error_from(code_of(error), str(error), trailers_of(error))
    assert type(back) is kind
    assert str(back) == str(error)


def test_the_retry_hint_and_the_position_survive_the_wire() -> None:
    full = error_from(StatusCode.RESOURCE_EXHAUSTED, "full", trailers_of(Overloaded("full", 0.25)))
    assert isinstance(full, Overloaded)
    assert full.retry_after_s == 0.25
    bad = ImageTooLarge("too large", 7)
    back = error_from(StatusCode.INVALID_ARGUMENT, str(bad), trailers_of(bad))
    assert isinstance(back, InvalidImage)
    assert (back.reason, back.position, str(back)) == ("too large", 7, "image 7: too large")


def test_statuses_of_grpc_itself_have_a_class_too() -> None:
    large = "Received message larger than max (9 vs. 5)"
    assert type(error_from(StatusCode.RESOURCE_EXHAUSTED, large, ())) is InvalidRequest
    assert type(error_from(StatusCode.RESOURCE_EXHAUSTED, "proxy", ())) is Overloaded
    assert type(error_from(StatusCode.UNAVAILABLE, "refused", ())) is Unavailable
    other = error_from(StatusCode.INTERNAL, "bang", ())
    assert type(other) is ByolError
    assert str(other) == "INTERNAL: bang"
    named = error_from(StatusCode.INTERNAL, "bang", (("byol-error", "Iterable"),))
    assert type(named) is ByolError  # only classes of the tree, whatever the metadata say
