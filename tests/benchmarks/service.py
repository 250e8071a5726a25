"""What the service adds to an agent's run: `.venv/bin/python tests/benchmarks/service.py`.

On Windows the interpreter is .venv\\Scripts\\python.

    (no option)     one and two workers, on SQLite and on PostgreSQL; Milvus Lite as a server
    --pairs 100     how many pairs of runs the added milliseconds come from
    --runs 400      how many runs the runs per second come from
    --save          store the result in data/benchmarks/service.json

Model and embedder are a real HTTP server in a process of its own. It calls the agent's search tool and then gives a
fixed answer, both at once. So what is measured is Agno, the service around it, the database, and the search in Milvus.
Each pair is the same run, awaited in this process and sent to the service, one after the other and in changing order.
Everything shares one machine: a second worker gets what the model server, Milvus, the database and the client leave.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import httpx  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import psutil  # noqa: E402
import uvicorn  # noqa: E402
from agno.agent import Agent  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import JSONResponse, Response, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402
from store_workload import machine, ratio_of_medians  # noqa: E402

from utils import lesson  # noqa: E402
from utils.apps.knowledge_agent import NAME, make_agent  # noqa: E402
from utils.hosting import find_models, load_config, open_database, open_knowledge  # noqa: E402
from utils.milvus_lab import lite_server  # noqa: E402
from utils.postgres import postgres  # noqa: E402
from utils.processes import ServerProcess, end_with_owner, free_ports, owner_mark  # noqa: E402
from utils.service import Service, service  # noqa: E402

RESULT = ROOT / "data" / "benchmarks" / "service.json"
MODEL, EMBEDDING = "fixed", "fixed-embedding"
DOCUMENT = "# Canteen\n\nThe canteen closes at 14:30 on Fridays."
ANSWER = "The canteen closes at 14:30 on Fridays. [canteen.md]"
QUESTION = "When does the canteen close on Fridays?"
VECTOR = [1.0] + [0.0] * 63
WARM_UP = 20
AT_ONCE = 16

Run = Callable[[str], Awaitable[None]]


def model_app() -> Starlette:
    """OpenAI's routes: first a call of the tool, then a fixed answer; streamed, in pieces of one letter."""

    async def chat(request: Request) -> Response:
        asked = await request.json()
        message: dict[str, Any] = {"role": "assistant", "content": ANSWER}
        if asked["messages"][-1]["role"] != "tool":
            function = {"name": asked["tools"][0]["function"]["name"], "arguments": json.dumps({"query": QUESTION})}
            call = {"id": f"call_{time.monotonic_ns()}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        reason = "stop" if message["content"] else "tool_calls"
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        body = {"id": "c", "object": "chat.completion", "created": 0, "model": MODEL}
        if not asked.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": reason}
            return JSONResponse({**body, "choices": [choice], "usage": usage})
        pieces: list[dict[str, Any]] = [{"content": letter} for letter in message["content"] or ""]
        if reason == "tool_calls":
            pieces = [{"role": "assistant", "tool_calls": [{"index": 0, **message["tool_calls"][0]}]}]
        body["object"] = "chat.completion.chunk"
        deltas = [*((piece, None) for piece in pieces), ({}, reason)]
        chunks = [{**body, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in deltas]
        lines = [json.dumps(chunk) for chunk in [*chunks, {**body, "choices": [], "usage": usage}]] + ["[DONE]"]
        return StreamingResponse((f"data: {line}\n\n" for line in lines), media_type="text/event-stream")

    async def embeddings(request: Request) -> Response:
        texts = (await request.json())["input"]
        count = 1 if isinstance(texts, str) else len(texts)
        rows = [{"object": "embedding", "index": number, "embedding": VECTOR} for number in range(count)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "model": EMBEDDING, "data": rows, "usage": usage})

    async def models(request: Request) -> Response:
        names = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in (MODEL, EMBEDDING)]
        return JSONResponse({"object": "list", "data": names})

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
        ]
    )


def serve_model(port: int, owner: str) -> None:
    """Serve the model until this process is told to end, or until its owner is gone."""
    server = uvicorn.Server(uvicorn.Config(model_app(), port=port, log_level="warning"))
    end_with_owner(owner, lambda: setattr(server, "should_exit", True))
    server.run()


@contextmanager
def model_server(log_file: Path) -> Iterator[dict[str, str]]:
    """Run the model server in a process of its own; yields the settings with which a service uses it."""
    (port,) = free_ports(1)
    command = [sys.executable, str(Path(__file__).resolve()), "--model", str(port), "--owner", owner_mark()]
    url = f"http://127.0.0.1:{port}/v1"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/models", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    with ServerProcess("model server", command, log_file) as process:
        process.wait_until(answers, 30)
        yield {
            "MODEL_PROVIDER": "compatible",
            "OPENAI_BASE_URL": url,
            "OPENAI_API_KEY": "none",
            "MODEL_ID": MODEL,
            "EMBEDDING_ID": EMBEDDING,
            "AGNO_TELEMETRY": "false",
        }


