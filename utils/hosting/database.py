"""The database of sessions, memories and document states: SQLite in the service's folder, or PostgreSQL by URL."""

from __future__ import annotations

from agno.db.postgres import PostgresDb
from agno.db.sqlite import SqliteDb
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from utils.errors import CourseError
from utils.hosting.config import ServiceConfig

# AgentOS calls a synchronous database from its event loop: a request that waits for a connection stops all others.
POOL = {"pool_size": 10, "max_overflow": 20, "pool_pre_ping": True}
CONNECT_SECONDS = 5


class DatabaseError(CourseError):
    """The database cannot be used."""


def open_database(config: ServiceConfig, name: str) -> SqliteDb | PostgresDb:
    """The database of the settings, after one query that shows that it answers.

    Args:
        config: the service's settings.
        name: its id in AgentOS's answers; replicas of a service must agree on it.

    Raises:
        DatabaseError: it does not answer, refuses the user, or its file cannot be written.
        SettingsError: its folder cannot be made.
    """
    if not config.database_url:
        config.make_folder()
        sqlite = SqliteDb(id=name, db_file=str(config.folder / "agent.db"))
        _ask(sqlite, f"The database {config.folder.name}/agent.db cannot be opened")
        return sqlite
    url = make_url(config.database_url)
    engine = create_engine(url, connect_args={"connect_timeout": CONNECT_SECONDS}, **POOL)
    postgres = PostgresDb(id=name, db_engine=engine)
    _ask(
        postgres,
        f"The database {url.database} at {url.host or 'localhost'}:{url.port or 5432} does not answer or refuses "
        f"the user {url.username}; start it, or correct DATABASE_URL",
    )
    return postgres


def _ask(database: SqliteDb | PostgresDb, sentence: str) -> None:
    try:
        with database.db_engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise DatabaseError(f"{sentence} ({reason}).") from None
