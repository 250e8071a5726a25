"""Readings of metrics against what Prometheus's own functions would say, and the panel that draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from waiting import wait_for
from web_servers import QuietHandler, serving

from utils.milvus_lab.lite import LiteServer
from utils.monitoring_panel import PLOTS, MonitoringPanel
from utils.processes import free_ports
from utils.prometheus import MetricsError, Reading, read
from utils.service import service


class Endpoint(ThreadingHTTPServer):
    """Answers with `text` and `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.text, self.status = "", 200
        self.url = f"http://127.0.0.1:{self.server_port}/metrics"

    def show(self, registry: CollectorRegistry) -> None:
        self.text = generate_latest(registry).decode()


class _Answers(QuietHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Endpoint)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.text.encode())


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving(Endpoint()) as server:
        yield server


def test_a_difference_is_what_happened_in_between(endpoint: Endpoint) -> None:
    registry = CollectorRegistry()
    runs = Counter("runs", "", ["outcome", "component"], registry=registry)
    seconds = Histogram("seconds", "", buckets=(1, 2, 4), registry=registry)
    runs.labels("completed", "a").inc(5)
    seconds.observe(3)
    endpoint.show(registry)
    before = read(endpoint.url)
    runs.labels("completed", "a").inc(2)
    runs.labels("completed", "b").inc(1)
    runs.labels("failed", "b").inc(4)
    for value in (0.5, 0.5, 1.5, 9):
        seconds.observe(value)
    endpoint.show(registry)
    gained = read(endpoint.url) - before
    assert gained.seconds > 0
    assert gained.total("runs_total") == 7
    assert gained.total("runs_total", outcome="completed") == 3
    assert gained.total("runs_total", outcome="completed", component="b") == 1
    assert gained.total("runs_total", outcome="cancelled") == gained.total("nothing") == 0
    assert gained.mean("seconds") == pytest.approx(11.5 / 4)
    assert math.isnan(gained.mean("nothing"))


def test_quantiles_are_interpolated_as_histogram_quantile_does() -> None:
    counts = {"1": 2.0, "2": 3.0, "4": 3.0, "+Inf": 4.0}
    reading = Reading(1, {("s_bucket", frozenset({("le", bound)})): count for bound, count in counts.items()})
    # 1 of the 2 in the first bucket; halfway through the second; 4 is the last bound that is a number.
    assert [reading.quantile(share, "s") for share in (0.25, 0.625, 0.75, 0.99)] == [0.5, 1.5, 2, 4]
    assert math.isnan(reading.quantile(0.5, "nothing"))


def test_a_counter_that_began_again_counts_from_zero() -> None:
    series = ("runs_total", frozenset[tuple[str, str]]())
    assert (Reading(2, {series: 3.0}) - Reading(1, {series: 10.0})).total("runs_total") == 3


def test_names_are_those_of_the_endpoint_and_several_add_up(endpoint: Endpoint) -> None:
    endpoint.text = '# TYPE vectors counter\nvectors{node="1"} 4\n# TYPE other_total counter\nother_total 1\n'
    twice = read(endpoint.url, endpoint.url)
    assert twice.total("vectors") == 8, "Milvus's counters do not end in _total"
    assert twice.total("vectors_total") == 0
    assert twice.total("other_total") == 2


@pytest.mark.parametrize(
    ("status", "text", "sentence"), [(404, "", "answers 404"), (200, "<html>", "are no Prometheus")]
)
def test_what_is_no_endpoint_is_said_in_one_sentence(endpoint: Endpoint, status: int, text: str, sentence: str) -> None:
    endpoint.status, endpoint.text = status, text
    with pytest.raises(MetricsError, match=sentence):
        read(endpoint.url)


def test_nobody_there_is_said_in_one_sentence() -> None:
    with pytest.raises(MetricsError, match="start what should answer"):
        read(f"http://127.0.0.1:{free_ports(1)[0]}/metrics")


def text_of(panel: MonitoringPanel) -> str:
    bundle: Any = panel._repr_mimebundle_()
    return str(bundle["text/plain"])


def test_the_panel_shows_a_service_at_work(
    tmp_path: Path, offline_environment: dict[str, str], milvus_lite_server: LiteServer
) -> None:
    settings = {**offline_environment, "MILVUS_URI": milvus_lite_server.uri, "MILVUS_COLLECTION": "panel"}
    with service(tmp_path, settings, progress=False) as found:
        panel = MonitoringPanel([f"{found.url}/metrics/prometheus"], every=0.05).start()
        try:
            assert wait_for(lambda: bool(panel.lines("Runs")["completed"]))
            sent = {"message": "When does the canteen close on Fridays?", "stream": "true"}
            for _ in range(2):
                httpx.post(f"{found.url}/agents/knowledge-assistant/runs", data=sent, timeout=60)
            assert wait_for(lambda: any(value > 0 for _, value in panel.lines("Runs")["completed"]))
            assert wait_for(lambda: any(value > 0 for _, value in panel.lines("Latency by stage")["vector search"]))
            panel.mark("here")
            assert bytes(panel.picture.value).startswith(b"\x89PNG")
            assert "completed" in text_of(panel) and panel.error == ""
            assert wait_for(lambda: "completed" in panel.figures.value)
        finally:
            panel.stop()
    panel.look()
    assert "No metrics can be read" in panel.error and panel.error in panel.message.value
    titles = [axes.get_title() for axes in panel.figure().axes]
    assert titles == list(PLOTS)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panel.figure().axes)
