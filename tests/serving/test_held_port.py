"""A port is shared among the processes of a server, and with nobody else."""

import socket
from typing import Any

import pytest

from byol_serving.errors import InvalidConfig
from byol_serving.held_port import CAN_BE_SHARED, held_port

pytestmark = pytest.mark.skipif(not CAN_BE_SHARED, reason="only Linux spreads connections")
HOST = "127.0.0.1"


def listener(port: int, *, share: bool = True) -> socket.socket:
    """A socket that listens."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(share))
    try:
        found.bind((HOST, port))
    except OSError:
        found.close()
        raise
    found.listen()
    return found


def test_listeners_of_the_holder_are_let_in() -> None:
    with held_port(HOST, 0) as port, listener(port), listener(port):
        assert port > 0
        with pytest.raises(OSError, match="in use"):
            listener(port, share=False)
    with listener(port, share=False):  # given back
        pass


@pytest.mark.parametrize("share", [False, True])
def test_what_somebody_listens_on_cannot_be_held(share: bool) -> None:
    with listener(0, share=share) as theirs:
        port = theirs.getsockname()[1]
        with pytest.raises(InvalidConfig, match=rf"cannot listen on 127.0.0.1:{port}: in use"):
            held_port(HOST, port).__enter__()


def test_a_port_is_held_once() -> None:
    with (
        held_port(HOST, 0) as port,
        pytest.raises(InvalidConfig, match="cannot listen"),
        held_port(HOST, port),
    ):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(InvalidConfig, match=f"cannot listen on {host}:50051"):
        held_port(host, 50051).__enter__()


def test_all_addresses_of_a_name_have_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = socket.getaddrinfo
    nowhere = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))

    def several(host: str, port: int, **more: Any) -> Any:
        here = [each for name in (HOST, "127.0.0.2") for each in asked(name, port, **more)]
        return [nowhere, *here]  # as ::1 is, of localhost where there is no IPv6

    monkeypatch.setattr(socket, "getaddrinfo", several)
    with held_port("a-name", 0) as port:
        for address in (HOST, "127.0.0.2"):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((address, port))
