"""One trace for each run, by OpenTelemetry: OpenInference's spans, and our own where it has none.

    run (agent, team or workflow)
      model call          model_first_token, model_rest
      tool                search: embedding, vector_search
      (gap)               context_assembly: from the end of the last search to the next model call
      member              a run within the run

A processor turns the same spans into `agent_stage_seconds`. So that these are complete, a run that is not sampled is
recorded all the same, and not exported. The stages do not overlap, but `member`, which is a whole run within the run.
A tool counts as `tool` unless it searches or calls a member, whose parts are stages of their own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from agno.db.postgres import PostgresDb
from agno.db.sqlite import SqliteDb
from agno.models.openai import OpenAIChat
from agno.tracing import DatabaseSpanExporter
from fastapi import FastAPI
from openinference.instrumentation.agno import AgnoInstrumentor
from openinference.semconv.resource import ResourceAttributes
from openinference.semconv.trace import OpenInferenceSpanKindValues, SpanAttributes
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace.span import TraceState
from opentelemetry.util.types import Attributes
from wrapt import wrap_function_wrapper

from utils.hosting.config import ServiceConfig
from utils.hosting.logs import log
from utils.hosting.metrics import SPANS_DROPPED, STAGE_SECONDS

KIND, STAGE = SpanAttributes.OPENINFERENCE_SPAN_KIND, "stage"
AGENT, LLM, RETRIEVER, TOOL, CHAIN = (
    getattr(OpenInferenceSpanKindValues, name).value for name in ("AGENT", "LLM", "RETRIEVER", "TOOL", "CHAIN")
)
FIRST_TOKEN = "first token"
QUEUE = 2048  # spans that wait for an exporter; a run has about ten
EXPORT_SECONDS = 3  # that a collector may take
PAUSE_SECONDS = 10  # without another try, after an exporter failed

_tracer: trace.Tracer = trace.NoOpTracer()


@contextmanager
def span(name: str, kind: OpenInferenceSpanKindValues) -> Iterator[trace.Span]:
    """A span of the run that is under way; it is a stage if it is named like one."""
    with _tracer.start_as_current_span(name, attributes={KIND: kind.value, STAGE: name}) as made:
        yield made


def stage_span(stage: str, start: int, end: int | None = None, context: Context | None = None) -> None:
    """A span of something that is over.

    Args:
        stage: one of metrics.STAGES.
        start, end: nanoseconds since 1970; by default it ends now.
        context: with its parent; by default the span that is under way.
    """
    made = _tracer.start_span(stage, context, start_time=start, attributes={KIND: CHAIN, STAGE: stage})
    made.end(end)


class _RecordedAll(Sampler):
    """Exports whole runs by share; records the others for the metrics alone."""

    def __init__(self, share: float) -> None:
        self._share = ParentBased(TraceIdRatioBased(share))

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: trace.SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[trace.Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        found = self._share.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        if found.decision is Decision.DROP:  # which takes the attributes away, too
            return SamplingResult(Decision.RECORD_ONLY, attributes, found.trace_state)
        return found

    def get_description(self) -> str:
        return type(self).__name__


class _Stages(SpanProcessor):
    """Makes the spans that follow from others, and times the stages."""

    def __init__(self) -> None:
        self._found: dict[int, int] = {}  # by trace: when its last search ended, until the model is called
        self._made_of_stages: set[int] = set()  # tools that search or call a member

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        kind, parent = _kind(span), span.parent
        if kind == LLM:
            ended = self._found.pop(span.context.trace_id, None)
            if ended is not None:
                stage_span("context_assembly", ended, span.start_time, parent_context)
        elif kind in (AGENT, RETRIEVER) and parent is not None:
            self._made_of_stages.add(parent.span_id)
            if kind == AGENT:
                span.set_attribute(STAGE, "member")

    def on_end(self, span: ReadableSpan) -> None:
        kind, context = _kind(span), span.context
        assert context is not None and span.start_time is not None and span.end_time is not None
        stage = (span.attributes or {}).get(STAGE)
        if kind == LLM:
            _split_model_call(span)
        elif kind == RETRIEVER:
            self._found[context.trace_id] = span.end_time
        elif kind == TOOL and context.span_id not in self._made_of_stages:
            stage = "tool"
        if stage and kind != RETRIEVER:
            STAGE_SECONDS.labels(stage).observe((span.end_time - span.start_time) / 1e9)
        self._made_of_stages.discard(context.span_id)
        if span.parent is None:
            self._found.pop(context.trace_id, None)


def _kind(span: ReadableSpan) -> object:
    return (span.attributes or {}).get(KIND)


def _split_model_call(call: ReadableSpan) -> None:
    """Until the first token, and the rest. A call that does not stream is all rest: when it began is unknown."""
    assert call.context is not None and call.start_time is not None
    first = next((event.timestamp for event in call.events if event.name == FIRST_TOKEN), None)
    parent = trace.set_span_in_context(trace.NonRecordingSpan(call.context))
    if first is not None:
        stage_span("model_first_token", call.start_time, first, parent)
    stage_span("model_rest", first or call.start_time, call.end_time, parent)


async def _note_first_token(
    stream: Callable[..., AsyncIterator[Any]], model: OpenAIChat, args: tuple[Any, ...], options: dict[str, Any]
) -> AsyncIterator[Any]:
    """Around a model's stream, within OpenInference's span of it, which says only how long all of it took."""
    noted = False
    async for chunk in stream(*args, **options):
        if not noted and (chunk.content or chunk.tool_calls or chunk.reasoning_content):
            noted = True
            trace.get_current_span().add_event(FIRST_TOKEN)
        yield chunk


class _Exports(BatchSpanProcessor):
    """Hands spans over in batches, in a thread of its own, and counts those that are lost."""

    def __init__(self, exporter: SpanExporter, name: str) -> None:
        self._handed = _Handed(exporter, name)
        super().__init__(self._handed, max_queue_size=QUEUE, schedule_delay_millis=1000)

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._handed.add_one()
        super().on_end(span)


class _Handed(SpanExporter):
    """An exporter that fails without harm: one line in the log, then a pause."""

    def __init__(self, exporter: SpanExporter, name: str) -> None:
        self._exporter = exporter
        self._name = name
        self._waiting = 0
        self._counting = threading.Lock()
        self._not_before = 0.0
        self._failing = False

    def add_one(self) -> None:
        """A span joins the queue; when it is full, the oldest one leaves it."""
        with self._counting:
            if self._waiting == QUEUE:
                SPANS_DROPPED.inc()
            else:
                self._waiting += 1

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._counting:
            self._waiting -= len(spans)
        result = SpanExportResult.FAILURE
        if time.monotonic() >= self._not_before:
            result = self._exporter.export(spans)
            if result is SpanExportResult.FAILURE:
                self._not_before = time.monotonic() + PAUSE_SECONDS
                if not self._failing:
                    log.warning("traces are lost", exporter=self._name)
            elif self._failing:
                log.info("traces arrive again", exporter=self._name)
            self._failing = result is SpanExportResult.FAILURE
        if result is SpanExportResult.FAILURE:
            SPANS_DROPPED.inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def trace_runs(app: FastAPI, name: str, config: ServiceConfig, database: SqliteDb | PostgresDb) -> None:
    """Trace the runs of an app from its start to its end, when what waits is exported.

    It is not made the process's tracer provider: that can be set only once, and may be somebody else's.
    """
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        provider = _start(name, config, database)
        try:
            async with inner(app) as state:
                yield state
        finally:
            await asyncio.to_thread(_stop, provider)

    if config.metrics or config.traces_sample:
        app.router.lifespan_context = lifespan


def _start(name: str, config: ServiceConfig, database: SqliteDb | PostgresDb) -> TracerProvider:
    global _tracer
    share = config.traces_sample
    provider = TracerProvider(
        _RecordedAll(share) if config.metrics else ParentBased(TraceIdRatioBased(share)),
        Resource.create({SERVICE_NAME: name, ResourceAttributes.PROJECT_NAME: name}),
        shutdown_on_exit=False,
        span_limits=SpanLimits(max_span_attributes=1024),  # OpenInference has one for each part of each message
    )
    provider.add_span_processor(_Stages())
    if share and config.traces_in_database:
        provider.add_span_processor(_Exports(DatabaseSpanExporter(database), "database"))
    if share and config.otlp_endpoint:
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # _Handed says it once
        exporter = OTLPSpanExporter(f"{config.otlp_endpoint}/v1/traces", timeout=EXPORT_SECONDS)
        provider.add_span_processor(_Exports(exporter, config.otlp_endpoint))
    _tracer = provider.get_tracer("utils.hosting")
    wrap_function_wrapper(OpenAIChat, "ainvoke_stream", _note_first_token)  # before, so that it is within the span
    AgnoInstrumentor().instrument(tracer_provider=provider)
    return provider


def _stop(provider: TracerProvider) -> None:
    global _tracer
    AgnoInstrumentor().uninstrument()
    OpenAIChat.ainvoke_stream = OpenAIChat.ainvoke_stream.__wrapped__  # type: ignore[attr-defined, method-assign]
    _tracer = trace.NoOpTracer()
    provider.shutdown()
