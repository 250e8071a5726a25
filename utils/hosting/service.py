"""AgentOS with what surrounds it, as one app."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agno.agent import Agent
from agno.db.postgres import PostgresDb
from agno.db.sqlite import SqliteDb
from agno.knowledge.knowledge import Knowledge
from agno.os import AgentOS
from agno.os.authz import Authorization
from agno.os.config import AuthorizationConfig
from agno.os.settings import AgnoAPISettings
from agno.team import Team
from agno.workflow import Workflow
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from utils.hosting import logs, metrics
from utils.hosting.config import ServiceConfig
from utils.hosting.database import DatabaseError
from utils.hosting.limits import RequestLimits
from utils.hosting.readiness import database_probe, milvus_probe, model_probe, readiness_router
from utils.hosting.runs import RunStatusCodes, finish_background_runs
from utils.hosting.tracing import trace_runs
from utils.milvus_store import InvalidDocument, InvalidFilter, MilvusStoreError, NotSupported
from utils.models import Models

PUBLIC = ["/ready", metrics.PATH]  # besides Agno's own: /, /health, /info and the description of the API


def create_service(
    name: str,
    config: ServiceConfig,
    models: Models,
    database: SqliteDb | PostgresDb,
    knowledge: Knowledge,
    agents: Sequence[Agent] = (),
    teams: Sequence[Team] = (),
    workflows: Sequence[Workflow] = (),
) -> FastAPI:
    """Serve agents, teams and workflows that share one knowledge base.

    Args:
        name: the AgentOS's id, which is also the audience (`aud`) that a token must name.
        config: the service's settings.
        models: the endpoints, for /ready.
        database: of sessions, memories and document states.
        knowledge: the knowledge base, with a vector store.
        agents, teams, workflows: what is served.
    """
    # FastAPI's own span of the request would be the root, and a trace is stored with what its root knows.
    app = FastAPI(title=name, version="1.0.0", telemetry={"tracing": False})
    app.add_middleware(RequestLimits, limit=config.upload_limit, types=config.upload_types)
    app.add_exception_handler(MilvusStoreError, _store_failed)
    app.add_exception_handler(DatabaseError, _database_failed)
    assert knowledge.vector_db is not None
    app.include_router(
        readiness_router(
            {
                "database": database_probe(database.db_engine),
                "milvus": milvus_probe(knowledge.vector_db),
                "model": model_probe(models),
            }
        )
    )
    if config.metrics:
        app.include_router(metrics.metrics_router())
    jwt = (
        Authorization(
            verification_keys=[config.jwt_key],
            algorithm=config.jwt_algorithm,
            verify_audience=True,
            excluded_route_paths=PUBLIC,
        )
        if config.auth == "jwt"
        else False
    )
    agent_os = AgentOS(
        id=name,
        name=name,
        agents=[*agents],
        teams=[*teams],
        workflows=[*workflows],
        knowledge=[knowledge],
        db=database,
        authorization=jwt,
        authorization_config=AuthorizationConfig(excluded_route_paths=PUBLIC) if config.auth == "key" else None,
        user_isolation=bool(jwt),
        settings=AgnoAPISettings(os_security_key=config.security_key or None),
        cors_allowed_origins=[*config.cors_origins] or None,
        base_app=app,
        telemetry=config.settings.telemetry,
    )
    served = agent_os.get_app()
    _add_inside_cors(
        served,
        RunStatusCodes,
        metrics=metrics.RunMetrics(
            {
                "agent": {str(agent.id) for agent in agents},
                "team": {str(team.id) for team in teams},
                "workflow": {str(workflow.id) for workflow in workflows},
            },
            models.chat.model_id,
            config.model_prices,
            config.grade_sample,
            config.metrics,
        ),
    )
    served.add_middleware(logs.AccessLog)
    finish_background_runs(served, config.shutdown_seconds)
    trace_runs(served, name, config, database)  # after it, so that it also sees how these runs end
    return served


def _add_inside_cors(app: FastAPI, middleware: Callable[..., ASGIApp], **options: Any) -> None:
    """Add middleware that also sees what is refused for its key, and whose own answers a browser may read."""
    classes: list[Any] = [layer.cls for layer in app.user_middleware]
    app.user_middleware.insert(classes.index(CORSMiddleware) + 1, Middleware(middleware, **options))


async def _store_failed(request: Request, error: Exception) -> JSONResponse:
    """The answer where Agno has none: the caller asked for what cannot be (422), or Milvus failed (503)."""
    callers = isinstance(error, InvalidFilter | InvalidDocument | NotSupported)
    logs.log.error("store", error=str(error))
    return JSONResponse({"detail": str(error)}, 422 if callers else 503)


async def _database_failed(request: Request, error: Exception) -> JSONResponse:
    """The answer where PostgreSQL does not: Agno reads the session before each run, also before a stream begins."""
    logs.log.error("database", error=str(error))
    return JSONResponse({"detail": str(error)}, 503)
