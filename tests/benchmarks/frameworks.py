"""What Agno and LangGraph cost beyond a loop written by hand: `.venv/bin/python tests/benchmarks/frameworks.py`.

On Windows the interpreter is .venv\\Scripts\\python.

    (no option)              milliseconds a run, seconds to start, megabytes
    --rounds 300             how often each way runs; every round runs all of them, in another order
    --starts 7               how many processes the seconds and megabytes come from, for each framework
    --agent-server PYTHON    also LangGraph's Agent Server, in the environment of that interpreter, which must hold
                             langgraph-cli[inmem] and langchain; without it the stored figures of the last time stay
    --save                   store the result in data/benchmarks/frameworks.json

The two assistants are those of notebook 05, taken from its cells. The model is a function behind the HTTP client: it
calls the tool once and then answers, at once, and the search finds the same passage at once. So what is measured is the
framework, OpenAI's client and SQLite. The baseline is the same loop written by hand with OpenAI's client. With traces:
OpenInference's instrumentation, which makes the spans of a run and hands them to an exporter that forgets them; or
Agno's own, in batches into its database. Those runs take turns with the same baseline, in rounds of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import itertools
import json
import os
import random
import subprocess
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
os.environ["AGNO_TELEMETRY"] = os.environ["LANGSMITH_TRACING"] = "false"

import httpx  # noqa: E402
import nbformat  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from store_workload import machine, ratio_of_medians  # noqa: E402

from utils import lesson  # noqa: E402
from utils.processes import ServerProcess, free_ports  # noqa: E402

NOTEBOOK = ROOT / "notebooks" / "05_agno_vs_langgraph.ipynb"
RESULT = ROOT / "data" / "benchmarks" / "frameworks.json"
PACKAGES = ("agno", "langchain", "langgraph", "langgraph-checkpoint-sqlite", "langchain-openai", "openai")
URL, KEY, MODEL = "http://model.invalid/v1", "none", "fixed"
QUESTION, ANSWER = "When does the canteen close on Fridays?", "The canteen closes at 14:30 on Fridays. [canteen]"
WARM_UP = 20
RUNS_AFTER_START = 100
AT_ONCE = 10
BASELINE = "by hand"

Run = Callable[[str], Awaitable[Any]]
_numbers = itertools.count()
_connections: list[Any] = []  # to SQLite; LangGraph's checkpointer leaves closing them to its user


def write_programs(folder: Path) -> None:
    """The assistants of notebook 05 as files, on the path of this process."""
    found: dict[str, Any] = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "programs" in cell.metadata.get("tags", []):
            exec(cell.source, found)
    for name, text in found["programs"].items():
        (folder / name).write_text(text.lstrip(), encoding="utf-8")
    sys.path.insert(0, str(folder))


def reply(request: httpx.Request) -> httpx.Response:
    """OpenAI's chat completions: a call of the one tool, and after its result a fixed answer."""
    asked = json.loads(request.content)
    message: dict[str, Any] = {"role": "assistant", "content": ANSWER}
    if asked["messages"][-1]["role"] != "tool":
        function = {"name": asked["tools"][0]["function"]["name"], "arguments": json.dumps({"query": QUESTION})}
        call = {"id": f"call_{next(_numbers)}", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if message["content"] else "tool_calls"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
    return httpx.Response(200, json={**body, "usage": usage})


def instant_model() -> httpx.AsyncClient:
    """An HTTP client behind which the model answers, without a network."""
    return httpx.AsyncClient(transport=httpx.MockTransport(reply))


class Hit:
    """The passage that every search finds, as far as the assistants look at it."""

    name, content, meta_data = "canteen", "The canteen closes at 14:30 on Fridays.", {}  # type: ignore[var-annotated]

    def to_dict(self) -> dict[str, Any]:
        return {"meta_data": self.meta_data, "content": self.content, "name": self.name}


class ReadyStore:
    """A vector store that finds one passage at once. It imports neither framework, so that starting can be measured."""

    def exists(self) -> bool:
        return True

    async def async_search(self, *_: Any, **__: Any) -> list[Hit]:
        return [Hit()]


def require(answer: object) -> None:
    """Raise RuntimeError unless a run ended with the model's answer."""
    if answer != ANSWER:
        raise RuntimeError(f"a run ended with {answer!r}")


def by_hand(store: Any, database: Path | None = None) -> Run:
    """The loop without a framework; it keeps nothing, so `database` stays unused."""
    from common import INSTRUCTIONS
    from openai import AsyncOpenAI

    place: Any = {"base_url": URL, "api_key": KEY, "http_client": instant_model()}
    client = AsyncOpenAI(**place)
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    tool: Any = {"type": "function", "function": {"name": "search_knowledge_base", "parameters": parameters}}

    async def run(session: str) -> None:
        messages: list[Any] = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": QUESTION}]
        while True:
            completion = await client.chat.completions.create(model=MODEL, messages=messages, tools=[tool])
            message: Any = completion.choices[0].message
            if not message.tool_calls:
                return require(message.content)
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                hits = await store.async_search(json.loads(call.function.arguments)["query"])
                passages = json.dumps([{"name": hit.name, "content": hit.content} for hit in hits])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": passages})

    return run


def with_agno(store: Any, database: Path | None = None) -> Run:
    """Notebook 05's assistant in Agno, with its sessions in a SQLite file or nowhere."""
    from agno.db.sqlite import SqliteDb
    from agno.models.openai import OpenAILike
    from agno_assistant import make_assistant

    model = OpenAILike(id=MODEL, base_url=URL, api_key=KEY, http_client=instant_model())
    agent = make_assistant(model, store, SqliteDb(db_file=str(database)) if database else None)
    agent.add_history_to_context = database is not None  # without a database it would warn on every run

    async def run(session: str) -> None:
        require((await agent.arun(QUESTION, session_id=session)).content)

    return run


def with_langgraph(store: Any, database: Path | None = None, durability: Any = None) -> Run:
    """Notebook 05's assistant in LangGraph, with its checkpoints in a SQLite file or nowhere."""
    import aiosqlite
    from langchain_openai import ChatOpenAI
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
    from langgraph_assistant import make_assistant

    checkpointer = None
    if database:
        _connections.append(aiosqlite.connect(str(database)))
        checkpointer = AsyncSqliteSaver(_connections[-1])
    place: Any = {"model": MODEL, "base_url": URL, "api_key": KEY, "http_async_client": instant_model()}
    graph = make_assistant(ChatOpenAI(**place), store, checkpointer)

    async def run(session: str) -> None:
        config = {"configurable": {"thread_id": session}}
        state = await graph.ainvoke({"messages": [("user", QUESTION)]}, config, durability=durability)
        require(state["messages"][-1].text)

    return run


MAKERS: dict[str, Callable[..., Run]] = {BASELINE: by_hand, "Agno": with_agno, "LangGraph": with_langgraph}


async def take_turns(ways: dict[str, Run], rounds: int, name: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each run of each way, and the processor seconds of a run, which the machine's other work is not in."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    processor = dict.fromkeys(ways, 0.0)
    for number in range(WARM_UP + rounds):
        for way in random.sample(list(ways), len(ways)):
            start, used = time.perf_counter(), time.process_time()
            await ways[way](f"{name}-{number}")
            if number >= WARM_UP:
                seconds[way].append(time.perf_counter() - start)
                processor[way] += time.process_time() - used
    return seconds, {way: used / rounds for way, used in processor.items()}


def rows(measured: tuple[dict[str, list[float]], dict[str, float]]) -> dict[str, dict[str, Any]]:
    """The figures of each way beside the baseline of the same rounds."""
    seconds, processor = measured
    p50 = {way: 1000 * float(np.median(took)) for way, took in seconds.items()}
    return {
        way: {
            "ms": round(p50[way], 2),
            "added ms": round(p50[way] - p50[BASELINE], 2),
            "processor ms": round(1000 * processor[way], 2),
            "added processor ms": round(1000 * (processor[way] - processor[BASELINE]), 2),
            "ratio to by hand, with its 95 % interval": ratio_of_medians(took, seconds[BASELINE]).as_list(),
        }
        for way, took in seconds.items()
    }


@contextmanager
def traced(database: Path | None) -> Iterator[None]:
    """Instrumentation of both frameworks, with spans that nobody keeps; or Agno's own, into its database."""
    from openinference.instrumentation.agno import AgnoInstrumentor
    from openinference.instrumentation.langchain import LangChainInstrumentor
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    instrumentors: list[Any] = [AgnoInstrumentor()]
    if database:
        from agno.db.sqlite import SqliteDb
        from agno.tracing import setup_tracing

        setup_tracing(SqliteDb(db_file=str(database)), batch_processing=True)
        provider: Any = trace.get_tracer_provider()
    else:
        instrumentors.append(LangChainInstrumentor())
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(Nowhere()))
        for instrumentor in instrumentors:
            instrumentor.instrument(tracer_provider=provider)
    try:
        yield
    finally:
        for instrumentor in instrumentors:
            instrumentor.uninstrument()
        provider.shutdown()  # before the database's folder is removed


async def measure_overhead(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of a run, of every way."""
    store = ReadyStore()
    hand, agno, graph = by_hand(store), with_agno(store, folder / "agno.db"), with_langgraph(store, folder / "graph.db")
    plain = {
        BASELINE: hand,
        "Agno": with_agno(store),
        "Agno, SQLite": agno,
        "LangGraph": with_langgraph(store),
        "LangGraph, SQLite": graph,
        "LangGraph, SQLite, sync": with_langgraph(store, folder / "sync.db", "sync"),
        "LangGraph, SQLite, exit": with_langgraph(store, folder / "exit.db", "exit"),
    }
    figures = rows(await take_turns(plain, rounds, "plain"))
    try:
        with traced(None):
            spans = {BASELINE: hand, "Agno, SQLite, spans": agno, "LangGraph, SQLite, spans": graph}
            with_spans = rows(await take_turns(spans, rounds, "spans"))
        with traced(folder / "traces.db"):
            own = rows(await take_turns({BASELINE: hand, "Agno, SQLite, own traces": agno}, rounds, "own"))
    finally:
        for connection in _connections:
            await connection.close()
    return {**figures, **_others(with_spans), **_others(own)}


def _others(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {way: row for way, row in found.items() if way != BASELINE}


def start_program(framework: str) -> str:
    """A program that makes the assistant, runs it, and prints how long and how large that was."""
    parts = [
        f"URL, KEY, MODEL, QUESTION, ANSWER = {(URL, KEY, MODEL, QUESTION, ANSWER)!r}",
        "_numbers, _connections = itertools.count(), []",
    ]
    parts += [inspect.getsource(part) for part in (reply, instant_model, Hit, ReadyStore, require)]
    return "\n".join(
        [_PRELUDE, *parts, inspect.getsource(MAKERS[framework]), _MEASURE.replace("MAKER", MAKERS[framework].__name__)]
    )


_PRELUDE = """
from __future__ import annotations
import asyncio, itertools, json, os, time
from pathlib import Path
from typing import Any
import httpx, psutil
"""
_MEASURE = f"""
async def main():
    process = psutil.Process()
    empty, start = process.memory_info().rss, time.perf_counter()
    run = MAKER(ReadyStore(), Path("start.db"))
    seconds, made = time.perf_counter() - start, process.memory_info().rss
    for number in range({RUNS_AFTER_START}):
        await run(f"start-{{number}}")
    runs = process.memory_info().rss
    figures = {{"seconds": seconds, "MB": (made - empty) / 2**20}}
    figures["MB after {RUNS_AFTER_START} runs"] = (runs - empty) / 2**20
    print(json.dumps(figures), flush=True)
    os._exit(0)  # the thread of an open connection would keep the process

asyncio.run(main())
"""


def measure_start(folder: Path, times: int) -> dict[str, dict[str, float]]:
    """Seconds until the assistant is made and the megabytes that it adds: medians of several processes, in turn."""
    found: dict[str, list[dict[str, float]]] = {framework: [] for framework in MAKERS}
    for number in range(times):
        for framework in random.sample(list(MAKERS), len(MAKERS)):
            place = folder / f"start-{number}-{framework}"
            place.mkdir()
            command = [sys.executable, "-c", start_program(framework)]
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, text=True, check=True, timeout=600
            )
            found[framework].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        framework: {name: round(float(np.median([one[name] for one in ones])), 2) for name in ones[0]}
        for framework, ones in found.items()
    }


GRAPH = """
from itertools import count

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

model = GenericFakeChatModel(messages=(AIMessage(f"answer {number}") for number in count()))
graph = create_agent(model, tools=[])
"""


def measure_agent_server(python: Path, folder: Path) -> dict[str, Any]:
    """What LangGraph's Agent Server does in its development mode, without a key: its routes, and ten runs at once."""
    (folder / "graph.py").write_text(GRAPH, encoding="utf-8")
    settings = {"dependencies": ["."], "graphs": {"assistant": f"{folder}/graph.py:graph"}}
    (folder / "langgraph.json").write_text(json.dumps(settings), encoding="utf-8")
    (port,) = free_ports(1)
    options = ["--no-browser", "--no-reload", "--port", str(port), "--config", str(folder / "langgraph.json")]
    api = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)

    def answers() -> bool:
        try:
            return api.get("/ok").status_code == 200
        except httpx.HTTPError:
            return False

    async def ten(thread: str) -> None:
        async with httpx.AsyncClient(base_url=api.base_url, timeout=120, trust_env=False) as client:
            bodies = [
                {
                    "assistant_id": "assistant",
                    "input": {"messages": [{"role": "user", "content": f"Question {number}"}]},
                }
                for number in range(AT_ONCE)
            ]
            sent = [client.post(f"/threads/{thread}/runs/wait", json=body) for body in bodies]
            for answer in await asyncio.gather(*sent):
                answer.raise_for_status()

    command = [str(python.parent / "langgraph"), "dev", *options]
    started = time.monotonic()
    quiet = {"LANGGRAPH_CLI_NO_ANALYTICS": "1"}
    with ServerProcess("Agent Server", command, folder / "server.log", quiet, folder=folder) as process:
        process.wait_until(answers, 300)
        seconds = time.monotonic() - started
        paths = api.get("/openapi.json").json()["paths"]
        thread = api.post("/threads", json={}).json()["thread_id"]
        asyncio.run(ten(thread))
        messages = api.get(f"/threads/{thread}/state").json()["values"]["messages"]
        return {
            "version": api.get("/info").json()["version"],
            "licence": "Elastic-2.0",
            "operations that it answers": sum(len(path) for path in paths.values()),
            "seconds to start": round(seconds, 1),
            "turns after ten runs at once on one thread": sum(message["type"] == "human" for message in messages),
        }


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--agent-server", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    random.seed(0)
    lesson.quiet_logs()
    stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_programs(folder)
        start = measure_start(folder, options.starts)
        overhead = asyncio.run(measure_overhead(folder, options.rounds))
        if options.agent_server:
            stored["agent server"] = measure_agent_server(options.agent_server, folder)
    print(pd.DataFrame(overhead).T.to_string())
    print(f"\n{pd.DataFrame(start).T.to_string()}")
    print(f"\n{json.dumps(stored.get('agent server'))}")
    print(f"\n{options.rounds} rounds, {options.starts} starts. {machine()}")
    if options.save:
        result = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": {package: version(package) for package in PACKAGES},
            "rounds": options.rounds,
            "starts": options.starts,
            "overhead": overhead,
            "start": start,
            "agent server": stored.get("agent server"),
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
