"""Traces of real runs: what is in the database and what a collector receives, and what is not exported."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from service_runs import background_run, stream_run
from test_monitoring import AGENT, QUESTION, RUNS, TEAM, WORKFLOW, Figures, ask, client, upload
from waiting import wait_for
from web_servers import QuietHandler, serving

from utils.service import Service, service

LEAVES = ["embedding", "vector_search", "context_assembly", "model_first_token", "model_rest"]


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP; `spans` are what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Receiver(QuietHandler):
    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        assert isinstance(self.server, Collector) and self.path == "/v1/traces"
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with serving(Collector()) as server:
        yield server


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, offline_environment: dict[str, str], collector: Collector
) -> Iterator[httpx.Client]:
    settings = {**offline_environment, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    with service(tmp_path_factory.mktemp("agent"), settings, progress=False) as found, client(found) as made:
        upload(made)
        yield made


def trace_of(api: httpx.Client, run_id: str) -> dict[str, Any]:
    """The trace that AgentOS shows for a run, once it is there: its own row comes first, then the last of its spans."""
    trace: dict[str, Any] = {}

    def there() -> bool:
        for found in api.get("/traces", params={"run_id": run_id}).json()["data"]:
            trace.update(api.get(f"/traces/{found['trace_id']}").json())
        return bool(trace) and trace["name"] in names(trace)

    assert wait_for(there)
    return trace


def spans_of(tree: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    for span in tree or []:
        yield span
        yield from spans_of(span.get("spans"))


def names(trace: dict[str, Any]) -> list[str]:
    """Of all spans, in the order in which they began."""
    return [span["name"] for span in sorted(spans_of(trace["tree"]), key=lambda span: str(span["start_time"]))]


def seconds(text: str) -> float:
    unit = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
    for ending, factor in unit.items():
        if text.endswith(ending) and text[: -len(ending)].replace(".", "").isdigit():
            return float(text[: -len(ending)]) * factor
    raise AssertionError(text)


def test_a_streamed_run_is_one_trace_with_its_ids_and_its_stages_in_order(
    api: httpx.Client, collector: Collector
) -> None:
    run = stream_run(api, RUNS, QUESTION, session_id="traced", user_id="ann")[-1][1]
    trace = trace_of(api, run["run_id"])
    assert (trace["session_id"], trace["run_id"], trace["agent_id"]) == ("traced", run["run_id"], AGENT["component"])
    assert trace["status"] == "OK" and trace["user_id"] == "ann"
    model = ["model_first_token", "model_rest"]
    stages = [name for name in names(trace) if name in LEAVES]
    assert stages == [*model, "embedding", "vector_search", "context_assembly", *model]
    # What a collector receives is the same trace.
    assert wait_for(lambda: len(sent_of(collector, trace["trace_id"])) == trace["total_spans"])
    sent = sent_of(collector, trace["trace_id"])
    assert sorted(span.name for span in sent) == sorted(names(trace))
    root = next(span for span in sent if not span.parent_span_id)
    leaves = [span for span in sent if span.name in LEAVES]
    assert sum(end(span) - begin(span) for span in leaves) <= end(root) - begin(root)
    ordered = sorted(leaves, key=begin)
    assert all(end(first) <= begin(second) for first, second in zip(ordered, ordered[1:], strict=False))


def sent_of(collector: Collector, trace_id: str) -> list[Any]:
    return [span for span in collector.spans if span.trace_id.hex() == trace_id]


def begin(span: Any) -> int:
    return int(span.start_time_unix_nano)


def end(span: Any) -> int:
    return int(span.end_time_unix_nano)


def test_runs_that_do_not_stream_and_in_the_background_are_traced_too(api: httpx.Client) -> None:
    for run in (ask(api, session_id="plain").json(), background_run(api, RUNS, QUESTION, "behind")):
        trace = trace_of(api, run["run_id"])
        assert trace["session_id"] == run["session_id"] and "vector_search" in names(trace)


def test_members_of_a_team_and_steps_of_a_workflow_are_spans(
    tmp_path: Path, offline_environment: dict[str, str]
) -> None:
    with (
        service(tmp_path, offline_environment, app="utils.apps.research_team", progress=False) as found,
        client(found) as api,
    ):
        upload(api)
        run = stream_run(api, TEAM, QUESTION)[-1][1]
        trace = trace_of(api, run["run_id"])
        assert trace["team_id"] == "research-team" and trace["session_id"] == run["session_id"]
        found_names = names(trace)
        assert [name.split(".")[0] for name in found_names if name.startswith(("Analyst.", "Writer."))] == [
            "Analyst",
            "Writer",
        ]
        assert found_names.count("embedding") == 1, "one search serves both"
        run = ask(api, WORKFLOW).json()
        trace = trace_of(api, run["run_id"])
        assert trace["workflow_id"] == "research-workflow" and "vector_search" in names(trace)


def test_what_is_not_sampled_is_not_exported_and_the_metrics_are_complete(
    tmp_path: Path, offline_environment: dict[str, str]
) -> None:
    with serving(Collector()) as collector:
        settings = {**offline_environment, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "TRACES_SAMPLE": "0"}
        with service(tmp_path, settings, progress=False) as found, client(found) as api:
            figures = Figures(api)
            stream_run(api, RUNS, QUESTION)
            stages = figures.stages()
            assert api.get("/traces").json()["data"] == []
        assert collector.spans == []
    assert {name: stages[name] for name in LEAVES} == dict(zip(LEAVES, (1, 1, 1, 2, 2), strict=True))


def test_a_dead_collector_costs_one_line_and_no_run(
    tmp_path: Path, offline_environment: dict[str, str], closed_port: int
) -> None:
    settings = {**offline_environment, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{closed_port}"}
    with service(tmp_path, settings, progress=False) as found, client(found) as api:
        figures = Figures(api)
        first = ask(api).json()
        assert wait_for(lambda: figures.added("agent_trace_spans_dropped_total") > 0)
        second = ask(api).json()
        for run in (first, second):
            assert run["status"] == "COMPLETED" and trace_of(api, run["run_id"])["run_id"] == run["run_id"]
        found.stop()
    assert lines_about_traces(found) == 1


def lines_about_traces(found: Service) -> int:
    lines = found.log_file.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if '"exception"' in line or "opentelemetry" in line]
    return sum("traces are lost" in line for line in lines)


def test_what_waits_is_exported_at_an_orderly_end(tmp_path: Path, offline_environment: dict[str, str]) -> None:
    with serving(Collector()) as collector:
        settings = {**offline_environment, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        with service(tmp_path, settings, progress=False) as found, client(found) as api:
            run = ask(api).json()
            found.stop()
        roots = [span for span in collector.spans if not span.parent_span_id]
        ids = {one.key: one.value.string_value for span in roots for one in span.attributes}
        assert ids["agno.run.id"] == run["run_id"]


def test_what_the_database_does_not_take_is_counted(tmp_path: Path, offline_environment: dict[str, str]) -> None:
    with service(tmp_path, offline_environment, progress=False) as found, client(found) as api:
        trace_of(api, ask(api).json()["run_id"])
        with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as database:
            database.execute("ALTER TABLE agno_spans RENAME TO agno_spans_away")
        figures = Figures(api)
        run = ask(api, message="lost-words").json()
        assert run["status"] == "COMPLETED"
        assert wait_for(lambda: figures.added("agent_trace_spans_dropped_total") > 0)
        found.stop()
    assert lines_about_traces(found) == 1
    assert "lost-words" not in found.log_file.read_text(encoding="utf-8"), "what was asked is not for the log"
