"""Agno 3.1.10, unchanged, against the offline server: models, embedder, agents, teams, workflows, memory, evals.

All of it holds for both engines, except what is marked `extractive`. What a language model writes cannot be foreseen,
so the other tests look at what was done: tools, searches, statuses, types.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

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

from utils.offline import DIMENSIONS, EMBEDDING_MODEL, OfflineServer
from utils.offline.answers import REFUSAL

pytestmark = pytest.mark.model_server
extractive = pytest.mark.extractive

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
    return made_by(OpenAILike, offline_server)


@pytest.fixture
def brief(offline_server: OfflineServer) -> OpenAILike:
    """The same model for tests in which nobody reads the answers: each token of a language model takes its time."""
    return made_by(OpenAILike, offline_server, max_tokens=30)


@pytest.fixture
def db(tmp_path: Path) -> SqliteDb:
    return SqliteDb(db_file=str(tmp_path / "agno.db"))


def made_by(kind: type[OpenAIChat], server: OfflineServer, **options: Any) -> Any:
    """A model of that class on the server under test."""
    return kind(**{"id": server.model, "base_url": server.base_url, "api_key": server.api_key, **options})


def agent_with(model: OpenAIChat, documents: Documents | None = None, **options: Any) -> Agent:
    if documents is not None:
        options |= {"knowledge_retriever": documents, "search_knowledge": True}
    return Agent(model=model, telemetry=False, **options)


def tools_called(run: Any) -> list[str]:
    return [str(made.tool_name) for made in run.tools or []]


def assert_answered(run: Any) -> None:
    """The run completed with an answer in words."""
    assert run.status == RunStatus.completed, run.content
    assert isinstance(run.content, str) and run.content.strip()


def assert_searches(documents: Documents, times: int) -> None:
    """So many searches were made, each with a query of a reasonable length."""
    assert len(documents.queries) == times
    assert all(0 < len(query.strip()) <= 500 for query in documents.queries)


# Models and embedder


@pytest.mark.parametrize("kind", [OpenAILike, OpenAIChat])
def test_an_agent_searches_and_answers(offline_server: OfflineServer, documents: Documents, kind: Any) -> None:
    """OpenAIChat sends its system message in the role `developer`."""
    model = made_by(kind, offline_server)
    run = agent_with(model, documents, description="You answer questions.").run(PORT_QUESTION)
    assert_answered(run)
    assert_searches(documents, 1)
    assert (run.model, tools_called(run)) == (offline_server.model, ["search_knowledge_base"])
    assert run.references and run.metrics and run.metrics.total_tokens > 0


@extractive
def test_an_answer_is_a_quote_or_a_refusal(model: OpenAILike, documents: Documents) -> None:
    agent = agent_with(model, documents)
    assert (agent.run(PORT_QUESTION).content, documents.queries) == (PORT_ANSWER, [PORT_QUESTION])
    declined = agent.run(OTHER_QUESTION)
    assert (declined.status, declined.content) == (RunStatus.completed, REFUSAL)


def test_an_agent_runs_async_and_streams_the_same_answer(brief: OpenAILike, documents: Documents) -> None:
    agent = agent_with(brief, documents)
    agent.run(PORT_QUESTION)  # with a prompt in its cache, llama.cpp rounds a little differently than without
    whole = str(agent.run(PORT_QUESTION).content)
    pieces = [e.content for e in agent.run(PORT_QUESTION, stream=True) if isinstance(e, RunContentEvent) and e.content]
    assert "".join(pieces) == whole and len(pieces) > 5

    async def others() -> tuple[Any, str]:  # in one event loop: Agno keeps its client, which belongs to the first
        run = await agent.arun(PORT_QUESTION)
        events = agent.arun(PORT_QUESTION, stream=True)
        return run.content, "".join([e.content async for e in events if isinstance(e, RunContentEvent) and e.content])

    assert asyncio.run(others()) == (whole, whole)
    assert_searches(documents, 5)


TWO_QUESTIONS = f"{PORT_QUESTION} {BACKUP_QUESTION}"


@extractive
def test_each_question_is_searched_and_answered(model: OpenAILike, documents: Documents) -> None:
    whole = str(agent_with(model, documents).run(TWO_QUESTIONS).content)
    assert whole.startswith(PORT_ANSWER.split(" [")[0]) and "[milvus-backup]" in whole
    assert documents.queries == [PORT_QUESTION, BACKUP_QUESTION]


@pytest.mark.parametrize("references_format", ["json", "yaml"])
def test_knowledge_in_the_context_instead_of_a_tool(
    brief: OpenAILike, documents: Documents, references_format: Literal["json", "yaml"]
) -> None:
    run = in_context(brief, documents, references_format)
    assert_answered(run)
    assert (documents.queries, tools_called(run)) == ([PORT_QUESTION], [])


@extractive
@pytest.mark.parametrize("references_format", ["json", "yaml"])
def test_knowledge_in_the_context_is_quoted(
    model: OpenAILike, documents: Documents, references_format: Literal["json", "yaml"]
) -> None:
    assert in_context(model, documents, references_format).content == PORT_ANSWER


def in_context(model: OpenAILike, documents: Documents, references_format: Literal["json", "yaml"]) -> Any:
    options: Json = {"add_knowledge_to_context": True, "search_knowledge": False, "knowledge_retriever": documents}
    return Agent(model=model, telemetry=False, references_format=references_format, **options).run(PORT_QUESTION)


def broken(query: str, **_: Any) -> list[Json | str] | None:
    """A knowledge_retriever of a Milvus that does not answer."""
    raise ConnectionError("Milvus is down")


def test_a_failing_search_is_no_failure_of_the_run(brief: OpenAILike) -> None:
    run = Agent(model=brief, telemetry=False, knowledge_retriever=broken, search_knowledge=True).run(PORT_QUESTION)
    assert_answered(run)
    assert tools_called(run) == ["search_knowledge_base"]


@extractive
def test_after_a_failed_search_nothing_is_made_up(model: OpenAILike) -> None:
    run = Agent(model=model, telemetry=False, knowledge_retriever=broken, search_knowledge=True).run(PORT_QUESTION)
    assert "port 19530" not in str(run.content)


def test_a_wrong_key_is_an_error_of_the_run(offline_server: OfflineServer) -> None:
    run = Agent(model=made_by(OpenAILike, offline_server, api_key="wrong"), telemetry=False).run("x")
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
    assert run.status == RunStatus.completed and isinstance(run.content, Reply)
    assert tools_called(run) == ["search_knowledge_base"]
    as_json = agent_with(model, documents, output_schema=Evidence, use_json_mode=True).run(PORT_QUESTION)
    assert as_json.status == RunStatus.completed
    assert_searches(documents, 2)


@extractive
def test_structured_output_holds_what_was_found(model: OpenAILike, documents: Documents) -> None:
    reply = agent_with(model, documents, output_schema=Reply).run(PORT_QUESTION).content
    assert isinstance(reply, Reply) and (reply.sources, reply.port) == (["milvus-ports"], 19530)


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


def test_a_tool_gets_its_arguments(model: OpenAILike) -> None:
    run = Agent(model=model, telemetry=False, tools=[multiply]).run("Please multiply 6 by 7.")
    assert_answered(run)
    (made,) = run.tools or []
    assert (made.tool_name, made.tool_args, made.result) == ("multiply", {"a": 6, "b": 7}, "42")


@extractive
def test_a_tools_result_is_told(model: OpenAILike) -> None:
    run = Agent(model=model, telemetry=False, tools=[multiply]).run("Please multiply 6 by 7.")
    assert run.content == "multiply returned: 42"


def drop_docs(model: OpenAILike, db: SqliteDb, confirmed: bool) -> tuple[Any, list[str]]:
    """A run with a tool that was confirmed or rejected, and what the tool dropped."""
    dropped: list[str] = []

    @tool(requires_confirmation=True)
    def drop_collection(name: str) -> str:
        """Drop a collection."""
        dropped.append(name)
        return f"{name} is gone"

    agent = Agent(model=model, telemetry=False, db=db, tools=[drop_collection])
    run = agent.run("Please drop the collection 'docs'.")
    assert run.is_paused and dropped == []
    (requirement,) = run.active_requirements
    assert requirement.tool_execution is not None
    assert requirement.tool_execution.tool_args == {"name": "docs"}
    decide: Callable[[], object] = requirement.confirm if confirmed else requirement.reject
    decide()
    return agent.continue_run(run_id=run.run_id, requirements=run.requirements, session_id=run.session_id), dropped


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_tool_that_needs_confirmation_pauses_and_continues(brief: OpenAILike, db: SqliteDb, confirmed: bool) -> None:
    done, dropped = drop_docs(brief, db, confirmed)
    assert_answered(done)
    assert dropped == (["docs"] if confirmed else [])


@extractive
@pytest.mark.parametrize("confirmed", [True, False])
def test_what_a_confirmed_tool_did_is_told(model: OpenAILike, db: SqliteDb, confirmed: bool) -> None:
    done, _ = drop_docs(model, db, confirmed)
    assert ("docs is gone" in str(done.content)) is confirmed


# Teams and workflows


Made = tuple[Team, Documents, Documents]


@pytest.fixture
def team_of(brief: OpenAILike) -> Callable[..., Made]:
    """Makes a team of an analyst and a writer, each with a knowledge base of its own."""

    def make(mode: TeamMode, **options: Any) -> Made:
        ports, others = Documents(), Documents()
        analyst = agent_with(brief, ports, name="Analyst", role="Finds facts about Milvus ports in the documents")
        writer = agent_with(brief, others, name="Writer", role="Writes poems and greetings")
        team = Team(name="Lead", model=brief, members=[analyst, writer], mode=mode, telemetry=False, **options)
        return team, ports, others

    return make


def ask_team(team: Team, way: str) -> Any:
    """The output of a run of the team for PORT_QUESTION."""
    if way == "run":
        return team.run(PORT_QUESTION)
    if way == "arun":
        return asyncio.run(team.arun(PORT_QUESTION))
    *_, run = team.run(PORT_QUESTION, stream=True, yield_run_output=True)
    return run


MODES = pytest.mark.parametrize(
    ("mode", "tools", "searches"),
    [
        (TeamMode.coordinate, ["delegate_task_to_member"] * 2, (1, 1)),
        (TeamMode.route, ["delegate_task_to_member"], (1, 0)),
        (TeamMode.broadcast, ["delegate_task_to_members"], (1, 1)),
        (TeamMode.tasks, ["create_task"] * 2 + ["execute_task"] * 2, (1, 1)),
    ],
)


@MODES
def test_a_team_asks_its_members(
    team_of: Callable[..., Made], mode: TeamMode, tools: list[str], searches: tuple[int, int]
) -> None:
    team, *members = team_of(mode)
    run = ask_team(team, "run")
    assert_answered(run)
    assert [name for name in tools_called(run) if name != "mark_all_complete"] == tools
    asked = {made.tool_args[name] for made in run.tools for name in ("member_id", "assignee") if name in made.tool_args}
    assert asked <= {"analyst", "writer"}
    assert len(run.member_responses) == sum(searches)
    assert all(member.status == RunStatus.completed and member.content for member in run.member_responses)
    # A task that a language model writes may hold several questions, each of which is searched.
    assert [bool(member.queries) for member in members] == [bool(number) for number in searches]


@pytest.mark.parametrize("way", ["arun", "stream"])
def test_a_team_runs_async_and_streams(team_of: Callable[..., Made], way: str) -> None:
    team, *members = team_of(TeamMode.route)
    run = ask_team(team, way)
    assert_answered(run)
    assert tools_called(run) == ["delegate_task_to_member"] and members[0].queries


@extractive
@pytest.mark.parametrize("way", ["run", "arun", "stream"])
@MODES
def test_a_team_cites_what_its_members_found(
    team_of: Callable[..., Made], mode: TeamMode, tools: list[str], searches: tuple[int, int], way: str
) -> None:
    team, *members = team_of(mode)
    run = ask_team(team, way)
    assert PORT_ANSWER in run.content and REFUSAL not in run.content
    assert tuple(len(member.queries) for member in members) == searches
    assert {query for member in members for query in member.queries} == {PORT_QUESTION}
    assert [member.content for member in run.member_responses] == [PORT_ANSWER] * sum(searches)


@extractive
def test_a_team_declines_what_no_member_can_answer(team_of: Callable[..., Made]) -> None:
    for mode in (TeamMode.coordinate, TeamMode.broadcast):
        team, *_ = team_of(mode)
        run = team.run(OTHER_QUESTION)
        assert (run.status, run.content) == (RunStatus.completed, REFUSAL)


def test_a_team_in_a_team(brief: OpenAILike, team_of: Callable[..., Made]) -> None:
    inner, *members = team_of(TeamMode.coordinate)
    outer = Team(name="Head", model=brief, members=[inner], telemetry=False)
    assert_answered(outer.run(PORT_QUESTION))
    assert all(member.queries for member in members)


@extractive
def test_an_answer_comes_up_through_all_teams(model: OpenAILike, team_of: Callable[..., Made]) -> None:
    sharing, *members = team_of(TeamMode.coordinate, share_member_interactions=True)
    inner, *others = team_of(TeamMode.coordinate)
    for team in (sharing, Team(name="Head", model=model, members=[inner], telemetry=False)):
        assert PORT_ANSWER in str(team.run(PORT_QUESTION).content)
    assert [len(member.queries) for member in (*members, *others)] == [1] * 4


def two_steps(model: OpenAILike, documents: Documents) -> tuple[Any, list[str]]:
    """A workflow's run, and what its second step was handed."""
    seen: list[str] = []

    def note(step: StepInput) -> StepOutput:
        seen.append(str(step.previous_step_content))
        return StepOutput(content=f"{PORT_QUESTION}\n<references>\n{step.previous_step_content}\n</references>")

    find = Step(name="find", agent=agent_with(model, documents, name="Finder"))
    write = Step(name="write", agent=agent_with(model, name="Writer"))
    workflow = Workflow(name="two steps", steps=[find, Step(name="note", executor=note), write], telemetry=False)
    return workflow.run(input=PORT_QUESTION), seen


