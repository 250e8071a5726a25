"""Reports from uploaded documents as a service: a team that decides who does what, and a workflow that always does the
same.

    python3 -m utils serve --app research_team   in the foreground, after setting everything up
    python -m utils.apps.research_team           the same where the packages are installed

An analyst finds the facts and a writer makes a short report of them. In the team both search, and one cached retriever
makes one search of theirs if they ask for the same. In the workflow nobody searches but its first step, which hands the
documents on. The team remembers the session; each run of the workflow begins anew. Agno gives a workflow no
`knowledge_filters`: a client sends them as dependencies={"knowledge_filters": {...}}.

Settings are environment variables: utils/hosting/config.py lists them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from agno.agent import Agent
from agno.db.base import BaseDb
from agno.models.message import MessageReferences
from agno.run import RunContext
from agno.team import Team
from agno.workflow import Condition, HumanReview, OnError, Step, StepInput, StepOutput, Workflow
from fastapi import FastAPI

from utils.hosting import (
    MeasuredRetriever,
    SearchFailed,
    ServiceConfig,
    configure_logs,
    create_service,
    find_models,
    load_config,
    log_ids,
    open_database,
    open_knowledge,
    require_knowledge,
    require_members,
    serve,
)
from utils.models import Models, chat_model

NAME = "research-team"
TEAM = "research-team"
WORKFLOW = "research-workflow"

ANALYST = [
    "Pick the facts, numbers and dates that answer the question, each with its document in square brackets, like "
    "[handbook.md].",
    "Use nothing but the documents. If they lack something that is asked, say what is missing.",
]
WRITER = [
    "Write a short report that answers the question from the documents and the analyst's notes, and from nothing else.",
    "After each statement name its document in square brackets, like [handbook.md].",
    "Where notes and documents disagree, or do not answer, say so.",
]
# The members' searches are one only if their queries are the same, and each model words its own.
SEARCH = "Before you answer, search the knowledge base once, for the user's question word for word."
NOTHING_FOUND = "The knowledge base holds no document about this: upload one, then ask again."


def make_team(config: ServiceConfig, endpoints: Models, db: BaseDb, retriever: MeasuredRetriever) -> Team:
    """The analyst and the writer, each with the knowledge base, and a leader that asks one after the other."""
    model = chat_model(endpoints, timeout=config.model_timeout)
    searching: dict[str, Any] = {
        "knowledge": retriever.knowledge,  # without it the filters of a run would not reach the members
        "knowledge_retriever": retriever.aretrieve,
        "search_knowledge": True,
        "telemetry": config.settings.telemetry,
    }
    analyst = Agent(
        id="analyst",
        name="Analyst",
        role="Finds the facts that answer a question",
        model=model,
        instructions=[SEARCH, *ANALYST],
        **searching,
    )
    writer = Agent(
        id="writer",
        name="Writer",
        role="Writes the report from the facts that the analyst found",
        model=model,
        instructions=[SEARCH, *WRITER],
        **searching,
    )
    return Team(
        id=TEAM,
        name="Research Team",
        model=model,
        members=[analyst, writer],
        instructions=[
            "Give the user's question, word for word, to the analyst first, then to the writer.",
            "Answer with the writer's report, and leave the documents in square brackets where they are.",
        ],
        share_member_interactions=True,
        db=db,
        add_history_to_context=True,
        num_history_runs=3,
        pre_hooks=[log_ids],
        post_hooks=[require_knowledge, require_members],
        markdown=True,
        telemetry=config.settings.telemetry,
    )


def make_workflow(config: ServiceConfig, endpoints: Models, db: BaseDb, retriever: MeasuredRetriever) -> Workflow:
    """Search; if there is nothing, say so; else the analyst, then the writer, both with the documents found."""

    async def search(step_input: StepInput, run_context: RunContext) -> StepOutput:
        log_ids(run_context)
        question = str(step_input.get_input_as_string())
        filters = (run_context.dependencies or {}).get("knowledge_filters")
        try:
            found = await retriever.aretrieve(question, filters=filters, run_context=run_context)
        except ValueError as error:
            raise SearchFailed(str(error)) from error
        return StepOutput(content=MessageReferences(query=question, references=found).model_dump())

    model = chat_model(endpoints, timeout=config.model_timeout)
    options: dict[str, Any] = {"model": model, "markdown": True, "telemetry": config.settings.telemetry}
    analyst = Agent(id="analyst", name="Analyst", instructions=ANALYST, **options)
    writer = Agent(id="writer", name="Writer", instructions=WRITER, **options)
    return Workflow(
        id=WORKFLOW,
        name="Research Workflow",
        steps=[
            _step("search", executor=search),
            Condition(name="found?", evaluator=_nothing_found, steps=[_step("say so", executor=_say_nothing_found)]),
            _step("brief the analyst", executor=_brief),
            _step("analyst", agent=analyst),
            _step("brief the writer", executor=_brief),
            _step("writer", agent=writer),
        ],
        db=db,
        telemetry=config.settings.telemetry,
    )


def _step(name: str, **executor: Any) -> Step:
    """A step whose failure fails the run. By default Agno tries it three times more, and then goes on without it."""
    return Step(name=name, max_retries=0, human_review=HumanReview(on_error=OnError.fail), **executor)


def _references(step_input: StepInput) -> list[Any]:
    found: Any = step_input.get_step_content("search")
    return found["references"] or []


def _nothing_found(step_input: StepInput) -> bool:
    return not _references(step_input)


def _say_nothing_found(step_input: StepInput) -> StepOutput:
    return StepOutput(content=NOTHING_FOUND, stop=True)


def _brief(step_input: StepInput) -> StepOutput:
    """The message for the next agent, which would get the last step's output alone: no question, no documents."""
    documents = json.dumps(_references(step_input), indent=2, ensure_ascii=False)
    parts = [str(step_input.get_input_as_string()), f"<references>\n{documents}\n</references>"]
    notes = step_input.get_step_content("analyst")
    if notes:
        parts.append(f"<additional context>\nThe analyst's notes:\n{notes}\n</additional context>")
    return StepOutput(content="\n\n".join(parts))


def create_app() -> FastAPI:
    """The service, with everything it needs opened and checked.

    Raises:
        CourseError: a setting is wrong, or the model, Milvus or the database cannot be used.
    """
    config = load_config(NAME)
    configure_logs(config.log_level)
    endpoints = find_models(config)
    database = open_database(config, NAME)
    knowledge = open_knowledge(config, endpoints, database, NAME)
    retriever = MeasuredRetriever(knowledge, version=knowledge.version)
    team = make_team(config, endpoints, database, retriever)
    workflow = make_workflow(config, endpoints, database, retriever)
    return create_service(NAME, config, endpoints, database, knowledge, teams=[team], workflows=[workflow])


def main() -> int:
    """Serve in the foreground; return the exit code."""
    return serve("utils.apps.research_team:create_app", NAME)


if __name__ == "__main__":
    sys.exit(main())
