"""The client's half of a trace: a span around each call, and its context on the wire.

Where OpenTelemetry is not installed, or no tracer provider is set, this does nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError:
    _TRACED = False
else:
    _TRACED = True


@contextmanager
def traced(method: str) -> Iterator[Sequence[tuple[str, str]]]:
    """A client span until the block ends; yields the metadata that carries it to the server."""
    if not _TRACED:
        yield ()
        return
    tracer = trace.get_tracer("byol_serving.client")
    with tracer.start_as_current_span(method.removeprefix("/"), kind=trace.SpanKind.CLIENT):
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        yield tuple(carrier.items())
