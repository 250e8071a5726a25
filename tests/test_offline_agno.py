"""Agno 3.1.10, unchanged, against the offline server: models, embedder, agents, teams, workflows, memory, evals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agno.agent import Agent
from agno.db.sqlite import SqliteDb
from agno.eval.accuracy import AccuracyEval
from agno.eval.agent_as_judge import AgentAsJudgeEval
from agno.knowledge.embedder.openai import OpenAIEmbedder
from agno.models.openai import OpenAIChat, OpenAILike
from agno.run import RunStatus
from agno.run.agent import RunContentEvent
from agno.team import Team
from agno.team.mode import TeamMode
from agno.tools import tool
from agno.workflow import Step, StepInput, StepOutput, Workflow
from offline_messages import BACKUP, BACKUP_QUESTION, OTHER_QUESTION, PORT_QUESTION, PORTS, Json
from pydantic import BaseModel

from utils.offline import CHAT_MODEL, DIMENSIONS, EMBEDDING_MODEL, OfflineServer
from utils.offline.answers import REFUSAL

PORT_ANSWER = "Milvus listens for clients on port 19530. [milvus-ports]"


class Documents:
    """A knowledge_retriever that finds both documents and notes what it was asked."""

    def __init__(self) -> None:
        self.queries: list[str] = []

    def __call__(self, query: str, num_documents: int | None = None, **_: Any) -> list[Json]:
        self.queries.append(query)
        return [PORTS, BACKUP]


@pytest.fixture
def documents() -> Documents:
    return Documents()


@pytest.fixture
def model(offline_server: OfflineServer) -> OpenAILike:
    return OpenAILike(id=CHAT_MODEL, base_url=offline_server.base_url, api_key=offline_server.api_key)


@pytest.fixture
def db(tmp_path: Path) -> SqliteDb:
    return SqliteDb(db_file=str(tmp_path / "agno.db"))


def agent_with(model: OpenAIChat, documents: Documents | None = None, **options: Any) -> Agent:
    if documents is not None:
        options |= {"knowledge_retriever": documents, "search_knowledge": True}
    return Agent(model=model, telemetry=False, **options)


def tools_called(run: Any) -> list[str]:
    return [str(made.tool_name) for made in run.tools or []]


# Models and embedder


@pytest.mark.parametrize("kind", [OpenAILike, OpenAIChat])
def test_an_agent_searches_and_answers(offline_server: OfflineServer, documents: Documents, kind: Any) -> None:
    """OpenAIChat sends its system message in the role `developer`."""
    model = kind(id=CHAT_MODEL, base_url=offline_server.base_url, api_key=offline_server.api_key)
    run = agent_with(model, documents, description="You answer questions.").run(PORT_QUESTION)
    assert (run.status, run.content, run.model) == (RunStatus.completed, PORT_ANSWER, CHAT_MODEL)
    assert documents.queries == [PORT_QUESTION]
    assert tools_called(run) == ["search_knowledge_base"]
    assert run.references and run.metrics and run.metrics.total_tokens > 0
    declined = agent_with(model, documents).run(OTHER_QUESTION)
    assert (declined.status, declined.content) == (RunStatus.completed, REFUSAL)


def test_an_agent_runs_async_and_streams_the_same_answer(model: OpenAILike, documents: Documents) -> None:
    agent = agent_with(model, documents)
    question = f"{PORT_QUESTION} {BACKUP_QUESTION}"
    whole = str(agent.run(question).content)
    assert whole.startswith(PORT_ANSWER.split(" [")[0]) and "[milvus-backup]" in whole
    pieces = [e.content for e in agent.run(question, stream=True) if isinstance(e, RunContentEvent) and e.content]
    assert "".join(pieces) == whole and len(pieces) > 5

    async def others() -> tuple[Any, str]:  # in one event loop: Agno keeps its client, which belongs to the first
        run = await agent.arun(question)
        events = agent.arun(question, stream=True)
        return run.content, "".join([e.content async for e in events if isinstance(e, RunContentEvent) and e.content])

    assert asyncio.run(others()) == (whole, whole)
    assert documents.queries == [PORT_QUESTION, BACKUP_QUESTION] * 4


def test_knowledge_in_the_context_instead_of_a_tool(model: OpenAILike, documents: Documents) -> None:
    options: Json = {"add_knowledge_to_context": True, "search_knowledge": False, "knowledge_retriever": documents}
    for references_format in ("json", "yaml"):
        run = Agent(model=model, telemetry=False, references_format=references_format, **options).run(PORT_QUESTION)
        assert (run.content, tools_called(run)) == (PORT_ANSWER, [])


def test_a_failing_search_is_told(model: OpenAILike) -> None:
    def broken(query: str, **_: Any) -> list[Json | str] | None:
        raise ConnectionError("Milvus is down")

    run = Agent(model=model, telemetry=False, knowledge_retriever=broken, search_knowledge=True).run(PORT_QUESTION)
    assert run.status == RunStatus.completed
    assert "port 19530" not in str(run.content)


def test_a_wrong_key_is_an_error_of_the_run(offline_server: OfflineServer) -> None:
    model = OpenAILike(id=CHAT_MODEL, base_url=offline_server.base_url, api_key="wrong")
    run = Agent(model=model, telemetry=False).run("x")
    assert run.status == RunStatus.error and "Incorrect API key" in str(run.content)


def test_the_embedder(offline_server: OfflineServer) -> None:
    texts = [PORT_QUESTION, BACKUP_QUESTION, "port 19530"]
    for size in (64, DIMENSIONS):
        embedder = OpenAIEmbedder(
            id=EMBEDDING_MODEL, base_url=offline_server.base_url, api_key=offline_server.api_key, dimensions=size
        )
        single = [embedder.get_embedding(text) for text in texts]
        assert np.shape(single) == (3, size)
        assert np.allclose(np.linalg.norm(single, axis=1), 1, atol=1e-5)

        async def others(embedder: OpenAIEmbedder = embedder) -> tuple[Any, Any, Any]:
            one = await embedder.async_get_embedding(texts[0])
            vector, usage = await embedder.async_get_embedding_and_usage(texts[0])
            batch, _ = await embedder.async_get_embeddings_batch_and_usage(texts)
            assert usage and usage["prompt_tokens"] > 0
            return one, vector, batch

        one, vector, batch = asyncio.run(others())
        assert np.allclose(one, single[0], atol=1e-6) and np.allclose(vector, single[0], atol=1e-6)
        assert np.allclose(batch, single, atol=1e-6)


# Structured output and tools


class Evidence(BaseModel):
    document: str
    quote: str


class Reply(BaseModel):
    answer: str
    sources: list[str]
    port: int
    evidence: Evidence | None


def test_structured_output_together_with_a_search(model: OpenAILike, documents: Documents) -> None:
    run = agent_with(model, documents, output_schema=Reply).run(PORT_QUESTION)
    assert isinstance(run.content, Reply)
    assert (run.content.sources, run.content.port) == (["milvus-ports"], 19530)
    assert tools_called(run) == ["search_knowledge_base"]
    as_json = agent_with(model, documents, output_schema=Evidence, use_json_mode=True).run(PORT_QUESTION)
    assert as_json.status == RunStatus.completed


def test_a_tool_gets_its_arguments_and_its_result_is_told(model: OpenAILike) -> None:
    def multiply(a: int, b: int) -> int:
        """Multiply two numbers."""
        return a * b

    run = Agent(model=model, telemetry=False, tools=[multiply]).run("Please multiply 6 by 7.")
    assert run.content == "multiply returned: 42"


def test_a_tool_that_needs_confirmation_pauses_and_continues(model: OpenAILike, db: SqliteDb) -> None:
    dropped = []

    @tool(requires_confirmation=True)
    def drop_collection(name: str) -> str:
        """Drop a collection."""
        dropped.append(name)
        return f"{name} is gone"

    for confirmed in (True, False):
        agent = Agent(model=model, telemetry=False, db=db, tools=[drop_collection])
        run = agent.run("Please drop the collection 'docs'.")
        assert run.is_paused and dropped == []
        (requirement,) = run.active_requirements
        assert requirement.tool_execution is not None
        assert requirement.tool_execution.tool_args == {"name": "docs"}
        decide: Callable[[], object] = requirement.confirm if confirmed else requirement.reject
        decide()
        done = agent.continue_run(run_id=run.run_id, requirements=run.requirements, session_id=run.session_id)
        assert done.status == RunStatus.completed
        assert dropped == (["docs"] if confirmed else [])
        assert ("docs is gone" in str(done.content)) is confirmed
        dropped.clear()


# Teams and workflows


Made = tuple[Team, Documents, Documents]


@pytest.fixture
def team_of(model: OpenAILike) -> Callable[..., Made]:
    """Makes a team of an analyst and a writer, each with a knowledge base of its own."""

    def make(mode: TeamMode, **options: Any) -> Made:
        ports, others = Documents(), Documents()
        analyst = agent_with(model, ports, name="Analyst", role="Finds facts about Milvus ports in the documents")
        writer = agent_with(model, others, name="Writer", role="Writes poems and greetings")
        team = Team(name="Lead", model=model, members=[analyst, writer], mode=mode, telemetry=False, **options)
        return team, ports, others

    return make


@pytest.mark.parametrize("way", ["run", "arun", "stream"])
@pytest.mark.parametrize(
    ("mode", "tools", "searches"),
    [
        (TeamMode.coordinate, ["delegate_task_to_member"] * 2, (1, 1)),
        (TeamMode.route, ["delegate_task_to_member"], (1, 0)),
        (TeamMode.broadcast, ["delegate_task_to_members"], (1, 1)),
        (TeamMode.tasks, ["create_task"] * 2 + ["execute_task"] * 2, (1, 1)),
    ],
)
def test_a_team_asks_its_members_and_cites_what_they_found(
    team_of: Callable[..., Made], mode: TeamMode, tools: list[str], searches: tuple[int, int], way: str
) -> None:
    team, *members = team_of(mode)
    run: Any
    if way == "run":
        run = team.run(PORT_QUESTION)
    elif way == "arun":
        run = asyncio.run(team.arun(PORT_QUESTION))
    else:
        *_, run = team.run(PORT_QUESTION, stream=True, yield_run_output=True)
    assert run.status == RunStatus.completed
    assert PORT_ANSWER in run.content and REFUSAL not in run.content
    assert tuple(len(member.queries) for member in members) == searches
    assert {query for member in members for query in member.queries} == {PORT_QUESTION}
    made = tools_called(run)
    assert [name for name in made if name != "mark_all_complete"] == tools
    assert [member.content for member in run.member_responses] == [PORT_ANSWER] * sum(searches)


def test_a_team_declines_what_no_member_can_answer(team_of: Callable[..., Made]) -> None:
    for mode in (TeamMode.coordinate, TeamMode.broadcast):
        team, *_ = team_of(mode)
        run = team.run(OTHER_QUESTION)
        assert (run.status, run.content) == (RunStatus.completed, REFUSAL)


def test_members_that_share_their_answers(team_of: Callable[..., Made]) -> None:
    team, *members = team_of(TeamMode.coordinate, share_member_interactions=True)
    run = team.run(PORT_QUESTION)
    assert run.status == RunStatus.completed and PORT_ANSWER in str(run.content)
    assert [len(member.queries) for member in members] == [1, 1]


def test_a_team_in_a_team(model: OpenAILike, team_of: Callable[..., Made]) -> None:
    inner, *members = team_of(TeamMode.coordinate)
    outer = Team(name="Head", model=model, members=[inner], telemetry=False)
    run = outer.run(PORT_QUESTION)
    assert run.status == RunStatus.completed and PORT_ANSWER in str(run.content)
    assert [len(member.queries) for member in members] == [1, 1]


def test_a_workflow_hands_the_first_steps_answer_on(model: OpenAILike, documents: Documents) -> None:
    seen: list[str] = []

    def note(step: StepInput) -> StepOutput:
        seen.append(str(step.previous_step_content))
        return StepOutput(content=f"{PORT_QUESTION}\n<references>\n{step.previous_step_content}\n</references>")

    find = Step(name="find", agent=agent_with(model, documents, name="Finder"))
    write = Step(name="write", agent=agent_with(model, name="Writer"))
    workflow = Workflow(name="two steps", steps=[find, Step(name="note", executor=note), write], telemetry=False)
    run = workflow.run(input=PORT_QUESTION)
    assert run.status == RunStatus.completed
    assert seen == [PORT_ANSWER] and run.content == PORT_ANSWER
    assert documents.queries == [PORT_QUESTION]


# Memory, history, summaries


@pytest.mark.parametrize("option", ["update_memory_on_run", "enable_agentic_memory"])
def test_a_stated_fact_is_stored_once(model: OpenAILike, db: SqliteDb, documents: Documents, option: str) -> None:
    agent = agent_with(model, documents, db=db, **{option: True})

    def memories() -> list[str]:
        return [memory.memory for memory in agent.get_user_memories(user_id="ada") or []]

    for number in range(2):
        run = agent.run(f"My name is Ada. {PORT_QUESTION}", user_id="ada", session_id=f"s{number}")
        assert run.status == RunStatus.completed and run.content == PORT_ANSWER
        assert len(memories()) == 1 and "My name is Ada." in memories()[0]
    run = agent.run(PORT_QUESTION, user_id="ada", session_id="s2")
    assert len(memories()) == 1
    other = agent_with(model, db=db, add_memories_to_context=True)
    assert "My name is Ada." in str(other.run("What is my name?", user_id="ada", session_id="s3").content)
    assert "Ada" not in str(other.run("What is my name?", user_id="bo", session_id="s4").content)


def test_history(model: OpenAILike, db: SqliteDb, documents: Documents) -> None:
    agent = agent_with(model, documents, db=db, add_history_to_context=True, session_id="talk")
    agent.run(PORT_QUESTION)
    agent.run("And for metrics?")
    assert documents.queries == [PORT_QUESTION, f"{PORT_QUESTION} And for metrics?"]
    assert agent.run("What did I ask first?").content == f'You asked: "{PORT_QUESTION}"'
    reading = agent_with(model, documents, db=db, read_chat_history=True, session_id="talk")
    run = reading.run("What did I ask first?")
    assert tools_called(run) == ["get_chat_history"] and PORT_QUESTION in str(run.content)


def test_a_session_summary(model: OpenAILike, db: SqliteDb, documents: Documents) -> None:
    agent = agent_with(model, documents, db=db, enable_session_summaries=True, session_id="talk")
    agent.run(PORT_QUESTION)
    summary = agent.get_session_summary(session_id="talk")
    assert summary is not None and "port 19530" in summary.summary


# Evals


def test_evals_get_a_result_that_parses(model: OpenAILike, documents: Documents) -> None:
    agent = agent_with(model, documents)
    quiet: Json = {"model": model, "telemetry": False, "show_spinner": False}
    accuracy = AccuracyEval(input=PORT_QUESTION, expected_output="19530", agent=agent, **quiet).run()
    assert accuracy is not None
    (result,) = accuracy.results
    assert 0 <= result.score <= 10 and result.reason
    for strategy in ("binary", "numeric"):
        judge = AgentAsJudgeEval(criteria="The answer names a port.", scoring_strategy=strategy, **quiet)
        judged = judge.run(input=PORT_QUESTION, output=PORT_ANSWER)
        assert judged is not None
        (verdict,) = judged.results
        assert verdict.reason and verdict.passed in (True, False)
        assert strategy == "binary" or (verdict.score is not None and 1 <= verdict.score <= 10)
