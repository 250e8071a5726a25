"""The database of sessions, memories and document states: SQLite in the service's folder, or PostgreSQL by URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import psycopg
from agno.db.postgres import PostgresDb
from agno.db.sqlite import SqliteDb
from agno.run.agent import RunOutput
from agno.run.team import TeamRunOutput
from agno.run.workflow import WorkflowRunOutput
from agno.session import Session
from agno.tracing.schemas import Span
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import SQLAlchemyError

from utils.errors import CourseError
from utils.hosting.config import ServiceConfig
from utils.hosting.logs import log

# AgentOS calls a synchronous database from its event loop: a request that waits for a connection stops all others.
POOL = {"pool_size": 10, "max_overflow": 20, "pool_pre_ping": True}
CONNECT_SECONDS = 5

_failed_writes: ContextVar[set[str] | None] = ContextVar("failed writes", default=None)
StoredRun = RunOutput | TeamRunOutput | WorkflowRunOutput
_stored: ContextVar[Callable[[StoredRun], None] | None] = ContextVar("stored runs", default=None)


class DatabaseError(CourseError):
    """The database cannot be used."""


def note_failed_writes() -> set[str]:
    """A set that from now on holds the ids of this request's runs and sessions whose last write failed.

    Agno 3.1.10 logs such an error and answers as if the run were stored.
    """
    found: set[str] = set()
    _failed_writes.set(found)
    return found


def note_stored_runs(tell: Callable[[StoredRun], None]) -> None:
    """From now on call `tell` with each run that this request stores, or a task that it started, even if that fails."""
    _stored.set(tell)


@contextmanager
def _noted(id: str | None) -> Iterator[None]:
    """Around a write of the run or session `id`."""
    failed = _failed_writes.get()
    try:
        yield
    except Exception as error:
        # Not SQLAlchemy's own text, which has the whole run in it.
        log.error("not stored", id=id, error=str(getattr(error, "orig", error)))
        if failed is not None and id:
            failed.add(id)
        raise
    if failed is not None and id:
        failed.discard(id)


class _NotingWrites:
    """What the databases below do besides Agno's."""

    def upsert_session(self, session: Session, deserialize: bool | None = True) -> Session | dict[str, Any] | None:
        with _noted(session.session_id):
            return super().upsert_session(session, deserialize)  # type: ignore[misc]

    def upsert_run(
        self,
        run: RunOutput | TeamRunOutput | WorkflowRunOutput | dict[str, Any],
        session_id: str,
        user_id: str | None = None,
        run_index: int | None = None,
    ) -> None:
        tell = _stored.get()
        if tell is not None and not isinstance(run, dict):
            tell(run)
        with _noted(run.get("run_id") if isinstance(run, dict) else run.run_id):
            super().upsert_run(run, session_id, user_id, run_index)  # type: ignore[misc]

    def create_spans(self, spans: list[Span]) -> None:
        """Store spans of traces, all of them or none. Agno's logs an error, the spans' texts in it, and goes on.

        Raises:
            DatabaseError: they are not stored.
        """
        try:
            table = self._get_table("spans", create_table_if_not_found=True)  # type: ignore[attr-defined]
            if spans and table is not None:
                with self.db_engine.begin() as connection:  # type: ignore[attr-defined]
                    connection.execute(table.insert(), [span.to_dict() for span in spans])
        except SQLAlchemyError as error:
            raise DatabaseError(f"The spans cannot be stored ({getattr(error, 'orig', error)}).") from None


class NotingSqliteDb(_NotingWrites, SqliteDb):
    """Agno's, with what this module adds."""


class NotingPostgresDb(_NotingWrites, PostgresDb):
    """Agno's, with what this module adds."""


def open_database(config: ServiceConfig, name: str) -> SqliteDb | PostgresDb:
    """The database of the settings, after one query that shows that it answers.

    Later, PostgreSQL that does not answer is a DatabaseError, too, in place of SQLAlchemy's; any other error stays.

    Args:
        config: the service's settings.
        name: its id in AgentOS's answers; replicas of a service must agree on it.

    Raises:
        DatabaseError: it does not answer, refuses the user, or its file cannot be written.
        SettingsError: its folder cannot be made.
    """
    if not config.database_url:
        config.make_folder()
        sqlite = NotingSqliteDb(id=name, db_file=str(config.folder / "agent.db"))
        _ask(sqlite, f"The database {config.folder.name}/agent.db cannot be opened")
        return sqlite
    url = make_url(config.database_url)
    engine = create_engine(url, connect_args={"connect_timeout": CONNECT_SECONDS}, **POOL)
    postgres = NotingPostgresDb(id=name, db_engine=engine)
    _ask(
        postgres,
        f"The database {url.database} at {url.host or 'localhost'}:{url.port or 5432} does not answer or refuses "
        f"the user {url.username}; start it, or correct DATABASE_URL",
    )
    event.listen(engine, "handle_error", _explained, retval=True)
    return postgres


def _ask(database: SqliteDb | PostgresDb, sentence: str) -> None:
    try:
        with database.db_engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise DatabaseError(f"{sentence} ({reason}).") from None


def _explained(context: ExceptionContext) -> DatabaseError | None:
    """What to raise where PostgreSQL failed and not the statement; its own text would show addresses and SQL."""
    error = context.original_exception
    # When a kept connection is tried before its use, SQLAlchemy itself makes a new one.
    if context.is_pre_ping or not (context.is_disconnect or isinstance(error, psycopg.OperationalError)):
        return None
    return DatabaseError(f"The database does not answer ({type(error).__name__}): start it, or correct DATABASE_URL.")
