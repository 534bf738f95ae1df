"""What a monitor reads of a server, in Prometheus's format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ..runtime.engine import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class _OfEngine(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        pages = stats.pages
        gauges: dict[str, tuple[str, float]] = {
            "requests_waiting": ("Requests that wait for their first step, or for pages.", stats.waiting),
            "requests_running": ("Requests that take part in steps.", stats.running),
            "pages": ("Pages of K/V there are.", pages.total),
            "pages_held": ("Pages of K/V that requests hold.", pages.held),
            "pages_shared": ("Pages of K/V that several requests hold.", pages.shared),
        }
        counters: dict[str, tuple[str, float]] = {
            "steps": ("Calls of the model.", stats.steps),
            "preemptions": ("Requests that gave their pages back, to be computed again.", stats.preemptions),
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "cached_prompt_tokens": ("Of these, tokens whose K/V were there.", stats.cached_tokens),
            "tokens": ("New tokens.", stats.tokens),
            "accepted_tokens": ("Of these, tokens that a draft had guessed.", stats.accepted),
            "nodes": ("Tree nodes that the model verified.", stats.nodes),
            "draft_seconds": ("Seconds in which drafts ran.", stats.draft_seconds),
            "target_seconds": ("Seconds of the model's calls.", stats.target_seconds),
            "weight_wait_seconds": ("Of these, the cores stood still for weights.", stats.weight_wait_seconds),
            "weight_read_bytes": ("Bytes of streamed weights that were read.", stats.weight_read_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"treespec_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"treespec_{name}", text, value)
        ended = CounterMetricFamily("treespec_requests", "Requests that are over, by how.", labels=["status"])
        for status in ("finished", "cancelled", "failed"):
            ended.add_metric([status], getattr(stats, status))
        yield ended


class Metrics:
    """Of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        self.first = Histogram(
            "treespec_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.each = Histogram(
            "treespec_token_seconds", "Between tokens after the first.", buckets=SECONDS, registry=self.registry
        )
        self.refused = Counter(
            "treespec_refused", "Requests that were not begun, by HTTP status.", ["status"], registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
