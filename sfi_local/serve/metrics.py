"""Prometheus metrics of a server: counts and times, never text."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sfi_local.serve.worker import Job, Worker

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_PAUSES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("sfi_requests_total", "Requests over HTTP, by route and status.", ["route", "status"], **own)
        self.answers = Counter("sfi_answers_total", "Answers by how they ended.", ["end"], **own)
        self.prompt_tokens = Counter("sfi_prompt_tokens_total", "Tokens of prompts, by where they came from: cached or read.", ["source"], **own)
        self.tokens = Counter("sfi_generated_tokens_total", "Tokens that were generated.", **own)
        self.steps = Counter("sfi_steps_total", "Steps by kind: slow, fast, dense, stock.", ["kind"], **own)
        self.ttft = Histogram("sfi_ttft_seconds", "From a request to its first token.", buckets=_SECONDS, **own)
        self.waited = Histogram("sfi_queue_seconds", "In the queue, before a slot was free.", buckets=_SECONDS, **own)
        self.rate = Histogram("sfi_tokens_per_second", "Of each answer, while it was generated.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500), **own)
        self.pause = Histogram("sfi_stream_pause_seconds", "Between two turns of an answer, while others computed.", buckets=_PAUSES, **own)
        self.kv_read = Histogram("sfi_kv_read_share", "Bytes of K and V that the steps of an answer read, over those of dense ones.",
                                 buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1), **own)
        self._own = own

    def watch(self, worker: Worker, memory: Any) -> None:
        """Read the gauges of a worker when they are asked for. memory: () -> bytes of this process"""
        def gauge(name: str, text: str, read: Any) -> None:
            Gauge(name, text, **self._own).set_function(read)

        gauge("sfi_queue_length", "Answers that wait for a slot.", lambda: worker.n_waiting)
        gauge("sfi_slots", "Answers that can be computed at a time.", lambda: len(worker.slots))
        gauge("sfi_slots_busy", "Answers that are computed.", lambda: sum(slot["state"] != "idle" for slot in worker.describe()))
        gauge("sfi_slot_tokens", "Tokens that the slots hold.", lambda: sum(slot["n_tokens"] for slot in worker.describe()))
        gauge("sfi_memory_bytes", "Memory of this process.", memory)

    def done(self, job: Job, error: BaseException | None) -> None:
        """Count an answer that ended."""
        usage = job.usage
        self.answers.labels("whole" if error is None else type(error).__name__.removesuffix("Error").lower()).inc()
        self.waited.observe(usage.waited)
        if not usage.n_drawn:
            return
        self.ttft.observe(usage.ttft)
        self.prompt_tokens.labels("cached").inc(usage.n_cached)
        self.prompt_tokens.labels("read").inc(usage.n_prompt - usage.n_cached)
        self.tokens.inc(usage.n_drawn)
        for kind, n in usage.kinds.items():
            self.steps.labels(kind).inc(n)
        self.kv_read.observe(usage.kv_read_share)
        if usage.n_drawn > 1 and usage.seconds > usage.ttft:
            self.rate.observe((usage.n_drawn - 1) / (usage.seconds - usage.ttft))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
