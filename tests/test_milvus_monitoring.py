"""Monitoring for real: a Prometheus with the repository's rules reads a service and every role of a Milvus cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from monitoring_files import MONITORING, RULES, dashboard_expressions, load, metrics_used, program, rules
from pymilvus import MilvusClient
from service_runs import stream_run
from test_monitoring import CANTEEN, QUESTION, RUNS, upload
from waiting import wait_for

from utils.hosting.metrics import PATH
from utils.processes import ServerProcess, free_ports
from utils.service import Service, service

if TYPE_CHECKING:
    from utils.milvus_lab.distributed import Cluster

LIBRARY = "# Library\n\nThe library of the canteen opens at 9:00 on Fridays."
# What the lab cannot show: its Milvus has no BM25, and last week it did not run.
EMPTY = re.compile("offset 1w|agent_retriever_agreement|agent:retriever_agreement")


@pytest.fixture(scope="module")
def agent(
    tmp_path_factory: pytest.TempPathFactory, milvus_cluster: Cluster, offline_environment: dict[str, str]
) -> Iterator[Service]:
    """The service on the cluster, after some runs, and an insert by somebody else; the service itself upserts."""
    environment = {
        **offline_environment,
        "MILVUS_URI": milvus_cluster.uri,
        "MILVUS_TOKEN": milvus_cluster.token,
        "MILVUS_COLLECTION": "monitored",
        "GRADE_SAMPLE": "1",
        "MODEL_PRICES": f"{offline_environment['MODEL_ID']}=1/2",
    }
    with service(tmp_path_factory.mktemp("service"), environment, progress=False) as found:
        with httpx.Client(base_url=found.url, timeout=60, trust_env=False) as api:
            for name, text in (("canteen.md", CANTEEN), ("library.md", LIBRARY)):
                upload(api, name, text)
        ask(found)
        client = MilvusClient(milvus_cluster.uri, token=milvus_cluster.token)
        client.create_collection("somebody_elses", dimension=2)
        client.insert("somebody_elses", [{"id": 1, "vector": [1.0, 0.0]}])
        yield found
        client.drop_collection("somebody_elses")
        client.close()


def ask(found: Service, times: int = 3) -> None:
    with httpx.Client(base_url=found.url, timeout=60, trust_env=False) as api:
        for _ in range(times):
            stream_run(api, RUNS, QUESTION)


def names(url: str) -> set[str]:
    """Names of all series that an endpoint shows, as they are written there."""
    answer = httpx.get(url, trust_env=False)
    assert answer.status_code == 200
    return set(re.findall(r"(?m)^(\w+)[{ ]", answer.text))


class Prometheus:
    """A Prometheus that reads these targets every second, with the repository's rules."""

    def __init__(self, folder: Path, agent: Service, lab: Cluster) -> None:
        config = load(MONITORING / "prometheus.yml")
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        del config["alerting"]
        jobs = {job["job_name"]: job for job in config["scrape_configs"]}
        del jobs["agent"]["dns_sd_configs"]
        jobs["agent"]["static_configs"] = [{"targets": [agent.url.removeprefix("http://")]}]
        jobs["milvus"]["static_configs"] = [
            {"targets": [httpx.URL(url).netloc.decode()], "labels": {"role": role.split("-")[0]}}
            for role, url in lab.metrics.items()
        ]
        config["scrape_configs"] = [jobs["agent"], jobs["milvus"]]
        (folder / "rules").mkdir(parents=True)
        for name in ("recording.yml", "alerts.yml"):
            document = load(RULES / name)
            for group in document["groups"]:
                group.pop("interval", None)
            (folder / "rules" / name).write_text(yaml.safe_dump(document, sort_keys=False))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._port = free_ports(1)[0]
        self.process = ServerProcess(
            "Prometheus",
            [
                program("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            folder / "log",
        )
        self.process.wait_until(self._ready, 60)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self._port}/-/ready", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(
            f"http://127.0.0.1:{self._port}/api/v1/{path}", params=parameters, timeout=30, trust_env=False
        ).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression: "metric" and "value" each."""
        return list(self.get("query", query=expression)["result"])

    def value(self, expression: str) -> float | None:
        """The value of the only series; None if there is none."""
        found = self.query(expression)
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, agent: Service, milvus_cluster: Cluster
) -> Iterator[Prometheus]:
    program("prometheus")
    started = Prometheus(tmp_path_factory.mktemp("prometheus") / "files", agent, milvus_cluster)
    with started.process:
        # The first reading of a counter is no increase: read once, then more runs.
        assert wait_for(lambda: started.value("count(up == 1)") == 1 + len(milvus_cluster.metrics))
        ask(agent)
        assert wait_for(lambda: (started.value("sum(agent:cost:usd_per_hour)") or 0) > 0)
        yield started


def test_every_metric_of_rules_and_dashboard_exists(agent: Service, milvus_cluster: Cluster) -> None:
    def missing() -> set[str]:
        return metrics_used().difference(names(f"{agent.url}{PATH}"), *map(names, milvus_cluster.metrics.values()))

    # Coordinators count every few seconds.
    assert wait_for(lambda: not missing()), missing()
    assert len(metrics_used()) > 30, "the expression that finds the names finds few"


def test_all_rules_are_loaded_and_evaluate(prometheus: Prometheus) -> None:
    number = len(rules("recording.yml")) + len(rules("alerts.yml"))

    def healths() -> list[str]:
        groups = prometheus.get("rules")["groups"]
        return [f"{rule['health']} {rule.get('lastError', '')}".strip() for group in groups for rule in group["rules"]]

    assert wait_for(lambda: "unknown" not in healths())
    assert healths() == ["ok"] * number


def test_limits_of_percentiles_are_bounds_of_buckets(prometheus: Prometheus) -> None:
    # Between two bounds a percentile is a guess; at one of them it is counted.
    expressions = {rule["record"]: rule["expr"] for rule in rules("recording.yml")}
    limits = [
        found
        for rule in rules("alerts.yml")
        for found in re.findall(r"((?:agent|milvus):\w+:p95_5m)(?:\{[^}]*\})? > ([\d.]+)", rule["expr"])
    ]
    assert len(limits) > 5
    for name, limit in limits:
        (metric,) = re.findall(r"\w+_bucket", expressions[name])
        bounds = {float(one["metric"]["le"]) for one in prometheus.query(f"count by (le) ({metric})")}
        assert float(limit) in bounds, f"{name} > {limit}"


def test_a_quiet_service_on_a_quiet_cluster_alarms_nobody(prometheus: Prometheus) -> None:
    assert [alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]] == []


@pytest.mark.parametrize("panel", dashboard_expressions())
def test_the_dashboard_shows_something(prometheus: Prometheus, panel: str) -> None:
    expression = dashboard_expressions()[panel]
    if EMPTY.search(expression):
        prometheus.query(expression)
    else:
        assert wait_for(lambda: any(one["value"][1] != "NaN" for one in prometheus.query(expression)), 20), expression


def test_a_lost_query_node_shows_in_the_alert_and_the_target(prometheus: Prometheus, milvus_cluster: Cluster) -> None:
    alert = 'ALERTS{alertname="MilvusQueryNodeGone"}'
    assert prometheus.value("max(milvus_querycoord_querynode_num)") == 2 and prometheus.query(alert) == []
    milvus_cluster.kill_query_node()
    try:
        assert wait_for(lambda: prometheus.value('sum(up{job="milvus", role="querynode"})') == 1)
        # Milvus takes it for gone when its session ends.
        assert wait_for(lambda: prometheus.query(alert) != [])
        assert prometheus.query(alert)[0]["metric"]["alertstate"] == "pending"
        assert prometheus.query('ALERTS{alertname="MilvusDown", role="querynode"}') == [], "the other one answers"
    finally:
        milvus_cluster.add_query_node()
