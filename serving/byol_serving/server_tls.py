"""The server's certificates, taken up anew when the files are renewed."""

import logging
import ssl
from pathlib import Path

import grpc

from byol_serving.config import TlsConfig
from byol_serving.errors import InvalidConfig

log = logging.getLogger("byol.tls")


class Certificates:
    """The files of a server's certificate."""

    def __init__(self, tls: TlsConfig) -> None:
        """Looks at the files.

        Raises:
            InvalidConfig: certificate and key do not fit, or are not PEM.
        """
        if reason := _fault(tls):
            raise InvalidConfig(
                f"TLS files {tls.cert} and {tls.key} cannot be used ({reason}); give a certificate"
                " chain and its own key, both PEM"
            )
        self._tls = tls
        self._seen = _stamp(tls)
        """Of the files whose renewal was logged; each of several listeners finds it out."""

    def credentials(self) -> grpc.ServerCredentials:
        """New ones that look at the files with each new connection: a renewal needs nothing else.

        Files that do not fit together (a renewal half done, say) are logged, and the former ones
        stay. Each server of gRPC needs credentials of its own.
        """
        stamp = _stamp(self._tls)

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Called by gRPC for each handshake; None: as before."""
            nonlocal stamp
            if (now := _stamp(self._tls)) == stamp:
                return None
            stamp = now
            first, self._seen = now != self._seen, now
            if fault := _fault(self._tls):
                if first:
                    log.error("the certificate is left as it was: %s", fault)
                return None
            if first:
                log.info("took up the certificate in %s", self._tls.cert)
            return _configuration(self._tls)

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            _configuration(self._tls),
            fetch,  # type: ignore[arg-type]  # the stubs leave out that None is allowed
            require_client_authentication=self._tls.client_ca is not None,
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
