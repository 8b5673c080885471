"""What watches a server, put together from its settings: metrics, traces, the slow log."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self

from byol_serving.config import ServeConfig
from byol_serving.errors import InvalidConfig
from byol_serving.logs import SlowLog
from byol_serving.metrics import Metrics
from byol_serving.metrics_merged import merged
from byol_serving.monitoring import Monitoring
from byol_serving.rpc.calls import Call, Calls
from byol_serving.rpc.models import Models
from byol_serving.timing import BatchRun


class Others(Protocol):
    """The other processes of a server."""

    @property
    def ready(self) -> bool:
        """Whether all of them answer calls."""

    def metrics(self) -> Mapping[int, bytes]:
        """What those that answer have to tell, by their numbers; blocks, not for the event loop."""


class Watching:
    """A context manager: what it started ends with the block."""

    def __init__(self, config: ServeConfig, models: Models) -> None:
        """Watches what the settings ask for.

        Raises:
            InvalidConfig: tracing is asked for and OpenTelemetry is not installed.
        """
        self.calls: list[Callable[[Call], None]] = []
        """Told of each call that has ended ..."""
        self.forwarded: list[Callable[[Call], None]] = []
        """... and of those that another process of the server has passed on, and counts."""
        self._in_flight: Callable[[], int] = lambda: 0
        self._ready: Callable[[], bool] = lambda: False
        self._others: Others | None = None
        self._closing: list[Callable[[], None]] = []
        self._metrics: Metrics | None = None
        self.port: int | None = None
        """Of the HTTP server, once it listens."""
        if config.metrics_port is not None:
            self._metrics = Metrics(models, lambda: self._in_flight())
            self.calls.append(self._metrics.call_ended)
        if config.slow_seconds:
            self.forwarded.append(SlowLog(config.slow_seconds).call_ended)
        if config.otel_endpoint:
            self._trace(config.otel_endpoint)
        self.calls += self.forwarded

    def batches(self, model: str) -> Callable[[str, BatchRun], None] | None:
        """What the pipeline of a model tells its batches to; None: nobody asks."""
        return None if self._metrics is None else self._metrics.watch(model)

    def follow(self, calls: Calls, others: "Others | None" = None) -> None:
        """Says where to ask whether the server is ready, and how much it does."""
        self._in_flight = lambda: calls.in_flight
        self._ready = lambda: not calls.draining and (others is None or others.ready)
        self._others = others

    def render(self) -> bytes:
        """The metrics of this process, or of all; may be called from any thread but the loop's."""
        own = b"" if self._metrics is None else self._metrics.render()
        return own if self._others is None else merged({0: own, **self._others.metrics()})

    def listen(self, config: ServeConfig) -> None:
        """Starts the HTTP server, where there is one; raises as `Monitoring`."""
        if self._metrics is None or config.metrics_port is None:
            return
        monitoring = Monitoring(
            config.host, config.metrics_port, render=self.render, ready=self._ready
        )
        self.port = monitoring.port
        self._closing.append(monitoring.close)

    def __enter__(self) -> Self:
        """The watcher itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what was started."""
        for close in reversed(self._closing):
            close()

    def _trace(self, endpoint: str) -> None:
        try:
            from byol_serving.tracing import Spans, otlp_provider
        except ModuleNotFoundError as error:
            raise InvalidConfig(
                f"tracing needs {error.name}; run: pip install 'byol-server[otel]'"
            ) from error
        spans = Spans(otlp_provider(endpoint))
        self.forwarded.append(spans.call_ended)
        self._closing.append(spans.close)