def test_a_workflow_hands_the_first_steps_answer_on(brief: OpenAILike, documents: Documents) -> None:
    run, seen = two_steps(brief, documents)
    assert_answered(run)
    assert [bool(text.strip()) for text in seen] == [True]
    assert_searches(documents, 1)


@extractive
def test_a_workflow_ends_with_the_quote(model: OpenAILike, documents: Documents) -> None:
    run, seen = two_steps(model, documents)
    assert (seen, run.content, documents.queries) == ([PORT_ANSWER], PORT_ANSWER, [PORT_QUESTION])


# Memory, history, summaries


MEMORY = pytest.mark.parametrize("option", ["update_memory_on_run", "enable_agentic_memory"])


def memories_of(agent: Agent) -> list[str]:
    return [memory.memory for memory in agent.get_user_memories(user_id="ada") or []]


@MEMORY
def test_a_stated_fact_is_stored_once(brief: OpenAILike, db: SqliteDb, documents: Documents, option: str) -> None:
    agent = agent_with(brief, documents, db=db, **{option: True})
    run = agent.run(f"My name is Ada. {PORT_QUESTION}", user_id="ada", session_id="s0")
    assert_answered(run)
    assert "search_knowledge_base" in tools_called(run)
    assert len(memories_of(agent)) == 1 and "My name is Ada." in memories_of(agent)[0]


