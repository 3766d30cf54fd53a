"""The metrics of several processes as one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def together(pages: Mapping[str, bytes]) -> bytes:
    """Pages in Prometheus's text format as one, each sample labelled with its `replica`."""
    found: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            new = Metric(family.name, family.documentation, family.type)
            target = found.setdefault(family.name, new)
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                target.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(found.values()))
    return generate_latest(registry)
