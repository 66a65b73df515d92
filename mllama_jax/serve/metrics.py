"""What /metrics tells, under the names that operators know from other servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from mllama_jax.generate.scheduler import Scheduler
from mllama_jax.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _Caches:
    """What is counted of the caches."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, text in (
            ("prefix_cache_queries", "Prompt tokens of admitted requests."),
            ("prefix_cache_hits", "Those that a slot had read already."),
            ("image_cache_queries", "Pictures of admitted requests."),
            ("image_cache_hits", "Those whose keys and values a slot held already."),
        ):
            yield CounterMetricFamily(f"mllama_{name}", text, value=self.scheduler.counts[name])


class Metrics:
    """One registry for one server."""

    def __init__(self, worker: Worker):
        self.registry = registry = CollectorRegistry()
        scheduler = worker.engine.scheduler

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"mllama_{name}", text, registry=registry).set_function(value)

        def running() -> int:
            return sum(slot.request is not None for slot in scheduler.slots)

        gauge("num_requests_running", "Requests that have a slot.", running)
        gauge("num_requests_waiting", "Requests that wait for a slot.", lambda: len(scheduler.waiting))
        gauge("kv_cache_usage_perc", "Share of the slots' positions that hold something.", scheduler.fullness)
        registry.register(_Caches(scheduler))
        self.prompt_tokens = Counter("mllama_prompt_tokens", "Prompt tokens of answered requests.", registry=registry)
        self.generation_tokens = Counter("mllama_generation_tokens", "Tokens that were made.", registry=registry)
        self.finished = Counter("mllama_request_success", "Answers that ended.", ["finished_reason"], registry=registry)
        self.verdicts = Counter("mllama_guard_verdicts", "What the guard said.", ["verdict"], registry=registry)
        self.responses = Counter("mllama_http_responses", "Responses by status.", ["status"], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"mllama_{name}_seconds", text, buckets=buckets, registry=registry)

        self.first = histogram("time_to_first_token", "From a request to its first token.")
        self.between = histogram("inter_token_latency", "Between tokens.", _TOKEN_SECONDS)
        self.whole = histogram("e2e_request_latency", "From a request to its end.")

    def text(self) -> bytes:
        return generate_latest(self.registry)
