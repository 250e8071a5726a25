"""The knowledge assistant as a service: one agent that searches uploaded documents before it answers.

    python3 -m utils serve                      in the foreground, after setting everything up
    python -m utils.apps.knowledge_agent        the same where the packages are installed, such as in a container

Settings are environment variables: utils/hosting/config.py lists them.
"""

from __future__ import annotations

import sys

from agno.agent import Agent
from agno.db.base import BaseDb
from agno.knowledge.knowledge import Knowledge
from fastapi import FastAPI

from utils.hosting import (
    ServiceConfig,
    configure_logs,
    create_service,
    find_models,
    load_config,
    log_ids,
    open_database,
    open_knowledge,
    require_knowledge,
    serve,
)
from utils.models import Models, chat_model

NAME = "knowledge-agent"
AGENT = "knowledge-assistant"
INSTRUCTIONS = [
    "You are a knowledge base assistant.",
    "Always search the knowledge base before you answer, and answer only from what the search returns.",
    "After each statement name the document it comes from in square brackets, like [handbook.md].",
    "If the documents do not answer the question, say so; if there are none yet, ask the user to upload some.",
]


def make_agent(config: ServiceConfig, endpoints: Models, db: BaseDb, knowledge: Knowledge) -> Agent:
    """The assistant."""
    return Agent(
        id=AGENT,
        name="Knowledge Assistant",
        model=chat_model(endpoints, timeout=config.model_timeout),
        instructions=INSTRUCTIONS,
        knowledge=knowledge,
        search_knowledge=True,
        db=db,
        add_history_to_context=True,
        num_history_runs=3,
        pre_hooks=[log_ids],
        post_hooks=[require_knowledge],
        markdown=True,
        telemetry=config.settings.telemetry,
    )


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
    agent = make_agent(config, endpoints, database, knowledge)
    return create_service(NAME, config, endpoints, database, knowledge, agents=[agent])


def main() -> int:
    """Serve in the foreground; return the exit code."""
    return serve("utils.apps.knowledge_agent:create_app", NAME)


if __name__ == "__main__":
    sys.exit(main())
