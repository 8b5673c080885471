"""One port for several processes of a server, and for nobody else's.

They share the port by SO_REUSEPORT, over which Linux spreads the connections. By itself that would
let a second server start happily on the port, and take a part of the calls.
"""

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from byol_serving.errors import InvalidConfig

CAN_BE_SHARED = sys.platform.startswith("linux")
"""Others let sockets share a port, too, but give all connections to one of them."""
_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


@contextmanager
def held_port(host: str, port: int) -> Iterator[int]:
    """The port, free when it is asked for, and refused to other servers of ours meanwhile.

    Sockets that answer nothing are bound to all addresses of `host`: alone, so that they fail if
    anybody listens there, and only then are others let in. A listener keeps servers out as they do.

    Args:
        host: a name or an address, IPv6 in brackets or without.
        port: 0: one that nobody uses is chosen.

    Raises:
        InvalidConfig: the address is in use, not of this machine, or not allowed.
    """
    with ExitStack() as held:
        try:
            chosen = _bind_all(host, port, held)
        except OSError as error:
            raise cannot_listen(f"{host}:{port}") from error
        yield chosen


def _bind_all(host: str, port: int, held: ExitStack) -> int:
    bound, refused = 0, OSError(f"{host} has no address")
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    for family, kind, _, _, address in found:
        try:
            each = held.enter_context(socket.socket(family, kind))
            # Without it the traces of former connections would be in the way; with it later
            # servers would not be refused.
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind((address[0], bound or port, *address[2:]))
        except OSError as error:
            if error.errno not in _NO_SUCH_FAMILY:
                raise
            refused = error  # where there is no IPv6, names may have addresses of it all the same
        else:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound = each.getsockname()[1]
    if not bound:
        raise refused
    return bound


def cannot_listen(address: str) -> InvalidConfig:
    """The error for host:port."""
    return InvalidConfig(
        f"cannot listen on {address}: in use, not an address of this machine, or not allowed;"
        " choose another with --host and --port"
    )
