"""What Prometheus reads, under vLLM's names with `sparity:` in front, so that its dashboards fit."""

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sparity.serve.guard.guard import Guard
from sparity.serve.scheduler import Scheduler
from sparity.serve.sequence import Answer
from sparity.serve.served_model import ServedModel

LABELS = ("model_name", "engine")
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Guarded(Collector):
    """The numbers of a guard."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def collect(self) -> Iterable[Metric]:
        """As they are now."""
        guard, name = self._guard, [self._guard.sparse.name]
        for label, words, value in (
            ("scored", "Answers that the dense model scored.", guard.scored),
            ("kl_nats", "Their nats per token from the dense model, added up.", guard.total),
            ("alarms", "How often the dense model took over.", guard.alarms),
            ("returns", "How often the sparse model took over again.", guard.returns),
        ):
            counter = CounterMetricFamily(f"sparity:guard_{label}", words, labels=["model_name"])
            counter.add_metric(name, value)
            yield counter
        for label, words, value in (
            ("dense", "1 where the dense model answers.", int(guard.serving is guard.dense)),
            ("evidence", "The evidence for an alarm, or for a return.", guard.evidence),
        ):
            gauge = GaugeMetricFamily(f"sparity:guard_{label}", words, labels=["model_name"])
            gauge.add_metric(name, value)
            yield gauge


class Metrics:
    """The numbers of some models, and of a guard; counted in the worker's thread, read from any."""

    def __init__(self, models: Sequence[ServedModel], guard: Guard | None = None) -> None:
        self._registry = CollectorRegistry()
        self._models = {model.scheduler: model for model in models}
        if guard is not None:
            self._registry.register(Guarded(guard))

        def gauge(name: str, words: str) -> Gauge:
            return Gauge(f"sparity:{name}", words, LABELS, registry=self._registry)

        def counter(name: str, words: str, *more: str) -> Counter:
            return Counter(f"sparity:{name}", words, (*LABELS, *more), registry=self._registry)

        def histogram(name: str, words: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"sparity:{name}", words, LABELS, registry=self._registry, buckets=buckets)

        self._running = gauge("num_requests_running", "Answers that are worked on.")
        self._waiting = gauge("num_requests_waiting", "Answers that wait for a slot.")
        self._cache = gauge("kv_cache_usage_perc", "Share of the cache's tokens that is in use, 1 = all.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._made = counter("generation_tokens", "Tokens of answers.")
        self._cached = counter("prompt_tokens_cached", "Tokens of prompts that were known.")
        self._success = counter("request_success", "Answers that ended well, by why.", "finished_reason")
        self._failed = counter(
            "request_failure", "Answers that ended by a fault or for want of time.", "finished_reason"
        )
        self._queries = counter("prefix_cache_queries", "Tokens that were looked for among known beginnings.")
        self._hits = counter("prefix_cache_hits", "Tokens that were found there.")
        self._corrupted = counter("corrupted_requests", "Answers that ended by logits that are no numbers.")
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN)
        self._between = histogram("request_time_per_output_token_seconds", "Mean time between two tokens.", BETWEEN)
        self._latency = histogram("e2e_request_latency_seconds", "From the request to its last token.", LATENCY)
        self._queue = histogram("request_queue_time_seconds", "From the request to its slot.", LATENCY)
        self._prefill = histogram("request_prefill_time_seconds", "From the slot to the first token.", LATENCY)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", LATENCY)
        self._inference = histogram("request_inference_time_seconds", "From the slot to the last token.", LATENCY)
        self._prompts = histogram("request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self._answers = histogram("request_generation_tokens", "Tokens of an answer.", COUNTS)
        self._most = histogram("request_params_max_tokens", "Tokens of an answer at most, as asked for.", COUNTS)
        self._step = histogram("iteration_tokens_total", "Tokens of a step.", COUNTS)
        self._counted = {scheduler: (scheduler.queried, scheduler.hits) for scheduler in self._models}
        for model in models:  # so that they are there before the first request
            for reason in ("stop", "length"):
                self._success.labels(model.name, model.kind, reason)
            for metric in (self._prompt, self._made, self._cached, self._queries, self._hits, self._corrupted):
                metric.labels(model.name, model.kind)

    def stepped(self, scheduler: Scheduler) -> None:
        """A step was made."""
        labels = self._labels(scheduler)
        self._step.labels(*labels).observe(scheduler.tokens)
        before = self._counted[scheduler]
        self._queries.labels(*labels).inc(scheduler.queried - before[0])
        self._hits.labels(*labels).inc(scheduler.hits - before[1])
        self._counted[scheduler] = scheduler.queried, scheduler.hits

    def finished(self, scheduler: Scheduler, answer: Answer) -> None:
        """An answer has ended."""
        labels, now = self._labels(scheduler), time.monotonic()
        prompt = len(answer.order.prompt)
        self._prompt.labels(*labels).inc(prompt)
        self._made.labels(*labels).inc(answer.made)
        self._cached.labels(*labels).inc(answer.reused)
        good = answer.finish in ("stop", "length")
        (self._success if good else self._failed).labels(*labels, answer.finish).inc()
        if answer.corrupted:
            self._corrupted.labels(*labels).inc()
        for histogram, value in (
            (self._prompts, prompt),
            (self._answers, answer.made),
            (self._most, answer.order.most),
        ):
            histogram.labels(*labels).observe(value)
        self._latency.labels(*labels).observe(now - answer.asked)
        if answer.taken:
            self._queue.labels(*labels).observe(answer.taken - answer.asked)
            self._inference.labels(*labels).observe(now - answer.taken)
        if answer.first:
            self._first.labels(*labels).observe(answer.first - answer.asked)
            self._prefill.labels(*labels).observe(answer.first - answer.taken)
            self._decode.labels(*labels).observe(answer.last - answer.first)
        if answer.made > 1:
            self._between.labels(*labels).observe((answer.last - answer.first) / (answer.made - 1))

    def text(self) -> bytes:
        """All numbers as they are now."""
        for scheduler, model in self._models.items():
            labels, running = (model.name, model.kind), [*scheduler.running.values()]
            room = scheduler.execution.slots * scheduler.execution.context
            self._running.labels(*labels).set(len(running))
            self._waiting.labels(*labels).set(len(scheduler.waiting))
            self._cache.labels(*labels).set(sum(answer.computed for answer in running) / room)
        return generate_latest(self._registry)

    def _labels(self, scheduler: Scheduler) -> tuple[str, str]:
        model = self._models[scheduler]
        return model.name, model.kind
