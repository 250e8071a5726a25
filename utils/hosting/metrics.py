"""What a service counts and times, for Prometheus: GET /metrics/prometheus.

One `RunRecord` follows each run from its request to its end. Nothing here is sampled but the grades. Every label value
comes from a fixed list: the ids of what is served, the stages, the outcomes.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as written
from prometheus_client.multiprocess import MultiProcessCollector

from utils.faithfulness import LocalGrader, is_refusal
from utils.hosting.logs import log

PATH = "/metrics/prometheus"
STAGES = (
    "embedding",
    "vector_search",
    "context_assembly",
    "model_first_token",
    "model_rest",
    "tool",
    "member",
)
UNKNOWN = "unknown"  # the component of a request that names none of those that are served
WAITING = 64  # jobs after the answer, such as grades; what comes on top is left out
_RUN = ("kind", "component")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STAGE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = tuple(step / 20 for step in range(21))

RUNS = Counter("agent_runs", "Runs that ended, by outcome.", (*_RUN, "outcome"))
RUN_SECONDS = Histogram("agent_run_seconds", "From the request to the end of the run.", _RUN, buckets=_SECONDS)
FIRST_VISIBLE = Histogram(
    "agent_first_visible_token_seconds",
    "From the request to the first event with text in it; streams only.",
    _RUN,
    buckets=_SECONDS,
)
STAGE_SECONDS = Histogram("agent_stage_seconds", "Parts of runs.", ("stage",), buckets=_STAGE_SECONDS)
TOKENS = Counter("agent_tokens", "Tokens of the model, members of a team included.", ("direction", "model"))
COST = Counter("agent_cost_usd", "US dollars by MODEL_PRICES; a model that is not in it costs nothing.", ("model",))
SEARCHES = Counter("agent_searches", "Searches of the knowledge base by runs.", ("outcome",))
DOCUMENTS = Histogram("agent_retrieved_documents", "Chunks that a search found.", buckets=(0, 1, 2, 3, 5, 10, 20))
BEST_SCORE = Histogram("agent_best_score", "Largest cosine similarity of query and found chunk.", buckets=_SHARES)
SCORE_GAP = Histogram("agent_score_gap", "The largest similarity minus the next.", buckets=_SHARES)
AGREEMENT = Histogram(
    "agent_retriever_agreement", "Share of hits that vectors and words (BM25) have in common.", buckets=_SHARES
)
REFUSALS = Counter("agent_refusals", "Runs that declined to answer.", _RUN)
FAITHFULNESS = Histogram("agent_faithfulness", "Share of an answer's sentences that are supported.", buckets=_SHARES)
GRADED = Counter("agent_graded_sentences", "Sentences of answers, by verdict.", ("verdict",))
SPANS_DROPPED = Counter("agent_trace_spans_dropped", "Spans that no exporter took.")
IN_PROGRESS = Gauge("agent_runs_in_progress", "Runs under way.", multiprocess_mode="livesum")

_OUTCOMES = {"COMPLETED": "completed", "ERROR": "failed", "CANCELLED": "cancelled", "PAUSED": "paused"}
_current: ContextVar[RunRecord | None] = ContextVar("run", default=None)


def current_run() -> RunRecord | None:
    """The run that this task or thread works for."""
    return _current.get()


class RunMetrics:
    """Counts the runs of one service.

    Args:
        components: the ids that are served, by kind: "agent", "team", "workflow".
        model: the id of the configured chat model.
        prices: US dollars per million tokens in and out, by model id.
        grade_sample: share of runs, 0 to 1, that are graded.
        enabled: False counts nothing.
    """

    def __init__(
        self,
        components: Mapping[str, set[str]],
        model: str = UNKNOWN,
        prices: Mapping[str, tuple[float, float]] | None = None,
        grade_sample: float = 0,
        enabled: bool = True,
    ) -> None:
        self._components = components
        self.model = model
        self.price = (prices or {}).get(model)
        self.enabled = enabled
        self._grade_sample = grade_sample if enabled else 0
        self.after_answers = _AfterAnswers()
        if enabled:
            self._show_zeros()

    def _show_zeros(self) -> None:
        """A rate from nothing to the first failure is seen only if the series was there before, at 0."""
        for kind, ids in self._components.items():
            for component in ids:
                for outcome in (*_OUTCOMES.values(), "refused", "aborted"):
                    RUNS.labels(kind, component, outcome)
                REFUSALS.labels(kind, component)
                RUN_SECONDS.labels(kind, component)
                FIRST_VISIBLE.labels(kind, component)
        for stage in STAGES:
            STAGE_SECONDS.labels(stage)
        for outcome in ("found", "empty", "failed"):
            SEARCHES.labels(outcome)
        for direction in ("input", "output"):
            TOKENS.labels(direction, self.model)
        for verdict in ("supported", "contradicted", "not_found"):
            GRADED.labels(verdict)
        if self.price:
            COST.labels(self.model)

    def begin(self, kind: str, component: str) -> RunRecord:
        """A run begins: its record, which is also the `current_run()` of this task and of all that it starts."""
        known = component in self._components.get(kind, ())
        sampled = random.random() < self._grade_sample
        record = RunRecord(self, kind, component if known else UNKNOWN, sampled)
        _current.set(record)
        return record


class RunRecord:
    """One run under way.

    Attributes:
        sampled: whether its answer is graded and its searches are compared.
        after_answer: does a job in another thread, when there is time.
    """

    def __init__(self, metrics: RunMetrics, kind: str, component: str, sampled: bool) -> None:
        self._metrics = metrics
        self._labels = (kind, component)
        self._started = time.perf_counter()
        self._visible = self._ended = False
        self.sampled = sampled
        self._sources: dict[tuple[Any, Any], Mapping[str, Any]] = {}  # by name and content
        self.after_answer = metrics.after_answers.do
        if metrics.enabled:
            IN_PROGRESS.inc()

    @property
    def enabled(self) -> bool:
        """Whether anything is counted."""
        return self._metrics.enabled

    def show(self) -> None:
        """The client sees text; only the first time counts."""
        if self.enabled and not self._visible:
            self._visible = True
            FIRST_VISIBLE.labels(*self._labels).observe(time.perf_counter() - self._started)

    def count_search(self, documents: Sequence[Mapping[str, Any]] | None, scores: list[float]) -> None:
        """A search of the knowledge base ended.

        Args:
            documents: what it found, with name and content; None if it failed.
            scores: the cosine similarity of the query and each of them, as far as known.
        """
        if not self.enabled:
            return
        SEARCHES.labels("failed" if documents is None else "found" if documents else "empty").inc()
        if documents is None:
            return
        DOCUMENTS.observe(len(documents))
        nearest = sorted(scores, reverse=True)
        if nearest:
            BEST_SCORE.observe(max(nearest[0], 0.0))
        if len(nearest) > 1:
            SCORE_GAP.observe(nearest[0] - nearest[1])
        self.add_sources(documents)

    def add_sources(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """The model was given documents, which its answer is graded by.

        Args:
            documents: with content, and a name if they have one.
        """
        if self.sampled:
            self._sources.update({(document.get("name"), document["content"]): document for document in documents})

    def end(
        self, status: str | None, http_status: int | None, tokens: tuple[int | None, int | None], answer: str
    ) -> None:
        """The run is over; only the first time counts.

        Args:
            status: as Agno says it, such as "COMPLETED"; None if there was no run or its end was not seen.
            http_status: of the answer; None if none began.
            tokens: in and out.
            answer: the text.
        """
        if not self.enabled or self._ended:
            return
        self._ended = True
        IN_PROGRESS.dec()
        outcome = _outcome(status, http_status)
        RUNS.labels(*self._labels, outcome).inc()
        if outcome != "refused":
            RUN_SECONDS.labels(*self._labels).observe(time.perf_counter() - self._started)
        model, price = self._metrics.model, self._metrics.price
        for number, direction in enumerate(("input", "output")):
            TOKENS.labels(direction, model).inc(tokens[number] or 0)
            if price:
                COST.labels(model).inc((tokens[number] or 0) * price[number] / 1e6)
        if outcome == "completed":
            self.after_answer(lambda: self._judge(answer))

    def _judge(self, answer: str) -> None:
        if is_refusal(answer):
            REFUSALS.labels(*self._labels).inc()
        elif self.sampled and self._sources:
            verdicts = LocalGrader().grade(answer, [*self._sources.values()])
            for verdict in verdicts:
                GRADED.labels(verdict.verdict).inc()
            if verdicts:
                supported = sum(verdict.verdict == "supported" for verdict in verdicts)
                FAITHFULNESS.observe(supported / len(verdicts))


def _outcome(status: str | None, http_status: int | None) -> str:
    """What became of a request for a run. What the caller is to blame for, such as an own filter, is no failure."""
    if http_status is not None and 400 <= http_status < 500:
        return "refused"
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    return "failed" if http_status is not None and http_status >= 500 else "aborted"


class _AfterAnswers:
    """One thread for what no client waits for; it starts with the first job."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(WAITING)
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Do the job later, or never if too many wait."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="after-answers", daemon=True)
                self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            log.warning("not graded", waiting=WAITING)

    def _work(self) -> None:
        while True:
            try:
                self._jobs.get()()
            except Exception as error:  # whatever a grade failed of, the next one goes on
                log.error("not graded", error=f"{type(error).__name__}: {error}")


def metrics_router() -> APIRouter:
    """The route PATH. With several workers it adds up what all of them counted."""
    router = APIRouter()

    @router.get(PATH, include_in_schema=False)
    def read() -> Response:
        registry = REGISTRY
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return Response(written(registry), media_type=CONTENT_TYPE_LATEST)

    return router
