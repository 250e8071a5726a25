"""What a service counts and times, read from its own endpoint after real runs over HTTP."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import model_environment
from prometheus_client.parser import text_string_to_metric_families
from service_runs import background_run, stream_run
from waiting import wait_for

from utils import offline
from utils.bootstrap import ROOT
from utils.hosting.metrics import PATH, STAGES
from utils.milvus_lab.lite import LiteServer
from utils.offline import OfflineServer
from utils.service import Service, service

RUNS = "/agents/knowledge-assistant/runs"
TEAM, WORKFLOW = "/teams/research-team/runs", "/workflows/research-workflow/runs"
AGENT = {"kind": "agent", "component": "knowledge-assistant"}
QUESTION = "When does the canteen close on Fridays?"
CANTEEN = "# Canteen\n\nThe canteen closes at 14:30 on Fridays."
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Figures:
    """What the endpoint says, less what it said before."""

    def __init__(self, api: httpx.Client) -> None:
        self._api = api
        self._before = self.read()

    def read(self) -> Samples:
        answer = self._api.get(PATH, headers={"Authorization": ""})
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.text)
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def added(self, name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return self.read().get(key, 0) - self._before.get(key, 0)

    def stages(self) -> dict[str, float]:
        return {stage: self.added("agent_stage_seconds_count", stage=stage) for stage in STAGES}


def client(found: Service) -> httpx.Client:
    return httpx.Client(base_url=found.url, timeout=60, trust_env=False)


def upload(api: httpx.Client, name: str = "canteen.md", text: str = CANTEEN) -> None:
    sent = api.post("/knowledge/content", files={"file": (name, text)}).json()["id"]
    assert wait_for(lambda: api.get(f"/knowledge/content/{sent}/status").json().get("status") == "completed")


def ask(api: httpx.Client, path: str = RUNS, message: str = QUESTION, **fields: str) -> httpx.Response:
    return api.post(path, data={"message": message, "stream": "false", **fields})


@pytest.fixture(scope="module")
def environment(offline_environment: dict[str, str]) -> dict[str, str]:
    return {
        **offline_environment,
        "GRADE_SAMPLE": "1",
        "MODEL_PRICES": f"{offline_environment['MODEL_ID']}=1000000/2000000",
    }


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("agent"), environment, progress=False) as found:
        with client(found) as api:
            upload(api)
        yield found


@pytest.fixture
def api(agent: Service) -> Iterator[httpx.Client]:
    with client(agent) as made:
        yield made


@pytest.fixture(scope="module")
def team_api(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("team")
    with service(folder, environment, app="utils.apps.research_team", progress=False) as found, client(found) as made:
        upload(made)
        yield made


def test_a_streamed_run_is_counted_with_its_stages_tokens_cost_and_quality(
    api: httpx.Client, environment: dict[str, str]
) -> None:
    figures, model = Figures(api), environment["MODEL_ID"]
    metrics = stream_run(api, RUNS, QUESTION)[-1][1]["metrics"]
    # The client has its last event a moment before the run is counted.
    assert wait_for(lambda: figures.added("agent_runs_total", **AGENT, outcome="completed") == 1)
    assert figures.added("agent_run_seconds_count", **AGENT) == 1
    first = figures.added("agent_first_visible_token_seconds_sum", **AGENT)
    assert 0 < first <= figures.added("agent_run_seconds_sum", **AGENT)
    tokens = [metrics["input_tokens"], metrics["output_tokens"]]
    assert all(tokens)
    assert [figures.added("agent_tokens_total", direction=d, model=model) for d in ("input", "output")] == tokens
    assert figures.added("agent_cost_usd_total", model=model) == pytest.approx(tokens[0] + 2 * tokens[1])
    once = {"embedding": 1, "vector_search": 1, "context_assembly": 1, "tool": 0, "member": 0}
    assert figures.stages() == {**once, "model_first_token": 2, "model_rest": 2}  # the search, then the answer
    assert figures.added("agent_searches_total", outcome="found") == 1
    assert figures.added("agent_retrieved_documents_sum") == 1
    assert 0.3 < figures.added("agent_best_score_sum") <= 1
    assert figures.added("agent_score_gap_count") == 0, "there is one document"
    # After the answer: the grade, and the same search by vectors and by words.
    assert wait_for(lambda: figures.added("agent_faithfulness_count") == 1)
    assert figures.added("agent_faithfulness_sum") == 1
    assert figures.added("agent_graded_sentences_total", verdict="supported") == 1
    assert (figures.added("agent_retriever_agreement_count"), figures.added("agent_retriever_agreement_sum")) == (1, 1)
    assert figures.added("agent_refusals_total", **AGENT) == 0
    assert figures.read()["agent_runs_in_progress", frozenset()] == 0


def test_a_run_that_does_not_stream_and_one_in_the_background_are_counted_when_they_end(api: httpx.Client) -> None:
    figures = Figures(api)
    ask(api)
    assert wait_for(lambda: figures.added("agent_runs_total", **AGENT, outcome="completed") == 1)
    assert figures.stages()["model_first_token"] == 0 and figures.stages()["model_rest"] == 2
    found = background_run(api, RUNS, QUESTION, "monitored")
    assert found["status"] == "COMPLETED"
    assert wait_for(lambda: figures.added("agent_runs_total", **AGENT, outcome="completed") == 2)
    assert figures.added("agent_run_seconds_count", **AGENT) == 2
    assert figures.added("agent_first_visible_token_seconds_count", **AGENT) == 0
    assert wait_for(lambda: figures.added("agent_faithfulness_count") == 2)
    assert figures.read()["agent_runs_in_progress", frozenset()] == 0


def test_what_finds_nothing_is_empty_and_its_answer_a_refusal(tmp_path: Path, environment: dict[str, str]) -> None:
    with service(tmp_path, environment, progress=False) as found, client(found) as api:
        figures = Figures(api)
        stream_run(api, RUNS, QUESTION)
        assert figures.added("agent_searches_total", outcome="empty") == 1
        assert figures.added("agent_retrieved_documents_count") == 1
        assert figures.added("agent_retrieved_documents_sum") == figures.added("agent_best_score_count") == 0
        assert wait_for(lambda: figures.added("agent_refusals_total", **AGENT) == 1)
        assert figures.added("agent_faithfulness_count") == 0


def test_a_filter_that_cannot_be_is_the_callers_fault_and_no_failure(api: httpx.Client) -> None:
    figures = Figures(api)
    assert ask(api, knowledge_filters=json.dumps({"name": {"no": "value"}})).status_code == 422
    assert wait_for(lambda: figures.added("agent_runs_total", **AGENT, outcome="refused") == 1)
    assert figures.added("agent_runs_total", **AGENT, outcome="failed") == 0
    assert figures.added("agent_searches_total", outcome="failed") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's disk that is always full")
def test_log_lines_that_a_full_disk_refuses_are_counted() -> None:
    code = "from utils.hosting.logs import LINES_LOST, configure_logs, log\nimport sys\nconfigure_logs('INFO')\n"
    code += "for _ in range(3):\n    log.info('run')\nprint(LINES_LOST.collect()[0].samples[0].value, file=sys.stderr)"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert float(done.stderr.splitlines()[0]) == 3, "and nothing is raised"


def test_refused_requests_are_counted_under_known_names_only(api: httpx.Client) -> None:
    figures = Figures(api)
    assert api.post(RUNS).status_code == 422
    assert ask(api, "/agents/nobody-knows-this/runs").status_code == 404
    assert wait_for(lambda: figures.added("agent_runs_total", **AGENT, outcome="refused") == 1)
    assert wait_for(
        lambda: figures.added("agent_runs_total", kind="agent", component="unknown", outcome="refused") == 1
    )
    assert figures.added("agent_run_seconds_count", **AGENT) == 0
    assert "nobody-knows-this" not in api.get(PATH).text


@pytest.mark.parametrize(
    ("app", "path"),
    [("knowledge_agent", RUNS), ("research_team", TEAM), ("research_team", WORKFLOW)],
    ids=["agent", "team", "workflow"],
)
def test_a_stream_without_its_client_is_aborted_or_goes_on_in_the_background(
    tmp_path: Path, milvus_lite_server: LiteServer, app: str, path: str
) -> None:
    _, kinds, component, _ = path.split("/")
    labels = {"kind": kinds.rstrip("s"), "component": component}
    with offline.start(tmp_path / "model.log", tokens_per_second=20) as server:
        settings = {
            **model_environment(server),
            "MILVUS_URI": milvus_lite_server.uri,
            "MILVUS_COLLECTION": "left_alone",
        }
        with service(tmp_path, settings, app=f"utils.apps.{app}", progress=False) as found, client(found) as api:
            upload(api)
            figures = Figures(api)

            def ended() -> dict[str, float]:
                outcomes = ("completed", "failed", "cancelled", "aborted")
                return {o: n for o in outcomes if (n := figures.added("agent_runs_total", **labels, outcome=o))}

            leave(api, path)
            assert wait_for(ended) and ended() == {"aborted": 1}
            leave(api, path, background="true")
            assert wait_for(lambda: len(ended()) == 2) and ended() == {"aborted": 1, "completed": 1}
            assert figures.read()["agent_runs_in_progress", frozenset()] == 0


def leave(api: httpx.Client, path: str, **fields: str) -> None:
    """Begin a stream, and go away after its first event."""
    with api.stream("POST", path, data={"message": QUESTION, "stream": "true", **fields}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                return


def test_with_a_dead_model_each_kind_of_run_is_a_failed_one(tmp_path: Path, milvus_lite_server: LiteServer) -> None:
    with contextlib.ExitStack() as stack:
        server: OfflineServer = stack.enter_context(offline.start(tmp_path / "model.log"))
        settings = {**model_environment(server), "MILVUS_URI": milvus_lite_server.uri, "MILVUS_COLLECTION": "monitored"}
        found = stack.enter_context(service(tmp_path / "service", settings, progress=False))
        api = stack.enter_context(client(found))
        upload(api)
        figures = Figures(api)
        server.process.stop()
        assert ask(api).status_code == 502
        assert stream_run(api, RUNS, QUESTION)[-1][0] == "RunError"
        assert background_run(api, RUNS, QUESTION, "failing")["status"] == "ERROR"
        assert wait_for(lambda: figures.added("agent_runs_total", **AGENT, outcome="failed") == 3)
        assert figures.read()["agent_runs_in_progress", frozenset()] == 0


def test_a_team_and_a_workflow_are_counted_with_their_members(team_api: httpx.Client) -> None:
    figures = Figures(team_api)
    stream_run(team_api, TEAM, QUESTION)
    labels = {"kind": "team", "component": "research-team"}
    assert wait_for(lambda: figures.added("agent_faithfulness_count") == 1), "graded, so counted, too"
    assert figures.added("agent_runs_total", **labels, outcome="completed") == 1
    assert figures.added("agent_first_visible_token_seconds_count", **labels) == 1
    stages = figures.stages()
    assert (stages["member"], stages["embedding"], stages["vector_search"]) == (2, 1, 1), "the second search is shared"
    figures = Figures(team_api)
    ask(team_api, WORKFLOW)
    labels = {"kind": "workflow", "component": "research-workflow"}
    assert wait_for(lambda: figures.added("agent_faithfulness_count") == 1)
    assert figures.added("agent_runs_total", **labels, outcome="completed") == 1
    assert figures.stages()["context_assembly"] == figures.stages()["vector_search"] == 1


def test_the_answer_to_a_kept_search_is_graded_too(team_api: httpx.Client) -> None:
    figures = Figures(team_api)
    for number in (1, 2):
        assert ask(team_api, TEAM, session_id="kept", user_id="ann").status_code == 200
        assert wait_for(lambda: figures.added("agent_faithfulness_count") == number)  # noqa: B023
    assert figures.added("agent_searches_total", outcome="found") == 1


def test_two_workers_add_up(
    tmp_path: Path, offline_environment: dict[str, str], milvus_lite_server: LiteServer
) -> None:
    settings = {**offline_environment, "MILVUS_URI": milvus_lite_server.uri, "MILVUS_COLLECTION": "monitored_by_two"}
    with service(tmp_path, {**settings, "SERVICE_WORKERS": "2"}, progress=False) as found:
        for _ in range(12):
            with client(found) as api:  # a connection of its own, so that either worker may take it
                assert ask(api).status_code == 200
        with client(found) as api:
            figures = Figures(api)
            key = ("agent_runs_total", frozenset({**AGENT, "outcome": "completed"}.items()))
            assert wait_for(lambda: figures.read()[key] == 12)
            read = [Figures(api).read() for _ in range(4)]
        assert {figures[key] for figures in read} == {12}
        assert {figures["agent_runs_in_progress", frozenset()] for figures in read} == {0}


def test_without_metrics_there_is_no_endpoint(tmp_path: Path, offline_environment: dict[str, str]) -> None:
    settings = {**offline_environment, "METRICS": "false", "TRACES_SAMPLE": "0"}
    with service(tmp_path, settings, progress=False) as found, client(found) as api:
        assert api.get(PATH).status_code == 404
        assert ask(api).json()["status"] == "COMPLETED"
