"""The files to run Milvus in production: valid, pinned, closed by default, and in step with the pinned pymilvus.

The containers and the chart are not started here. Compose itself reads the file where it is installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from utils.bootstrap import ROOT

DEPLOY = ROOT / "utils" / "deploy"
STANDALONE = DEPLOY / "milvus-standalone"
DISTRIBUTED = DEPLOY / "milvus-distributed"
VARIABLE = re.compile(r"\$\{(\w+):-([^{}]*)\}")
AUTOSCALED = "values-autoscaling.yaml"

COMPOSE = (STANDALONE / "compose.yaml").read_text(encoding="utf-8")
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
DEFAULTS = dict(VARIABLE.findall(COMPOSE))


def compose(**variables: str) -> dict[str, Any]:
    """compose.yaml as it is with these variables set."""
    return yaml.safe_load(VARIABLE.sub(lambda found: variables.get(found[1], found[2]), COMPOSE))


def services(**variables: str) -> dict[str, dict[str, Any]]:
    return compose(**variables)["services"]


def values(*names: str) -> dict[str, Any]:
    """The values of these files merged as Helm merges them: maps by key, anything else replaced."""
    merged: dict[str, Any] = {}
    for name in names:
        merge(merged, yaml.safe_load((DISTRIBUTED / name).read_text(encoding="utf-8")))
    return merged


def merge(into: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def pinned_minor(package: str) -> str:
    """Major and minor version of a package in requirements.txt."""
    found = re.search(rf"(?m)^{package}==(\d+\.\d+)\.", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert found
    return found[1]


def compose_command() -> list[str] | None:
    """Compose as Docker's plugin, else as a program of its own, else nothing."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    program = shutil.which("docker-compose")
    return [program] if program else None


def test_compose_follows_the_compose_specification() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    validator = jsonschema_rs.validator_for(schema)
    assert [error.message for error in validator.iter_errors(compose())] == []
    wrong = compose()
    wrong["services"]["milvus"]["memory"] = "6g"
    assert not validator.is_valid(wrong), "the schema would not notice a key that does not exist"


def test_every_variable_is_in_env_example_with_the_same_default() -> None:
    assert COMPOSE.count("${") == len(VARIABLE.findall(COMPOSE)), "a variable in another form than ${NAME:-default}"
    assert len(set(VARIABLE.findall(COMPOSE))) == len(DEFAULTS), "a variable with two defaults"
    text = (STANDALONE / "env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"(?m)^# ([A-Z_]+)=(.*)$", text)) == DEFAULTS
    for paragraph in text.split("\n\n")[1:]:
        why, variable = paragraph.strip().split("\n")
        assert re.fullmatch(r"# [A-Za-z0-9].*\.", why) and re.match(r"# [A-Z_]+=", variable)


def test_an_env_example_copied_as_it_is_changes_nothing() -> None:
    assert re.findall(r"(?m)^[^#\n].*$", (STANDALONE / "env.example").read_text(encoding="utf-8")) == []


def test_the_default_server_is_of_the_minor_version_of_the_pinned_pymilvus() -> None:
    assert services()["milvus"]["image"] == f"milvusdb/milvus:v{DEFAULTS['MILVUS_VERSION']}"
    assert DEFAULTS["MILVUS_VERSION"].startswith(f"{pinned_minor('pymilvus')}.")
    assert values("values.yaml")["image"]["all"]["tag"] == f"v{DEFAULTS['MILVUS_VERSION']}"


def test_milvus_version_selects_another_server() -> None:
    assert services(MILVUS_VERSION="2.5.12")["milvus"]["image"] == "milvusdb/milvus:v2.5.12"


@pytest.mark.parametrize("name", services())
def test_every_image_is_pinned(name: str) -> None:
    assert re.fullmatch(
        r"[\w./-]+:(v\d+\.\d+\.\d+|RELEASE\.\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ)", services()[name]["image"]
    )


@pytest.mark.parametrize("name", services())
def test_every_service_is_watched_limited_and_restarted(name: str) -> None:
    service = services()[name]
    assert {"test", "interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])
    assert service["healthcheck"]["test"][0] == "CMD", "no image is known to have a shell"
    assert re.fullmatch(r"\d+g", service["mem_limit"])
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])


