"""What both clients need of gRPC: channel options, credentials, and failures as our errors."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from byol_serving.errors import ByolError
from byol_serving.rpc.status import error_from

OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", -1),  # the server's own limit bounds what comes back
    ("grpc.max_send_message_length", -1),
    # Connections are spread over the processes of a server: each client has one of its own.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC's first pause before it connects again is a second, which hides a quick restart.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """An encrypted channel. All files are PEM."""

    ca: Path | None = None
    """Who signed the server's certificate; None: the system's authorities."""
    cert: Path | None = None
    """This client's certificate chain, where the server asks for one (mutual TLS)."""
    key: Path | None = None
    """Its private key."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files."""
        ca, cert, key = (
            None if path is None else path.read_bytes() for path in (self.ca, self.cert, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


def environment_tls() -> ClientTls | None:
    """BYOL_TLS_CA, BYOL_TLS_CERT and BYOL_TLS_KEY, as the command line's clients take them."""
    files = {
        key: Path(value)
        for key in ("ca", "cert", "key")
        if (value := os.environ.get(f"BYOL_TLS_{key.upper()}"))
    }
    return ClientTls(**files) if files else None


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata that carries a token; None: that of BYOL_TOKEN, if it is set."""
    token = os.environ.get("BYOL_TOKEN") if token is None else token
    return (("authorization", f"Bearer {token}"),) if token else ()


def byol_error(failure: grpc.RpcError) -> ByolError:
    """A failed call of either client as the error that the server raised."""
    details = failure.details() or ""
    trailers: Any = failure.trailing_metadata() or ()
    return error_from(failure.code(), details, trailers)