@extractive
@MEMORY
def test_a_stored_fact_is_told_and_not_stored_again(
    model: OpenAILike, db: SqliteDb, documents: Documents, option: str
) -> None:
    agent = agent_with(model, documents, db=db, **{option: True})
    for number in range(2):
        run = agent.run(f"My name is Ada. {PORT_QUESTION}", user_id="ada", session_id=f"s{number}")
        assert run.content == PORT_ANSWER
    agent.run(PORT_QUESTION, user_id="ada", session_id="s2")
    assert len(memories_of(agent)) == 1
    other = agent_with(model, db=db, add_memories_to_context=True)
    assert "My name is Ada." in str(other.run("What is my name?", user_id="ada", session_id="s3").content)
    assert "Ada" not in str(other.run("What is my name?", user_id="bo", session_id="s4").content)


def test_history(brief: OpenAILike, db: SqliteDb, documents: Documents) -> None:
    agent = agent_with(brief, documents, db=db, add_history_to_context=True, session_id="talk")
    for question in (PORT_QUESTION, "And for metrics?"):
        assert_answered(agent.run(question))
    assert_searches(documents, 2)
    reading = agent_with(brief, documents, db=db, read_chat_history=True, session_id="talk")
    run = reading.run("What did I ask first?")
    assert_answered(run)
    assert tools_called(run) == ["get_chat_history"]