def test_milvus_waits_until_its_storage_is_healthy() -> None:
    waits_for = services()["milvus"]["depends_on"]
    assert waits_for == {"etcd": {"condition": "service_healthy"}, "minio": {"condition": "service_healthy"}}


def test_only_milvus_publishes_ports_and_only_to_this_machine() -> None:
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published == {"milvus": ["127.0.0.1:19530:19530", "127.0.0.1:9091:9091"]}


def test_the_port_without_a_password_stays_on_this_machine() -> None:
    opened = services(MILVUS_BIND="0.0.0.0", MILVUS_PORT="29530", MILVUS_HEALTH_PORT="29091")["milvus"]["ports"]
    assert opened == ["0.0.0.0:29530:19530", "127.0.0.1:29091:9091"]


def test_only_milvus_reaches_the_storage() -> None:
    assert compose()["networks"]["storage"] == {"internal": True}
    assert {name: set(service["networks"]) for name, service in services().items()} == {
        "etcd": {"storage"},
        "minio": {"storage"},
        "milvus": {"storage", "clients"},
    }


def test_all_data_is_in_named_volumes() -> None:
    mounted = [mount.partition(":")[0] for service in services().values() for mount in service["volumes"]]
    assert sorted(mounted) == sorted(compose()["volumes"]), "a bind mount, or a volume that is not declared or used"


def test_one_variable_turns_authentication_on() -> None:
    off = services()["milvus"]["environment"]
    on = services(MILVUS_AUTH="true")["milvus"]["environment"]
    changed = {name: on[name] for name in on if on[name] != off[name]}
    assert changed == {"COMMON_SECURITY_AUTHORIZATIONENABLED": True} and off.keys() == on.keys()


def test_the_password_of_root_is_a_variable() -> None:
    environment = services(MILVUS_ROOT_PASSWORD="chosen")["milvus"]["environment"]
    assert environment["COMMON_SECURITY_DEFAULTROOTPASSWORD"] == "chosen"


