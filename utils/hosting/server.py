"""A service's process: it checks everything once, then serves until it is told to end."""

from __future__ import annotations

import asyncio
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.supervisors import Multiprocess

from utils.errors import CourseError
from utils.hosting import logs
from utils.hosting.config import ServiceConfig, load_config
from utils.models import Models, connect
from utils.processes import ServerError, end_with_owner, owner_mark

# How a worker learns which app to serve, which endpoints its parent found, and who its parent is.
APP = "SERVICE_APP"
ENDPOINTS = "SERVICE_ENDPOINTS"
OWNER = "SERVICE_OWNER"
COUNTS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own: where the workers put their counts together
RETRY_SECONDS = 1.0
# Longer than load balancers keep an idle connection: nginx and AWS 60 seconds, Traefik 90, Caddy 120, Google 600. If
# this end closed it first, as uvicorn does after 5, a request could be on its way, and the balancer would answer 502.
KEEP_ALIVE_SECONDS = 620


def find_models(config: ServiceConfig) -> Models:
    """The model endpoints: those that the parent process found, or found now.

    Raises:
        ModelError: the server cannot be reached, refuses the key, or does not know a model.
    """
    given = os.environ.get(ENDPOINTS)
    return Models.from_json(given) if given else connect(config.settings)


def run_service(factory: str, config: ServiceConfig) -> int:
    """Serve until SIGTERM or Ctrl-C, finish the requests that run, and return the exit code.

    Args:
        factory: the import path, "package.module:function", of what makes the app; it raises a CourseError if something
            keeps the service from starting.
        config: the service's settings.

    Raises:
        CourseError: it cannot start; the sentence says why and what to do.
    """
    listener = _listen(config)
    models = find_models(config)
    os.environ[ENDPOINTS] = models.to_json()
    app = pkgutil.resolve_name(factory)()
    # uvicorn ends by raising the signal that ended it, which would be the exit code.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    owner = os.environ.get(OWNER)
    if owner:
        end_with_owner(owner, terminate)
    logs.log.info(
        "serving",
        url=config.url,
        workers=config.workers,
        auth=config.auth,
        model=str(models.chat),
        embedder=str(models.embedding),
        database="PostgreSQL" if config.database_url else "SQLite",
    )
    if config.workers == 1:
        uvicorn.Server(_uvicorn_config(lambda: app, config)).run(sockets=[listener])
    else:
        # Workers that start together on an empty database would race to create its tables; this start creates them.
        asyncio.run(_start_and_stop(app))
        with tempfile.TemporaryDirectory(prefix="metrics-", ignore_cleanup_errors=True) as counts:
            os.environ.update({APP: factory, OWNER: owner_mark(), COUNTS: counts})
            supervisor = _Workers(_uvicorn_config("utils.hosting.server:worker_app", config), sockets=[listener])
            supervisor.run()
        # A worker that is told to end while it still starts is ended by the signal, which is no failure.
        if any((process.exitcode or 0) > 0 for process in supervisor.processes):
            raise ServerError("A worker process failed; its log lines say why.")
    logs.log.info("stopped")
    return 0


def serve(factory: str, name: str) -> int:
    """Serve in the foreground, as the program of an app; what keeps it from starting is one sentence on stderr.

    Args:
        factory: as for `run_service`.
        name: of the service, as for `load_config`.

    Returns:
        The exit code.
    """
    try:
        return run_service(factory, load_config(name))
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def worker_app() -> FastAPI:
    """The app of a worker process.

    What the parent found in order may be down when a worker that died is replaced. The worker then waits: if it failed,
    uvicorn would end the other workers, too.
    """
    end_with_owner(os.environ[OWNER], terminate)  # a parent that was killed cannot end its workers
    make_app = pkgutil.resolve_name(os.environ[APP])
    while True:
        try:
            app: FastAPI = make_app()
            return app
        except CourseError as error:
            logs.log.error("waiting", error=str(error))
            time.sleep(RETRY_SECONDS)


class _Workers(Multiprocess):
    """Uvicorn's, which also takes the runs of a worker that died out of those in progress."""

    def keep_subprocess_alive(self) -> None:
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        for pid in before - {process.pid for process in self.processes}:
            mark_process_dead(pid, os.environ[COUNTS])  # type: ignore[no-untyped-call]


def terminate() -> None:
    """Ask this process to end as SIGTERM does."""
    signal.raise_signal(signal.SIGTERM)


def _uvicorn_config(app: str | Callable[[], FastAPI], config: ServiceConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=True,
        workers=config.workers,
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=config.shutdown_seconds,
        timeout_worker_healthcheck=60,  # a worker that still imports does not answer, and 5 seconds are soon over
    )


def _listen(config: ServiceConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # The protocol is named because asyncio switches Nagle's algorithm off only on sockets that name it.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # there it would allow two programs on one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)  # so that a second service on this port fails now, and not after a minute
    except OSError as error:
        listener.close()
        raise ServerError(
            f"{config.host}:{config.port} cannot be used ({error.strerror}): end the program that listens there, "
            "or set SERVICE_PORT to another port."
        ) from None
    listener.set_inheritable(True)
    return listener


async def _start_and_stop(app: FastAPI) -> None:
    async with app.router.lifespan_context(app):
        pass
