"""What the server tells Prometheus. deploy/grafana.json draws exactly these names.

    byol_requests_total{method, code}          calls answered or given up
    byol_request_seconds{method}               their whole time in the server
    byol_requests_in_flight                    calls that are being answered
    byol_rejected_total{reason}                calls that failed, by class of error
    byol_queue_images{model, version, step}    images that wait for a step
    byol_accepted_images{model, version}       images accepted and not yet answered
    byol_accepted_bytes{model, version}        their bytes, encoded and decoded
    byol_wait_seconds{model, step}             requests' time in the queue of a step
    byol_batch_images{model, step}             images in a batch
    byol_batch_seconds{model, step}            time that a step takes for a batch
    byol_images_total{model, step}             images through a step
    byol_model_info{model, version, ...}       1 for each loaded version
    byol_gpu_memory_bytes{gpu, kind}           used and total, where there is a GPU

Steps are decode, inference and features. The process's own CPU time, memory and file descriptors
come with them, under the names that Prometheus clients share.
"""

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from byol_serving.gpu_memory import gpu_memory
from byol_serving.rpc.calls import Call
from byol_serving.rpc.models import Models
from byol_serving.timing import BatchRun

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, models: Models, in_flight: Callable[[], int]) -> None:
        """Counts from zero.

        Args:
            models: whose queues are read at each scrape.
            in_flight: calls that are being answered now.
        """
        # It adds a series to each counter that nothing here reads; the package leaves it untyped.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "byol_requests", "Calls answered or given up.", ["method", "code"], registry=registry
        )
        self._seconds = Histogram(
            "byol_request_seconds",
            "Whole time of a call in the server.",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._rejected = Counter(
            "byol_rejected", "Calls that failed, by class of error.", ["reason"], registry=registry
        )
        steps = ["model", "step"]
        self._wait = Histogram(
            "byol_wait_seconds",
            "Time of a request in the queue of a step.",
            steps,
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "byol_batch_images", "Images in a batch.", steps, buckets=_IMAGES, registry=registry
        )
        self._batch_seconds = Histogram(
            "byol_batch_seconds",
            "Time that a step takes for a batch.",
            steps,
            buckets=_SECONDS,
            registry=registry,
        )
        self._images = Counter("byol_images", "Images through a step.", steps, registry=registry)
        registry.register(_Present(models, in_flight))
        ProcessCollector(registry=registry)

    def call_ended(self, call: Call) -> None:
        """Counts a call; for `Calls`."""
        self._requests.labels(call.method, call.code).inc()
        self._seconds.labels(call.method).observe(call.ended - call.began)
        if call.error:
            self._rejected.labels(call.error).inc()

    def watch(self, model: str) -> Callable[[str, BatchRun], None]:
        """A watcher for the pipeline of a model."""

        def batch_ended(step: str, run: BatchRun) -> None:
            for wait in run.waits:
                self._wait.labels(model, step).observe(wait)
            self._batch.labels(model, step).observe(run.items)
            self._batch_seconds.labels(model, step).observe(run.seconds)
            self._images.labels(model, step).inc(run.items)

        return batch_ended

    def render(self) -> bytes:
        """All of it in Prometheus' text format; may be called from any thread."""
        return generate_latest(self._registry)


class _Present(Collector):
    """What is read at the moment of a scrape, and not counted along the way."""

    def __init__(self, models: Models, in_flight: Callable[[], int]) -> None:
        self._models, self._in_flight = models, in_flight

    def collect(self) -> Iterable[GaugeMetricFamily]:
        flying = GaugeMetricFamily("byol_requests_in_flight", "Calls that are being answered.")
        flying.add_metric([], self._in_flight())
        one = ["model", "version"]
        waiting = GaugeMetricFamily(
            "byol_queue_images", "Images that wait for a step.", labels=[*one, "step"]
        )
        images = GaugeMetricFamily(
            "byol_accepted_images", "Images accepted and not yet answered.", labels=one
        )
        sizes = GaugeMetricFamily(
            "byol_accepted_bytes", "Bytes accepted and not yet answered.", labels=one
        )
        facts = ["encoder_id", "precision", "provider", "in_use"]
        info = GaugeMetricFamily("byol_model_info", "A loaded version.", labels=[*one, *facts])
        for model in self._models.all():
            key = [model.name, model.version]
            for step, count in model.queued().items():
                waiting.add_metric([*key, step], count)
            images.add_metric(key, model.pipeline.budget.images)
            sizes.add_metric(key, model.pipeline.budget.bytes)
            in_use = "yes" if self._models.is_in_use(model) else "no"
            known = [model.info.encoder_id, model.info.precision, model.provider, in_use]
            info.add_metric([*key, *known], 1)
        gpus = GaugeMetricFamily(
            "byol_gpu_memory_bytes", "Memory of a GPU, of all processes.", labels=["gpu", "kind"]
        )
        for each in gpu_memory():
            gpus.add_metric([str(each.gpu), "used"], each.used)
            gpus.add_metric([str(each.gpu), "total"], each.total)
        return (flying, waiting, images, sizes, info, gpus)