def test_milvus_and_minio_get_the_same_credentials_and_not_the_well_known_ones() -> None:
    for variables in ({}, {"MINIO_USER": "someone", "MINIO_PASSWORD": "something-else"}):
        found = services(**variables)
        server, client = found["minio"]["environment"], found["milvus"]["environment"]
        pair = (server["MINIO_ROOT_USER"], server["MINIO_ROOT_PASSWORD"])
        assert pair == (client["MINIO_ACCESS_KEY_ID"], client["MINIO_SECRET_ACCESS_KEY"])
        assert "minioadmin" not in pair and len(pair[1]) >= 8, "MinIO refuses fewer than 8 characters"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MILVUS_AUTH": "true", "MILVUS_ROOT_PASSWORD": "chosen"},
        {"MILVUS_VERSION": "2.5.12", "MILVUS_BIND": "0.0.0.0", "MILVUS_PORT": "29530", "MILVUS_MEMORY": "12g"},
    ],
    ids=["defaults", "authentication", "another version"],
)
def test_compose_itself_reads_the_file(variables: dict[str, str], tmp_path: Path) -> None:
    command = compose_command()
    if not command:
        pytest.skip("Docker Compose is not installed")
    empty = tmp_path / "env"
    empty.touch()
    inherited = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    result = subprocess.run(
        [*command, "--env-file", str(empty), "-f", str(STANDALONE / "compose.yaml"), "config"],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0 and result.stdout, result.stderr
    found, expected = yaml.safe_load(result.stdout)["services"], services(**variables)
    assert found.keys() == expected.keys()
    for name, service in expected.items():
        assert found[name]["image"] == service["image"]
        environment = {key: str(value).lower() for key, value in service["environment"].items()}
        assert {key: str(value).lower() for key, value in found[name]["environment"].items()} == environment
        assert len(found[name].get("ports", [])) == len(service.get("ports", []))


NODES = ("proxy", "mixCoordinator", "queryNode", "streamingNode", "dataNode")


def test_every_layer_of_the_cluster_has_two_or_more() -> None:
    found = values("values.yaml")
    assert found["cluster"]["enabled"] is True
    assert {name: found[name]["replicas"] >= 2 for name in NODES} == dict.fromkeys(NODES, True)
    assert found["mixCoordinator"]["activeStandby"]["enabled"] is True, "else two coordinators would both work"
    assert found["etcd"]["replicaCount"] in (3, 5), "a majority must survive the loss of one"
    assert found["queryNode"]["replicas"] >= 3, "two replicas, and a node to take over"


def test_the_cluster_has_one_message_queue() -> None:
    found = values("values.yaml")
    assert found["woodpecker"]["enabled"] and found["streaming"]["woodpecker"]["embedded"]
    assert not found["pulsarv3"]["enabled"], "on in the chart's own values"


def test_autoscaling_and_a_fixed_number_exclude_each_other() -> None:
    assert "hpa" not in values("values.yaml")["queryNode"]
    node = values("values.yaml", AUTOSCALED)["queryNode"]
    assert node["replicas"] == -1, "the chart then leaves the number out of the Deployment"
    scaler = node["hpa"]
    assert scaler["enabled"] is True
    assert values("values.yaml")["queryNode"]["replicas"] <= scaler["minReplicas"] < scaler["maxReplicas"]
    assert all(0 < scaler[name] <= 90 for name in ("cpuUtilization", "memoryUtilization"))
    assert {"cpu", "memory"} <= set(node["resources"]["requests"]), "percentages of nothing"


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_requests_and_a_memory_limit_and_takes_passwords_from_secrets(name: str) -> None:
    node = values("values.yaml")[name]
    assert {"cpu", "memory"} == set(node["resources"]["requests"]) and "memory" in node["resources"]["limits"]
    secrets = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in node["extraEnv"]}
    assert secrets == {
        "MINIO_ACCESS_KEY_ID": {"name": "milvus-minio", "key": "accesskey"},
        "MINIO_SECRET_ACCESS_KEY": {"name": "milvus-minio", "key": "secretkey"},
        "COMMON_SECURITY_DEFAULTROOTPASSWORD": {"name": "milvus-root", "key": "password"},
    }
    for secret in secrets.values():
        creation = re.search(rf"create secret generic {secret['name']} .*--from-literal={secret['key']}=", README)
        assert creation, "README.md does not say how to create it"


def test_the_cluster_asks_for_a_password_and_no_file_holds_one() -> None:
    config = yaml.safe_load(values("values.yaml")["extraConfigFiles"]["user.yaml"])
    assert config == {"common": {"security": {"authorizationEnabled": True}}}
    for name in ("values.yaml", AUTOSCALED):
        text = (DISTRIBUTED / name).read_text(encoding="utf-8")
        assert not re.search(r"(?im)^\s*\w*(password|secretkey|accesskey|token)\w*:\s*\S", text), name


def test_storage_is_the_same_image_in_both() -> None:
    image = values("values.yaml")["minio"]["image"]
    assert f"{image['repository']}:{image['tag']}" == DEFAULTS["MINIO_IMAGE"]


def test_the_readme_names_these_versions_and_files() -> None:
    assert set(re.findall(r"milvusdb/milvus:v([\d.]+\d)", README)) <= {DEFAULTS["MILVUS_VERSION"]}
    assert len(set(re.findall(r"--version (\d+\.\d+\.\d+)", README))) == 1, "commands with two versions of the chart"
    for name in set(re.findall(r"-f (\S+\.yaml)", README)):
        assert (DISTRIBUTED / name).is_file(), name
    for path in (STANDALONE / "compose.yaml", STANDALONE / "env.example", *DISTRIBUTED.iterdir()):
        assert f"`{path.relative_to(DEPLOY).as_posix()}`" in README
