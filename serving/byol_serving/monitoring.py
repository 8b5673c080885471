"""A small HTTP server beside gRPC, for what watches the server: metrics and probes.

/metrics    Prometheus' text format
/healthz    200 while the process answers
/readyz     200 while calls are accepted, 503 while the server starts or drains
"""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from byol_serving.errors import InvalidConfig

_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


class Monitoring:
    """The HTTP server, in a thread of its own: it answers even if the event loop is stuck."""

    def __init__(
        self, host: str, port: int, *, render: Callable[[], bytes], ready: Callable[[], bool]
    ) -> None:
        """Listens at once.

        Raises:
            InvalidConfig: the address cannot be listened on.
        """

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds: nobody may hold a thread

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        self._answer(200, _METRICS, render())
                    case "/healthz":
                        self._answer(200, _TEXT, b"ok\n")
                    case "/readyz" if ready():
                        self._answer(200, _TEXT, b"ready\n")
                    case "/readyz":
                        self._answer(503, _TEXT, b"not ready\n")
                    case _:
                        self._answer(404, _TEXT, b"ask for /metrics, /healthz or /readyz\n")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Probes are not worth a line."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise InvalidConfig(
                f"cannot serve metrics on {host}:{port} ({error.strerror});"
                " choose another with --metrics-port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="monitoring", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening; blocks for up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
