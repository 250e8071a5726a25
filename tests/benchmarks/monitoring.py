"""What metrics and traces add to a run: `.venv/bin/python tests/benchmarks/monitoring.py`.

On Windows the interpreter is .venv\\Scripts\\python.

    --pairs 400     how many pairs of runs each figure comes from
    --save          store the result in data/benchmarks/monitoring.json

Model and embedder are the HTTP server of service.py: it calls the agent's search tool and then gives a fixed answer,
both at once. So a run is Agno, the service, SQLite, and the search in Milvus Lite, and what is added stands out most.
Services with the settings of VARIANTS run side by side. In each round every one of them answers the same question, one
after the other and in random order, whole and then streamed (the answer in 52 pieces); a pair is a service's run and
that of the first, the baseline, in the same round.

What the client waits for is one thing; spans are stored and sent by another thread of the service, once a second. That
is in the processor time of the service's process, which is given as well.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import psutil
from httpx_sse import connect_sse
from numpy.typing import NDArray
from service import QUESTION, ROOT, WARM_UP, model_server, require, upload  # finds utils for the lines below
from store_workload import Ratio, machine, verdict
from tqdm.auto import tqdm

from utils import lesson
from utils.milvus_lab import lite_server
from utils.service import service

RESULT = ROOT / "data" / "benchmarks" / "monitoring.json"
TARGET = 1.03
RUNS = "/agents/knowledge-assistant/runs"
WAYS = {"whole": False, "streamed": True}
BASELINE = "off"
OFF = {"METRICS": "false", "TRACES_SAMPLE": "0"}
VARIANTS: dict[str, dict[str, str]] = {
    BASELINE: OFF,
    "off, a second time": OFF,  # what two equal services differ by
    "metrics": {"TRACES_SAMPLE": "0"},
    "metrics, one trace in ten": {"TRACES_SAMPLE": "0.1"},
    "metrics and traces": {"TRACES_SAMPLE": "1"},
    "metrics and traces, OTLP only": {"TRACES_SAMPLE": "1", "TRACES_IN_DATABASE": "false"},
}


class _Collector(BaseHTTPRequestHandler):
    """Takes what it is sent, and does nothing with it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing, where the base class writes a line."""


@contextmanager
def collector() -> Iterator[str]:
    """An OTLP collector in this process; yields its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(api: httpx.Client, session_id: str, streamed: bool) -> float:
    """Seconds of one run, until its last event if it is streamed."""
    form = {"message": QUESTION, "stream": str(streamed).lower(), "user_id": "ann", "session_id": session_id}
    start = time.perf_counter()
    if streamed:
        with connect_sse(api, "POST", RUNS, data=form) as source:
            *_, last = source.iter_sse()
        seconds = time.perf_counter() - start
        require("COMPLETED" if last.event == "RunCompleted" else last.event, last.json().get("content"))
    else:
        answer = api.post(RUNS, data=form)
        seconds = time.perf_counter() - start
        require(answer.json()["status"], answer.json()["content"])
    return seconds


def measure(folder: Path, pairs: int) -> dict[str, tuple[dict[str, list[float]], float]]:
    """Seconds of each run by way, and of the processor in all, by variant."""
    seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in VARIANTS}
    clients: dict[str, httpx.Client] = {}
    processes: dict[str, psutil.Process] = {}
    with ExitStack() as stack:
        model = stack.enter_context(model_server(folder / "model.log"))
        milvus = stack.enter_context(lite_server(folder / "milvus", progress=False))
        url = stack.enter_context(collector())
        for number, (name, settings) in enumerate(VARIANTS.items()):
            environment = {**model, **settings, "MILVUS_URI": milvus.uri, "MILVUS_COLLECTION": f"variant_{number}"}
            if "OTLP" in name:
                environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = url
            found = stack.enter_context(service(folder / str(number), environment, progress=False))
            upload(found)
            clients[name] = stack.enter_context(httpx.Client(base_url=found.url, timeout=60, trust_env=False))
            processes[name] = psutil.Process(found.process.pid)
        choice = random.Random(0)
        used: dict[str, float] = {}
        for number in tqdm(range(WARM_UP + pairs), desc="rounds", leave=False):
            if number == WARM_UP:
                used = {name: processor_seconds(process) for name, process in processes.items()}
            for name in choice.sample([*VARIANTS], len(VARIANTS)):
                for way, streamed in WAYS.items():
                    taken = ask(clients[name], f"{way}-{number}", streamed)
                    if number >= WARM_UP:
                        seconds[name][way].append(taken)
        time.sleep(2)  # what still waits is exported
        return {name: (seconds[name], processor_seconds(processes[name]) - used[name]) for name in VARIANTS}


def processor_seconds(process: psutil.Process) -> float:
    """Used so far, by all threads."""
    times = process.cpu_times()
    return times.user + times.system


def added(runs: list[float], baseline: list[float]) -> tuple[float, Ratio]:
    """Median of the pairs' differences in seconds, and 1 + this by the baseline's median, with a 95 % interval."""
    pairs: NDArray[np.float64] = np.array([np.subtract(runs, baseline), baseline])
    picks = np.random.default_rng(0).integers(pairs.shape[1], size=(2000, pairs.shape[1]))
    differences, medians = np.median(pairs[:, picks], axis=2)
    low, high = np.quantile(1 + differences / medians, [0.025, 0.975])
    difference = float(np.median(pairs[0]))
    return difference, Ratio(1 + difference / float(np.median(baseline)), float(low), float(high))


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    lesson.quiet_logs()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        measured = measure(Path(name), options.pairs)
    figures: dict[str, dict[str, dict[str, Any]]] = {way: {} for way in WAYS}
    for way, rows in figures.items():
        baseline = measured[BASELINE][0][way]
        for name, (by_way, _) in measured.items():
            difference, ratio = added(by_way[way], baseline)
            rows[name] = {
                "p50 ms": round(1000 * float(np.median(by_way[way])), 2),
                "added ms, median of pairs": round(1000 * difference, 2),
                "ratio, with its 95 % interval": ratio.as_list(),
            }
            if name != BASELINE:
                print(f"{way}: {name:<30} {1000 * difference:+.2f} ms  {verdict(ratio, TARGET, at_least=False)}")
        print(pd.DataFrame(rows).T.to_string(), "\n")
    # Of both ways: the process does not tell them apart.
    used = {name: round(1000 * all_used / len(WAYS) / options.pairs, 2) for name, (_, all_used) in measured.items()}
    print(pd.Series(used, name="processor ms a run").to_frame().to_string())
    print(f"\n{options.pairs} pairs. {machine()}")
    if options.save:
        packages = ("agno", "opentelemetry-sdk", "openinference-instrumentation-agno", "prometheus-client")
        result = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": {package: version(package) for package in packages},
            "pairs": options.pairs,
            **figures,
            "processor ms a run": used,
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
