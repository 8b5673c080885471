"""OpenTelemetry spans of the server's calls: each call, and in it the queue and work of each step.

    byol.v1.Embedder/Embed            server span, child of the client's
      queue {byol.step: decode}
      decode
      queue {byol.step: inference}
      inference

They are made when a call has ended, from the times that it left (`byol_serving.timing`): while it
is being answered, tracing costs nothing. Needs the extra `otel`.
"""

import time

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from byol_serving.rpc.calls import TRACE_KEY, Call


def otlp_provider(endpoint: str) -> TracerProvider:
    """Sends spans to a collector over OTLP/HTTP, in the background.

    Args:
        endpoint: of the collector, such as http://127.0.0.1:4318/v1/traces.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": "byol-server"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Spans:
    """Turns ended calls into spans."""

    def __init__(self, provider: TracerProvider) -> None:
        """Spans go where the provider sends them."""
        self._provider = provider
        self._tracer = provider.get_tracer("byol_serving")
        self._propagator = TraceContextTextMapPropagator()

    def call_ended(self, call: Call) -> None:
        """For `Calls`."""
        now = time.time() - time.perf_counter()

        def at(moment: float) -> int:
            return int((now + moment) * 1e9)

        span = self._tracer.start_span(
            call.method.removeprefix("/"),
            context=self._propagator.extract({TRACE_KEY: call.trace_parent}),
            kind=SpanKind.SERVER,
            start_time=at(call.began),
            attributes={
                "rpc.system": "grpc",
                "byol.request_id": call.request_id,
                "byol.code": call.code,
            },
        )
        if call.code != "OK":
            span.set_status(Status(StatusCode.ERROR, call.error))
        inside = trace.set_span_in_context(span)
        for step in call.steps:
            facts: dict[str, str | int] = {"byol.step": step.name, "byol.images": step.items}
            for name, start, end in (
                ("queue", step.queued, step.began),
                (step.name, step.began, step.ended),
            ):
                part = self._tracer.start_span(name, inside, start_time=at(start), attributes=facts)
                part.end(at(end))
        span.end(at(call.ended))

    def close(self) -> None:
        """Sends what is left; blocks."""
        self._provider.shutdown()