def upload(found: Service) -> None:
    """Give the service the one document."""
    with httpx.Client(base_url=found.url, timeout=30, trust_env=False) as api:
        sent = api.post("/knowledge/content", files={"file": ("canteen.md", DOCUMENT)}).json()["id"]
        while (status := api.get(f"/knowledge/content/{sent}/status").json().get("status")) != "completed":
            if status == "failed":
                raise RuntimeError("the document was not indexed")
            time.sleep(0.05)


def require(status: str, content: object) -> None:
    """Raise RuntimeError unless a run ended as it must."""
    if status != "COMPLETED" or content != ANSWER:
        raise RuntimeError(f"a run ended as {status}: {content}")


def agent_in_process(environment: dict[str, str], folder: Path) -> Agent:
    """The service's own agent, on the same Milvus and the same database."""
    config = load_config(NAME, {**environment, "SERVICE_FOLDER": str(folder)}, folder / "absent.env")
    endpoints, database = find_models(config), open_database(config, NAME)
    knowledge = open_knowledge(config, endpoints, database, NAME)
    return make_agent(config, endpoints, database, knowledge)


async def time_pairs(runs: tuple[Run, Run], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each run of either kind."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            await runs[which](f"pair-{which}-{number}")
            if number >= WARM_UP:
                seconds[which].append(time.perf_counter() - start)
    return seconds


async def runs_per_second(run: Run, count: int, name: str) -> float:
    """With AT_ONCE runs at any time, each in a session of its own."""
    waiting = iter(range(count))

    async def work() -> None:
        for number in waiting:
            await run(f"{name}-{number}")

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return count / (time.perf_counter() - start)


async def measure(found: Service, agent: Agent, workers: int, pairs: int, count: int) -> dict[str, Any]:
    """One row: the service against the agent in this process."""

    async def inside(session_id: str) -> None:
        answer = await agent.arun(QUESTION, session_id=f"in-{workers}-{session_id}", user_id="ann")
        require(answer.status.value, answer.content)

    async with httpx.AsyncClient(base_url=found.url, timeout=60, trust_env=False) as api:

        async def outside(session_id: str) -> None:
            form = {
                "message": QUESTION,
                "stream": "false",
                "user_id": "ann",
                "session_id": f"out-{workers}-{session_id}",
            }
            answer = (await api.post("/agents/knowledge-assistant/runs", data=form)).json()
            require(answer["status"], answer["content"])

        await runs_per_second(outside, WARM_UP * workers, "warm-up")
        served, alone = await time_pairs((outside, inside), pairs)
        speeds = {
            "runs/s in process": await runs_per_second(inside, count, "many"),
            "runs/s of the service": await runs_per_second(outside, count, "many"),
        }
    p50, p50_alone = (1000 * float(np.median(seconds)) for seconds in (served, alone))
    return {
        "p50 ms in process": p50_alone,
        "p50 ms of the service": p50,
        "added ms": p50 - p50_alone,
        "ratio of p50, with its 95 % interval": ratio_of_medians(served, alone).as_list(),
        **speeds,
        "MB a worker": memory(found, workers),
    }


def memory(found: Service, workers: int) -> float:
    """Megabytes of a worker after its runs: its own and its share of what is shared (Linux), else all it holds."""
    process = psutil.Process(found.process.pid)
    serving = [process]
    if workers > 1:
        serving = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
    sizes = [getattr(one.memory_full_info(), "pss", one.memory_info().rss) for one in serving]
    return float(np.mean(sizes)) / 2**20


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--model", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--owner", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        serve_model(options.model, options.owner)
        return
    lesson.quiet_logs()
    figures: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        model_server(Path(name) / "model.log") as model,
        lite_server(Path(name) / "milvus", progress=False) as milvus,
        postgres(Path(name) / "postgres", progress=False) as server,
        asyncio.Runner() as loop,  # one loop for all: Agno's HTTP client belongs to it
    ):
        for database, url in (("SQLite", ""), ("PostgreSQL", server.url)):
            for workers in (1, 2):
                folder = Path(name) / f"{database}-{workers}"
                environment = {**model, "MILVUS_URI": milvus.uri, "DATABASE_URL": url, "SERVICE_WORKERS": str(workers)}
                with service(folder, environment, progress=False) as found:
                    upload(found)
                    agent = agent_in_process(environment, folder)
                    row = loop.run(measure(found, agent, workers, options.pairs, options.runs))
                    figures[f"{database}, {workers} worker{'s'[: workers - 1]}"] = row
    figures = {
        place: {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}
        for place, row in figures.items()
    }
    print(pd.DataFrame(figures).to_string())
    print(f"\n{options.pairs} pairs, {options.runs} runs with {AT_ONCE} at once. {machine()}")
    if options.save:
        result = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": {package: version(package) for package in ("agno", "fastapi", "uvicorn", "pymilvus")},
            "pairs": options.pairs,
            "runs": options.runs,
            "at once": AT_ONCE,
            **figures,
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