@extractive
def test_history_is_quoted(model: OpenAILike, db: SqliteDb, documents: Documents) -> None:
    agent = agent_with(model, documents, db=db, add_history_to_context=True, session_id="talk")
    agent.run(PORT_QUESTION)
    agent.run("And for metrics?")
    assert documents.queries == [PORT_QUESTION, f"{PORT_QUESTION} And for metrics?"]
    assert agent.run("What did I ask first?").content == f'You asked: "{PORT_QUESTION}"'
    reading = agent_with(model, documents, db=db, read_chat_history=True, session_id="talk")
    assert PORT_QUESTION in str(reading.run("What did I ask first?").content)


def summary_of(model: OpenAILike, db: SqliteDb, documents: Documents) -> str:
    agent = agent_with(model, documents, db=db, enable_session_summaries=True, session_id="talk")
    agent.run(PORT_QUESTION)
    summary = agent.get_session_summary(session_id="talk")
    assert summary is not None
    return summary.summary


def test_a_session_summary(model: OpenAILike, db: SqliteDb, documents: Documents) -> None:
    assert summary_of(model, db, documents).strip()


@extractive
def test_a_session_summary_quotes(model: OpenAILike, db: SqliteDb, documents: Documents) -> None:
    assert "port 19530" in summary_of(model, db, documents)


# Evals


@pytest.fixture
def quiet(model: OpenAILike) -> Json:
    """The options of an eval with the model under test as its judge."""
    return {"model": model, "telemetry": False, "show_spinner": False}


def test_an_accuracy_eval_gets_a_score(brief: OpenAILike, documents: Documents, quiet: Json) -> None:
    agent = agent_with(brief, documents)
    accuracy = AccuracyEval(input=PORT_QUESTION, expected_output="19530", agent=agent, **quiet).run()
    assert accuracy is not None
    (result,) = accuracy.results
    assert 0 <= result.score <= 10 and result.reason


@pytest.mark.parametrize("strategy", ["binary", pytest.param("numeric", marks=extractive)])
def test_a_judge_gives_a_verdict(quiet: Json, strategy: Literal["binary", "numeric"]) -> None:
    judge = AgentAsJudgeEval(criteria="The answer names a port.", scoring_strategy=strategy, **quiet)
    judged = judge.run(input=PORT_QUESTION, output=PORT_ANSWER)
    assert judged is not None
    (verdict,) = judged.results
    assert verdict.reason and verdict.passed in (True, False)
    assert strategy == "binary" or (verdict.score is not None and 1 <= verdict.score <= 10)
