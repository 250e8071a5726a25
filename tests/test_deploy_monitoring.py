"""The files to monitor the service in production: valid for promtool, tested alert by alert, closed by default.

Nothing is started here. tests/test_milvus_monitoring.py asks a real Prometheus, service and Milvus.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from monitoring_files import (
    MONITORING,
    RULES,
    dashboard,
    dashboard_expressions,
    load,
    panels,
    program,
    rules,
)
from test_deploy import DEFAULTS, README, VARIABLE, values

from utils.deploy.monitoring import growth
from utils.index_bench.store import search_table

COMPOSE = (MONITORING / "compose.yaml").read_text(encoding="utf-8")
ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
UNIT_TESTS = sorted(RULES.glob("*.test.yml"))


def promtool(*arguments: str, folder: Path = MONITORING) -> str:
    """Run promtool and return what it says."""
    result = subprocess.run([program("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def services() -> dict[str, dict[str, Any]]:
    """The services of compose.yaml with the defaults of its variables."""
    return dict(yaml.safe_load(VARIABLE.sub(lambda found: found[2], COMPOSE))["services"])


# Rules


def test_promtool_accepts_configuration_and_rules() -> None:
    said = promtool("check", "config", "prometheus.yml")
    assert "2 rule files found" in said and f"{len(ALERTS)} rules found" in said


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_the_alerts_fire_when_they_should_and_not_before(path: Path) -> None:
    promtool("test", "rules", path.name, folder=RULES)


def expectations() -> list[list[set[str]]]:
    """For each incident of the unit tests, the alerts of each moment that is asked."""
    return [
        [
            {
                name
                for sample in asked["exp_samples"]
                for name in re.findall(r'alertname="(\w+)"', sample.get("labels", ""))
            }
            for asked in test["promql_expr_test"]
            if "ALERTS" in asked["expr"]
        ]
        for path in UNIT_TESTS
        for test in load(path)["tests"]
    ]


def test_every_alert_is_tested_firing_and_silent_in_the_same_incident() -> None:
    tested = {name for moments in expectations() if set() in moments for names in moments for name in names}
    assert tested == set(ALERTS)


def test_unit_tests_evaluate_the_groups_in_the_order_of_their_dependence() -> None:
    groups = [group["name"] for name in ("recording.yml", "alerts.yml") for group in load(RULES / name)["groups"]]
    assert len(set(groups)) == len(groups)
    for path in UNIT_TESTS:
        assert load(path)["group_eval_order"] == groups, "a group that is not named comes first"


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_who_acts_what_it_means_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"].keys() == {"severity", "area"} and alert["labels"]["severity"] in ("page", "ticket")
    assert re.fullmatch(r"\d+[mh]", alert["for"])
    assert alert["annotations"].keys() == {"summary", "runbook"}
    assert re.fullmatch(r"Means: .+\. ?Look at: .+\. ?Do: .+\.", alert["annotations"]["runbook"])


def test_what_counts_runs_or_searches_wants_a_minimum_of_them() -> None:
    # The others look at something that is there or not.
    without = {name for name, alert in ALERTS.items() if not re.search(r"increase\(.*\]\)\) > \d+", alert["expr"])}
    absolute = {"AgentDown", "AgentReplicaDown", "CollectorDown", "MilvusDown", "MilvusQueryNodeGone", "CostPerHour"}
    gauges = {"MilvusMemoryNearLimit", "MilvusVectorsCompared", "MilvusVectorsComparedSoon"}
    assert without - {"NoRuns"} == absolute | gauges


def test_every_recorded_series_is_used_and_every_used_one_is_recorded() -> None:
    recorded = {rule["record"] for rule in rules("recording.yml")}
    expressions = [rule["expr"] for rule in (*rules("alerts.yml"), *rules("recording.yml"))]
    text = "\n".join([*expressions, *dashboard_expressions().values()])
    assert set(re.findall(r"\b(?:agent|milvus):\w+:\w+", text)) == recorded


def recorded(name: str, **labels: str) -> str:
    found = [
        rule["expr"] for rule in rules("recording.yml") if rule["record"] == name and rule.get("labels", {}) == labels
    ]
    assert len(found) == 1
    return str(found[0])


def test_the_growth_limit_is_the_one_of_the_stored_runs() -> None:
    line = growth.fit()
    assert line.floor_ms == pytest.approx(2.2, abs=0.05) and 1e6 * line.ms_per_vector == pytest.approx(34, abs=0.5)
    assert recorded("milvus:compared_limit:vectors") == f"vector({line.compared(growth.BUDGET_MS)})"
    assert recorded("milvus:probed_share:ratio") == f"vector({growth.NPROBE} / {growth.NLIST})"
    # What was measured lies on both sides of it: 1 million vectors are below the limit, 10 million above.
    searches = search_table(growth.STORED)
    same = searches[
        (searches["kind"] == "IVF_FLAT") & (searches["nlist"] == growth.NLIST) & (searches["nprobe"] == growth.NPROBE)
    ].set_index("rows")
    limit = line.compared(growth.BUDGET_MS) * growth.NLIST / growth.NPROBE
    assert 1_000_000 < limit < 10_000_000
    assert same["p50 ms"][1_000_000] < growth.BUDGET_MS < same["p50 ms"][10_000_000]


def test_growth_prints_what_recording_yml_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["growth"])
    growth.main()
    printed = capsys.readouterr().out
    for name in ("milvus:probed_share:ratio", "milvus:compared_limit:vectors"):
        assert re.search(rf"{name} +{re.escape(recorded(name))}\n", printed)
    monkeypatch.setattr("sys.argv", ["growth", "--nlist", "1024"])
    growth.main()
    assert "10 ms are reached at 29,568,000 vectors" in capsys.readouterr().out


def test_the_memory_limits_are_those_of_the_deployments() -> None:
    standalone = DEFAULTS["MILVUS_MEMORY"].removesuffix("g")
    node = values("values.yaml")["queryNode"]["resources"]["limits"]["memory"].removesuffix("Gi")
    assert recorded("milvus:memory_limit:bytes", role="standalone") == f"vector({standalone} * 2 ^ 30)"
    assert recorded("milvus:memory_limit:bytes", role="querynode") == f"vector({node} * 2 ^ 30)"


# Alertmanager


def test_each_severity_has_a_receiver_and_no_file_holds_an_address() -> None:
    config = load(MONITORING / "alertmanager.yml")
    assert [route["matchers"] for route in config["route"]["routes"]] == [['severity="page"']]
    receivers = {receiver["name"]: receiver["webhook_configs"] for receiver in config["receivers"]}
    assert receivers.keys() == {config["route"]["receiver"], config["route"]["routes"][0]["receiver"]}
    mounted = {f"/run/secrets/{name}" for name in services()["alertmanager"]["secrets"]}
    assert {hook["url_file"] for hooks in receivers.values() for hook in hooks} == mounted
    kept = re.search(r"--data\.retention=(\d+)h", COMPOSE)
    weekly = config["route"]["repeat_interval"]
    assert kept and int(kept[1]) > 24 * int(weekly.removesuffix("d")), "else a ticket comes twice a week"


def test_what_inhibits_is_an_alert_that_pages() -> None:
    for rule in load(MONITORING / "alertmanager.yml")["inhibit_rules"]:
        found = re.fullmatch(r'alertname="(\w+)"', *rule["source_matchers"])
        assert found and ALERTS[found[1]]["labels"]["severity"] == "page"


# Grafana


def test_every_panel_explains_itself_and_none_covers_another() -> None:
    everything = dashboard()["panels"]
    assert max(Counter(panel["id"] for panel in everything).values()) == 1
    rows = [panel["title"] for panel in everything if panel["type"] == "row"]
    assert [row for row in rows if row.startswith("View")] == [
        "View 1: retrieval quality",
        "View 2: faithfulness",
        "View 3: latency by stage",
    ]
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"] and all(target["legendFormat"] for target in panel["targets"])
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len(dashboard_expressions()) == sum(len(panel["targets"]) for panel in panels()), "a legend twice in a panel"


def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    group = {
        "name": "dashboard",
        "rules": [
            {"record": f"panel:{number}", "expr": expression}
            for number, expression in enumerate(dashboard_expressions().values())
        ],
    }
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
    promtool("check", "rules", "rules.yml", folder=tmp_path)


def test_grafana_finds_the_data_sources_and_the_dashboard() -> None:
    sources = load(MONITORING / "grafana/provisioning/datasources/datasources.yml")["datasources"]
    for source in sources:
        found = re.fullmatch(r"http://([\w-]+):(\d+)", source["url"])
        assert found and any(port.endswith(f":{found[2]}") for port in services()[found[1]]["ports"])
    variable = dashboard()["templating"]["list"][0]
    assert variable["name"] == "datasource" and variable["current"]["value"] == sources[0]["uid"]
    folder = load(MONITORING / "grafana/provisioning/dashboards/dashboards.yml")["providers"][0]["options"]["path"]
    assert f"./grafana/dashboard.json:{folder}/dashboard.json:ro" in services()["grafana"]["volumes"]


# Compose


def test_compose_follows_the_compose_specification() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    validator = jsonschema_rs.validator_for(schema)
    document = yaml.safe_load(VARIABLE.sub(lambda found: found[2], COMPOSE))
    assert [error.message for error in validator.iter_errors(document)] == []
    assert document["networks"]["service"] == {"external": True, "name": "knowledge-agent_clients"}


def test_every_variable_is_in_env_example_with_the_same_default() -> None:
    assert COMPOSE.count("${") == len(VARIABLE.findall(COMPOSE))
    text = (MONITORING / "env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"(?m)^# ([A-Z_]+)=(.*)$", text)) == dict(VARIABLE.findall(COMPOSE))
    assert re.findall(r"(?m)^[^#\n].*$", text) == [], "a copy changes nothing"
    for paragraph in text.split("\n\n")[1:]:
        assert re.fullmatch(r"# [A-Za-z0-9].*\.\n# [A-Z_]+=.*", paragraph.strip())


@pytest.mark.parametrize("name", services())
def test_every_container_is_pinned_closed_limited_and_restarted(name: str) -> None:
    service = services()[name]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"] and service["restart"] == "unless-stopped"
    assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period"} <= set(service)
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])
    assert not {"privileged", "network_mode", "pid"} & set(service)
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", []))
    # The collector's image has nothing in it but the collector.
    assert ("healthcheck" in service) == (name != "otel-collector")


def test_only_prometheus_and_the_collector_are_in_the_services_network() -> None:
    joined = {name for name, service in services().items() if "service" in service["networks"]}
    assert joined == {"prometheus", "otel-collector"}


def test_every_file_that_is_mounted_exists_and_secrets_stay_out_of_git() -> None:
    document = yaml.safe_load(VARIABLE.sub(lambda found: found[2], COMPOSE))
    mounts = [mount.split(":") for service in services().values() for mount in service.get("volumes", [])]
    for source, _, *mode in mounts:
        if source.startswith("./"):
            assert (MONITORING / source).exists() and mode == ["ro"]
        else:
            assert source in document["volumes"]
    for secret in document["secrets"].values():
        assert re.fullmatch(r"secrets/\w+", secret["file"])
    assert (MONITORING / "secrets" / ".gitignore").read_text().split() == ["*", "!.gitignore"]


def test_the_parts_find_each_other() -> None:
    config, collector = load(MONITORING / "prometheus.yml"), load(MONITORING / "otel-collector.yaml")
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["alertmanager:9093"]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    reader = collector["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"]["prometheus"]
    assert jobs["otel-collector"]["static_configs"][0]["targets"] == [f"otel-collector:{reader['port']}"]
    assert collector["exporters"]["otlp"]["endpoint"].split(":")[0] in services()
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind, names in pipeline.items():
        assert set(names) <= collector[kind].keys()
    assert pipeline["processors"][0] == "memory_limiter"
    limiter = collector["processors"]["memory_limiter"]
    assert limiter["limit_mib"] < int(services()["otel-collector"]["mem_limit"].removesuffix("m"))


def test_the_readme_names_files_ports_and_pages() -> None:
    for path in MONITORING.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and "secrets" not in path.parts:
            name = path.relative_to(MONITORING).as_posix()
            covered = "rules/*.test.yml" if name.endswith(".test.yml") else name
            folder = "grafana/provisioning/" if name.startswith("grafana/provisioning/") else covered
            assert f"`monitoring/{folder}`" in README, name
    for service in services().values():
        for port in service.get("ports", []):
            assert f"127.0.0.1:{port.split(':')[1]}" in README, port
    pages = {name for name, alert in ALERTS.items() if alert["labels"]["severity"] == "page"}
    listed = re.search(r"(?m)^Pages: (.*)$", README)
    assert listed and set(re.findall(r"`(\w+)`", listed[1])) == pages
