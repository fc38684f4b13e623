"""The metrics of ``/metrics``, in the text format of Prometheus. The names after the colon are vLLM's."""

from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from minicpm_serve.engine import ServingEngine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """What one server counts and measures. The engine is read when ``/metrics`` is asked for."""

    def __init__(self, engine: ServingEngine, name: str):
        """
        Arguments:
            engine: runs the model.
            name: the model's name in requests, the label ``model_name``.
        """
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._name = name
        gauges = {
            "num_requests_running": ("Answers that are prefilled or decoded.", lambda: engine.running),
            "num_requests_waiting": ("Answers that wait for a place in the batch.", lambda: engine.waiting),
            "max_num_seqs": ("Most answers that are decoded at once.", lambda: engine.slots),
            "kv_cache_usage_perc": (
                "Fraction of the cache positions that are filled, 0 to 1.",
                lambda: engine.cache_usage(),
            ),
        }
        for metric, (said, value) in gauges.items():
            gauge = Gauge(*self._named(metric, said), registry=self._registry)
            gauge.labels(name).set_function(value)
        if engine.speculates:
            self._registry.register(_Guesses(engine, name))
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.").labels(name)
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.").labels(name)
        self.first_token = self._timed("time_to_first_token_seconds", "From the request to its first token.")
        self.per_token = self._timed(
            "request_time_per_output_token_seconds",
            "From one token of an answer to the next, on average.",
            TOKEN_SECONDS,
        )
        self.latency = self._timed("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self._finished = self._counter("request_success", "Ended answers by reason.", "finished_reason")
        self._rejected = self._counter("rejected_requests", "Refused requests by HTTP status.", "status")
        for reason in ("stop", "length", "abort"):  # a rate needs the 0 before the first one
            self._finished.labels(name, reason)

    def finished(self, reason: str) -> None:
        """Count an ended answer: ``stop``, ``length``, ``abort`` (its client left) or ``error``."""
        self._finished.labels(self._name, reason).inc()

    def rejected(self, status: int) -> None:
        self._rejected.labels(self._name, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _timed(self, metric: str, said: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(*self._named(metric, said), registry=self._registry, buckets=buckets).labels(self._name)

    def _counter(self, metric: str, said: str, *labels: str) -> Counter:
        return Counter(*self._named(metric, said, *labels), registry=self._registry)

    def _named(self, metric: str, said: str, *labels: str) -> tuple[str, str, tuple[str, ...]]:
        return f"minicpm:{metric}", said, ("model_name", *labels)


class _Guesses(Collector):
    """The counters of speculation, which the engine keeps."""

    def __init__(self, engine: ServingEngine, name: str):
        self._engine, self._name = engine, name

    def collect(self) -> Iterator[CounterMetricFamily]:
        for metric, said, value in (
            ("draft", "Tokens that were guessed.", self._engine.drafted),
            ("accepted", "Guessed tokens that were right.", self._engine.accepted),
        ):
            family = CounterMetricFamily(f"minicpm:spec_decode_num_{metric}_tokens", said, labels=["model_name"])
            family.add_metric([self._name], value)
            yield family


def add_metrics(app: FastAPI, metrics: Metrics) -> None:
    """Serve ``/metrics``."""

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
