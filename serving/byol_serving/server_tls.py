"""The server's certificates, taken up anew when the files are renewed."""

import logging
import ssl
from pathlib import Path

import grpc

from byol_serving.config import TlsConfig
from byol_serving.errors import InvalidConfig

log = logging.getLogger("byol.tls")


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    """Credentials that look at the files with each new connection, so that a renewal needs nothing.

    Files that do not fit together (a renewal half done, say) are logged, and the former ones stay.

    Raises:
        InvalidConfig: certificate and key do not fit, or are not PEM.
    """
    reason = _fault(tls)
    if reason:
        raise InvalidConfig(
            f"TLS files {tls.cert} and {tls.key} cannot be used ({reason}); give a certificate"
            " chain and its own key, both PEM"
        )
    stamp = _stamp(tls)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC for each handshake; None: as before."""
        nonlocal stamp
        if (now := _stamp(tls)) == stamp:
            return None
        stamp = now
        if fault := _fault(tls):
            log.error("the certificate is left as it was: %s", fault)
            return None
        log.info("took up the certificate in %s", tls.cert)
        return _configuration(tls)

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        _configuration(tls),
        fetch,  # type: ignore[arg-type]  # the stubs leave out that None is allowed
        require_client_authentication=tls.client_ca is not None,
    )
    return credentials


def _configuration(tls: TlsConfig) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(tls.key.read_bytes(), tls.cert.read_bytes())],
        root_certificates=tls.client_ca.read_bytes() if tls.client_ca else None,
    )


def _fault(tls: TlsConfig) -> str:
    """Why the files cannot be used; empty if they can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert, tls.key, password="")  # never ask for one
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


def _stamp(tls: TlsConfig) -> tuple[tuple[Path, int, int], ...]:
    found = []
    for path in (tls.cert, tls.key, tls.client_ca):
        if path is not None and path.exists():
            facts = path.stat()
            found.append((path, facts.st_mtime_ns, facts.st_size))
    return tuple(found)
