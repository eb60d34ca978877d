"""What /metrics tells Prometheus: HTTP requests counted here, and the engine's state when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pliant.serve.engine import Status

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, and its engine's `status`."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(status))
        self._requests = Counter(
            "pliant_http_requests", "HTTP requests.", ["path", "status"], registry=self._registry
        )
        self._first = Histogram(
            "pliant_first_event_seconds",
            "From a request's arrival to the first of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def responded(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def began(self, seconds: float) -> None:
        """An answer has begun so long after its request came."""
        self._first.observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineMetrics(Collector):
    """The engine's status as metrics, taken when they are read."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        gauges = {
            "pliant_requests_waiting": ("Requests in the queue.", status.waiting),
            "pliant_requests_running": ("Requests that are computed.", status.running),
            "pliant_tokens_per_second": ("New tokens, lately.", status.tokens_per_second),
            "pliant_weight_bytes": ("Bytes of weights.", status.weights),
            "pliant_cache_bytes": ("Bytes taken for keys and values.", status.cache),
            "pliant_planned_bytes": ("Bytes of everything at its peak.", status.planned),
        }
        if status.memory is not None:
            gauges["pliant_budget_bytes"] = ("The budget in force.", status.memory)
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(name, words, value=value)
        counts = {
            "pliant_prompt_tokens": ("Tokens of prompts.", status.prompt_tokens),
            "pliant_new_tokens": ("Tokens of answers.", status.new_tokens),
        }
        for name, (words, value) in counts.items():
            yield CounterMetricFamily(name, words, value=value)
