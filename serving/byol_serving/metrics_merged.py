"""The metrics of several processes as one: every sample says whose it is."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_OF_ALL = frozenset({"byol_gpu_memory_bytes"})
"""Each process tells the same of the machine, and a sum must not count it again."""


def merged(texts: Mapping[int, bytes]) -> bytes:
    """What each process says in Prometheus' text format, with the label `process`, its number."""
    families: dict[str, Metric] = {}
    for number, text in texts.items():
        for found in text_string_to_metric_families(text.decode()):
            if found.name in _OF_ALL and found.name in families:
                continue
            family = families.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            )
            for sample in found.samples:
                labels = {**sample.labels, "process": str(number)}
                family.samples.append(sample._replace(labels=labels))
    registry = CollectorRegistry()
    registry.register(_Given(families.values()))
    return generate_latest(registry)


class _Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
