"""The files to run the service and Milvus in production: valid, pinned, closed by default, and in step with the code.

The containers and the chart are not started here. Compose itself reads the files where it is installed, and the
commands of the Dockerfile run in an environment of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema_rs
import psycopg
import pytest
import yaml
from sqlalchemy.engine import make_url

from utils.bootstrap import ROOT, check_python
from utils.hosting import config as hosting_config
from utils.hosting.config import load_config
from utils.hosting.database import CONNECT_SECONDS, POOL
from utils.hosting.readiness import PROBE_SECONDS
from utils.hosting.runs import STORE_SECONDS
from utils.postgres import postgres

if TYPE_CHECKING:
    from utils.milvus_lab.lite import LiteServer

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
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=120)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    program = shutil.which("docker-compose", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
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
        timeout=120,
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
    folders = {path.name for path in DEPLOY.iterdir() if path.is_dir()}
    assert folders == set(re.findall(r"(?m)^\| \[?`([\w-]+)/", README)), "a folder that the table does not name"
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (DEPLOY / link).exists(), link


# The service: utils/deploy/knowledge-agent

AGENT = DEPLOY / "knowledge-agent"
SERVICE_VARIABLE = re.compile(r"\$\{(\w+):([-?])([^{}]*)\}")
SERVICE_COMPOSE = {name: (AGENT / name).read_text(encoding="utf-8") for name in ("compose.yaml", "milvus.yaml")}
PASSWORDS = {"POSTGRES_PASSWORD", "MILVUS_ROOT_PASSWORD", "MINIO_PASSWORD"}
KEYS = {
    **dict.fromkeys(PASSWORDS, "secret-of-mine"),
    "OPENAI_API_KEY": "sk-mine",
    "OS_SECURITY_KEY": "key-of-mine-0123",
}
# What compose.yaml does not offer: each has one right value in a container.
FIXED = {"SERVICE_HOST", "SERVICE_PORT", "SERVICE_FOLDER", "DATABASE_URL", "SHUTDOWN_SECONDS", "ALLOW_ANONYMOUS"}


class ComposeLoader(yaml.SafeLoader):
    """Reads Compose's own tag, which empties what an earlier file says."""


ComposeLoader.add_constructor("!reset", lambda loader, node: [])


def service_file(name: str = "compose.yaml") -> dict[str, Any]:
    """The file with the variables replaced by their defaults, or by their own name if they have none."""
    text = SERVICE_VARIABLE.sub(lambda found: found[3] if found[2] == "-" else found[1], SERVICE_COMPOSE[name])
    return yaml.load(text, ComposeLoader)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, such as ("USER", "10001"), with continued lines joined."""
    lines = [
        line for line in (AGENT / "Dockerfile").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def instruction(name: str) -> str:
    found = [rest for word, rest in instructions() if word == name]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def image_environment() -> dict[str, str]:
    return dict(part.split("=", 1) for part in instruction("ENV").split())


def copies() -> list[tuple[list[str], str]]:
    """(sources, target) of each COPY."""
    return [(rest.split()[:-1], rest.split()[-1]) for word, rest in instructions() if word == "COPY"]


def run_compose(folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`config` of Compose 2 for the service, with a `.env` of these variables; skips where there is none."""
    command = compose_command()
    version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True).stdout if command else ""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if not command or not found or (int(found[1]), int(found[2])) < (2, 25):
        pytest.skip("Docker Compose 2.25 or later is not installed")
    # In a copy: a developer's own .env beside the file must not play a part.
    for part in (AGENT, STANDALONE):
        shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns(".env"))
    (folder / AGENT.name / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    own = {name for text in (COMPOSE, *SERVICE_COMPOSE.values()) for name in re.findall(r"\$\{(\w+)", text)}
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    command = [*command, "--project-directory", str(folder / AGENT.name), "config"]
    return subprocess.run(command, cwd=folder / AGENT.name, env=inherited, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", SERVICE_COMPOSE)
def test_the_service_follows_the_compose_specification(name: str) -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    validator = jsonschema_rs.validator_for(schema)
    assert [error.message for error in validator.iter_errors(service_file(name))] == []


def test_every_variable_of_the_service_is_in_its_env_example_with_the_same_default() -> None:
    text = "".join(SERVICE_COMPOSE.values())
    variables = SERVICE_VARIABLE.findall(text)
    assert text.count("${") == len(variables), "a variable in another form than ${NAME:-default} or ${NAME:?sentence}"
    found = {name: default if kind == "-" else "" for name, kind, default in variables}
    example = (AGENT / "env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"(?m)^# ([A-Z_]+)=(.*)$", example)) == found
    assert re.findall(r"(?m)^[^#\n].*$", example) == [], "a copy changes nothing"
    for paragraph in example.split("\n\n")[1:]:
        assert re.fullmatch(r"# [A-Za-z0-9].*\.\n# [A-Z_]+=.*", paragraph.strip())


def test_the_defaults_are_those_of_the_service() -> None:
    defaults = {name: default for name, kind, default in SERVICE_VARIABLE.findall(SERVICE_COMPOSE["compose.yaml"])}
    variables = {name: value for name, value in defaults.items() if name not in PASSWORDS}
    kept = ("folder", "settings", "database_url")
    given = vars(load_config("x", {**variables, "OPENAI_API_KEY": "sk-x"}, Path("no.env")))
    plain = vars(load_config("x", {}, Path("no.env")))
    assert {k: v for k, v in given.items() if k not in kept} == {k: v for k, v in plain.items() if k not in kept}


def test_every_setting_of_the_service_can_be_set() -> None:
    documented = set(re.findall(r"(?m)^    ([A-Z][A-Z_]+)  ", hosting_config.__doc__ or ""))
    offered = set(service_file()["services"]["agent"]["environment"])
    assert len(documented) > 10 and documented - FIXED <= offered


def test_no_password_has_a_default_and_each_is_used_everywhere() -> None:
    required = {
        name for text in SERVICE_COMPOSE.values() for name, kind, _ in SERVICE_VARIABLE.findall(text) if kind == "?"
    }
    assert required == PASSWORDS
    environment = {name: service["environment"] for name, service in service_file()["services"].items()}
    laid_over = {name: service["environment"] for name, service in service_file("milvus.yaml")["services"].items()}
    assert environment["agent"]["MILVUS_TOKEN"] == "root:MILVUS_ROOT_PASSWORD"
    assert environment["postgres"]["POSTGRES_PASSWORD"] == "POSTGRES_PASSWORD"
    url = make_url(environment["agent"]["DATABASE_URL"])
    assert (url.username, url.password, url.host, url.database) == (
        environment["postgres"]["POSTGRES_USER"],
        "POSTGRES_PASSWORD",
        "postgres",
        environment["postgres"]["POSTGRES_DB"],
    )
    assert laid_over["minio"] == {"MINIO_ROOT_PASSWORD": "MINIO_PASSWORD"}
    assert laid_over["milvus"] == {
        "MINIO_SECRET_ACCESS_KEY": "MINIO_PASSWORD",
        "COMMON_SECURITY_AUTHORIZATIONENABLED": "true",
        "COMMON_SECURITY_DEFAULTROOTPASSWORD": "MILVUS_ROOT_PASSWORD",
    }
    for name, given in laid_over.items():
        assert given.keys() <= services()[name]["environment"].keys(), "a name that the other file does not use"


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("openssl"), reason="the command is for bash")
def test_the_command_in_the_readme_makes_the_secrets_once(tmp_path: Path) -> None:
    found = re.search(r"(?m)^\[ -e \.env \] \|\| .*$", README)
    assert found
    shutil.copy(AGENT / "env.example", tmp_path)
    subprocess.run(["bash", "-c", found[0]], cwd=tmp_path, check=True)
    env = tmp_path / ".env"
    made = dict(re.findall(r"(?m)^([A-Z_]+)=(.*)$", env.read_text(encoding="utf-8")))
    assert made.keys() == PASSWORDS | {"OS_SECURITY_KEY"} and len(set(made.values())) == 4
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in made.values())
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    subprocess.run(["bash", "-c", found[0]], cwd=tmp_path, check=True)
    assert dict(re.findall(r"(?m)^([A-Z_]+)=(.*)$", env.read_text(encoding="utf-8"))) == made


@pytest.mark.parametrize("name", service_file()["services"])
def test_every_container_of_the_service_is_closed_limited_and_restarted(name: str) -> None:
    service = service_file()["services"][name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period", "tmpfs"} <= set(service)
    assert service["restart"] == "unless-stopped"
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])
    assert not {"privileged", "network_mode", "pid"} & set(service)


def test_the_service_alone_is_published_and_only_to_this_machine() -> None:
    assert {name: service.get("ports") for name, service in service_file()["services"].items()} == {
        "agent": ["127.0.0.1:7777:7777"],
        "postgres": None,
    }
    assert service_file("milvus.yaml")["services"]["milvus"]["ports"] == []
    assert service_file()["networks"] == {"database": {"internal": True}}
    assert service_file()["services"]["postgres"]["networks"] == ["database"]


def test_the_service_waits_for_what_it_needs_and_may_finish_its_requests() -> None:
    agent, postgres = (service_file()["services"][name] for name in ("agent", "postgres"))
    assert agent["depends_on"] == {name: {"condition": "service_healthy"} for name in ("milvus", "postgres")}
    assert postgres["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]
    assert int(agent["stop_grace_period"].removesuffix("s")) >= int(agent["environment"]["SHUTDOWN_SECONDS"]) + 10


def test_the_images_of_the_service_are_pinned_to_what_the_course_runs() -> None:
    python = re.fullmatch(r"python:(3)\.(\d+)\.\d+-slim-[a-z]+", instruction("FROM"))
    assert python
    check_python((int(python[1]), int(python[2])))
    assert re.fullmatch(r"postgres:\d+\.\d+-[a-z]+", service_file()["services"]["postgres"]["image"])


def test_the_dockerfile_keeps_the_rules() -> None:
    words = [word for word, _ in instructions()]
    assert set(words) <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "CMD"}
    uid = int(instruction("USER").split(":")[0])
    assert uid >= 1000 and words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert words.index("RUN") < words.index("COPY", words.index("RUN")), "packages before code"
    assert json.loads(instruction("CMD"))[:2] == ["python", "-m"]
    options, _, check = instruction("HEALTHCHECK").partition("CMD ")
    assert "/ready" in json.loads(check)[-1] and {"--interval", "--timeout", "--start-period", "--retries"} <= {
        option.split("=")[0] for option in options.split()
    }
    assert instruction("STOPSIGNAL") == "SIGTERM" and instruction("EXPOSE") == image_environment()["SERVICE_PORT"]
    assert not [name for name in image_environment() if re.search("KEY|TOKEN|PASSWORD|SECRET", name)]
    for sources, _ in copies():
        assert all((ROOT / source).exists() and source.startswith("utils/") for source in sources)


def test_docker_sees_what_is_copied_and_nothing_secret() -> None:
    rules = [line for line in (AGENT / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line]
    rules = [rule for rule in rules if not rule.startswith("#")]
    assert rules == ["*", "!utils", "**/__pycache__", "utils/deploy", "!utils/deploy/knowledge-agent/requirements.txt"]
    below_deploy = [source for sources, _ in copies() for source in sources if source.startswith("utils/deploy/")]
    assert below_deploy == ["utils/deploy/knowledge-agent/requirements.txt"]


def test_the_packages_of_the_image_are_names_with_the_versions_of_the_course() -> None:
    lines = (AGENT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    direct = re.findall(r"(?m)^([\w.\[\]-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert sorted(names) == sorted(set(names)) and set(names) <= set(direct)


@pytest.mark.parametrize("missing", ["", *sorted(PASSWORDS)])
def test_compose_itself_reads_the_service(missing: str, tmp_path: Path) -> None:
    result = run_compose(tmp_path, {name: value for name, value in KEYS.items() if name != missing})
    if missing:
        assert result.returncode != 0 and f"required variable {missing} is missing" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    found = yaml.safe_load(result.stdout)
    assert found["services"].keys() == {"agent", "postgres", "milvus", "etcd", "minio"}
    published = {
        name: [(port["host_ip"], port["published"], port["target"]) for port in service.get("ports", [])]
        for name, service in found["services"].items()
    }
    assert {name: ports for name, ports in published.items() if ports} == {"agent": [("127.0.0.1", "7777", 7777)]}
    milvus = found["services"]["milvus"]["environment"]
    assert milvus["COMMON_SECURITY_AUTHORIZATIONENABLED"] == "true"
    assert milvus["MINIO_SECRET_ACCESS_KEY"] == found["services"]["minio"]["environment"]["MINIO_ROOT_PASSWORD"]
    assert set(found["services"]["agent"]["networks"]) & set(found["services"]["milvus"]["networks"]) == {"clients"}
    assert set(found["services"]["agent"]["networks"]) & set(found["services"]["postgres"]["networks"]) == {"database"}
    build = found["services"]["agent"]["build"]
    assert (Path(build["context"]) / "x").resolve() == (tmp_path / "../../x").resolve(), "three folders up"
    assert build["dockerfile"] == (AGENT / "Dockerfile").relative_to(ROOT).as_posix()


def test_the_caddyfile_in_the_readme_leads_to_the_published_port() -> None:
    assert re.search(r"```text\nagents\.example\.com\nreverse_proxy 127\.0\.0\.1:7777\n```", README)


@pytest.mark.notebook_run  # as long as a notebook: a minute, most of it pip's
@pytest.mark.skipif(os.name != "posix", reason="the commands are for a shell")
def test_the_image_installs_starts_answers_and_ends(
    tmp_path: Path, milvus_lite_server: LiteServer, closed_port: int
) -> None:
    """What Docker would do, in a virtual environment: COPY, RUN, CMD, HEALTHCHECK and STOPSIGNAL of the Dockerfile."""
    app, temporary = tmp_path / "app", tmp_path / "tmp"
    temporary.mkdir()
    path = build(app, tmp_path / "venv")
    command = re.search(r'command: (\["python", "-m", "utils\.apps\.research_team"\])', README)
    assert command, "the other service that the image holds"
    imported = f"import {json.loads(command[1])[2]}"
    subprocess.run(["python", "-c", imported], cwd=app, env={"PATH": path}, capture_output=True, check=True)
    jwt_key = "a secret of more than 32 characters"
    environment = {name: value.replace("/tmp", str(temporary)) for name, value in image_environment().items()}
    environment |= {"PATH": path, "LANG": "C.UTF-8"}
    environment |= {
        name: str(value or "") for name, value in service_file()["services"]["agent"]["environment"].items()
    }
    environment |= {"MODEL_PROVIDER": "offline", "MILVUS_URI": milvus_lite_server.uri, "MILVUS_TOKEN": ""}
    environment |= {"SERVICE_HOST": "127.0.0.1", "SERVICE_PORT": str(closed_port), "JWT_VERIFICATION_KEY": jwt_key}
    url = f"http://127.0.0.1:{closed_port}"
    log_file = tmp_path / "service.log"
    with postgres(tmp_path / "postgres", progress=False) as database, log_file.open("wb") as log:
        environment["DATABASE_URL"] = database.url
        with psycopg.connect(database.url.replace("+psycopg", "")) as connection:
            version = connection.info.server_version // 10000
        assert service_file()["services"]["postgres"]["image"].startswith(f"postgres:{version}.")
        started = subprocess.Popen(
            json.loads(instruction("CMD")), cwd=app, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            check = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
            end = time.monotonic() + 120
            while subprocess.run(check, cwd=app, env=environment, capture_output=True).returncode != 0:
                assert started.poll() is None and time.monotonic() < end, log_file.read_text(encoding="utf-8")
                time.sleep(0.3)
            script = re.search(r"(?s)python - <<'END'\n(.*?)END\n", README)
            assert script
            token = subprocess.run(
                ["python", "-c", script[1]], cwd=app, env=environment, capture_output=True, text=True, check=True
            ).stdout.strip()
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                assert client.get("/agents").status_code == 401
                client.headers["Authorization"] = f"Bearer {token}"
                # The curl lines of the README.
                document = ROOT / "data" / "knowledge" / "milvus-deployment-modes.md"
                assert (
                    f"file=@../../../{document.relative_to(ROOT).as_posix()} http://127.0.0.1:7777/knowledge/content"
                    in README
                )
                sent = client.post("/knowledge/content", files={"file": (document.name, document.read_bytes())})
                assert sent.is_success, sent.text
                while client.get("/knowledge/content").json()["data"][0]["status"] != "completed":
                    assert time.monotonic() < end, client.get("/knowledge/content").text
                    time.sleep(0.2)
                question = re.search(r'-F message="(.*?)" http://127.0.0.1:7777(/agents/\S+)', README)
                assert question
                answer = client.post(question[2], files={"message": (None, question[1]), "stream": (None, "false")})
                assert answer.is_success and document.name in answer.json()["content"], answer.text
            started.send_signal(getattr(signal, instruction("STOPSIGNAL")))
            assert started.wait(45) == 0
        finally:
            started.kill()
            started.wait()
    assert not list(app.rglob("*.db")) and not list(temporary.iterdir()), "state in the container"


def build(app: Path, venv: Path) -> str:
    """Copy and install what the Dockerfile says, into these folders; return the PATH of what it starts."""
    app.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    path = f"{venv / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    # With what the machine says about its network, and nothing about its Python.
    machine = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(ROOT / source, app / target)
        elif word == "RUN":
            done = subprocess.run(
                ["sh", "-c", rest], cwd=app, env={**machine, "PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return path


def copy(source: Path, target: Path) -> None:
    """Docker's COPY of one source: a folder's content goes into the target, a file beside it."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


# Kubernetes: utils/deploy/kubernetes

KUBERNETES = DEPLOY / "kubernetes"


def objects(name: str) -> dict[str, dict[str, Any]]:
    """The objects of a file by kind and name."""
    documents = yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8"))
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in documents}


def pod() -> dict[str, Any]:
    return objects("agent.yaml")["Deployment/knowledge-agent"]["spec"]["template"]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_every_object_follows_the_schema_of_kubernetes(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, see README.md there")
    found = [one for path in sorted(KUBERNETES.glob("*.yaml")) for one in objects(path.name).values()]
    assert len(found) == 9
    for one in found:
        validator.validate(one, version, strict=True)
    wrong = objects("agent-autoscaling.yaml").popitem()[1]
    wrong["spec"]["maxReplica"] = 3
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, version, strict=True)


def test_deployment_service_budget_and_autoscaler_mean_the_same_pods() -> None:
    found = objects("agent.yaml")
    labels = pod()["metadata"]["labels"]
    assert found["Deployment/knowledge-agent"]["spec"]["selector"]["matchLabels"] == labels
    assert found["PodDisruptionBudget/knowledge-agent"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service/knowledge-agent"]["spec"]["selector"] == labels
    target = objects("agent-autoscaling.yaml")["HorizontalPodAutoscaler/knowledge-agent"]["spec"]["scaleTargetRef"]
    deployment = found["Deployment/knowledge-agent"]
    assert target == {"apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": "knowledge-agent"}
    assert "replicas" not in deployment["spec"], "each apply would undo what the autoscaler did"


def test_the_pod_runs_what_the_image_and_the_service_offer() -> None:
    container = pod()["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["http"]) == instruction("EXPOSE")
    assert objects("agent.yaml")["Service/knowledge-agent"]["spec"]["ports"][0]["targetPort"] == "http"
    security = pod()["spec"]["securityContext"]
    assert instruction("USER") == f"{security['runAsUser']}:{security['runAsGroup']}" and security["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [image_environment()["HOME"]]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    known = service_file()["services"]["agent"]["environment"]
    assert set(variables) <= {*known, "SHUTDOWN_SECONDS"} and variables["SERVICE_WORKERS"] == "1"
    secrets = {"OPENAI_API_KEY": "x", "OS_SECURITY_KEY": "key-of-mine-0123", "MILVUS_TOKEN": "root:x"}
    secrets["DATABASE_URL"] = "postgresql+psycopg://knowledge:x@postgres.example.com:5432/knowledge"
    config = load_config("agent", image_environment() | variables | secrets, env_file=Path("none"))
    assert config.workers == 1 and not config.settings.on_lite and config.auth == "key"
    readme = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"--from-literal=(\w+)=", readme)) == set(secrets)
    assert set(secrets).isdisjoint(variables), "a secret in a file"
    assert {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")} == {
        "startupProbe": "/health",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }, "a restart mends no database: only readiness may ask it"


def test_runs_may_finish_before_the_pod_is_killed() -> None:
    container = pod()["spec"]["containers"][0]
    shutdown = int(next(entry["value"] for entry in container["env"] if entry["name"] == "SHUTDOWN_SECONDS"))
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause >= container["readinessProbe"]["periodSeconds"]
    assert pod()["spec"]["terminationGracePeriodSeconds"] > pause + shutdown + 2 * STORE_SECONDS


def test_a_probe_waits_for_longer_than_the_service_does() -> None:
    container = pod()["spec"]["containers"][0]
    assert container["readinessProbe"]["timeoutSeconds"] > PROBE_SECONDS, "else nobody reads which part fails"
    assert container["livenessProbe"]["timeoutSeconds"] > CONNECT_SECONDS, "a restart mends no database"


def test_a_query_node_may_fail_while_every_copy_has_its_own() -> None:
    copies = next(one["value"] for one in pod()["spec"]["containers"][0]["env"] if one["name"] == "MILVUS_REPLICAS")
    nodes = values("values.yaml")["queryNode"]["replicas"], values("values.yaml", AUTOSCALED)["queryNode"]["hpa"]
    assert 2 <= int(copies) < min(nodes[0], nodes[1]["minReplicas"])


def test_the_autoscaler_stays_within_what_postgresql_allows() -> None:
    scaler = objects("agent-autoscaling.yaml")["HorizontalPodAutoscaler/knowledge-agent"]["spec"]
    update = objects("agent.yaml")["Deployment/knowledge-agent"]["spec"]["strategy"]["rollingUpdate"]
    connections = (POOL["pool_size"] + POOL["max_overflow"]) * (scaler["maxReplicas"] + update["maxSurge"])
    needed = re.search(r"`max_connections` of (\d+)", (KUBERNETES / "README.md").read_text(encoding="utf-8"))
    assert needed and connections + 3 <= int(needed[1]), "PostgreSQL keeps three for superusers"
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    assert scaler["metrics"][0]["resource"]["target"]["averageUtilization"] <= 80
    assert pod()["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "1", "what one Python process can use"
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300


def test_every_role_of_milvus_has_a_budget_that_leaves_one_of_it() -> None:
    roles = {
        one["spec"]["selector"]["matchLabels"]["component"]: one["spec"]["maxUnavailable"]
        for one in objects("milvus-disruption.yaml").values()
    }
    # The values call the role mixCoordinator, the chart's label is mixcoord.
    assert roles == {name.lower().replace("coordinator", "coord"): 1 for name in NODES}
    for one in objects("milvus-disruption.yaml").values():
        labels = one["spec"]["selector"]["matchLabels"]
        assert one["metadata"]["name"] == f"milvus-{labels['component']}"
        assert f"helm install {labels['app.kubernetes.io/instance']} zilliztech/milvus " in README


def test_the_readme_of_kubernetes_names_every_file() -> None:
    readme = (KUBERNETES / "README.md").read_text(encoding="utf-8")
    for path in KUBERNETES.glob("*.yaml"):
        assert f"`{path.name}`" in readme
    for link in re.findall(r"\]\((\.\.[^)#]+)", readme):
        assert (KUBERNETES / link).exists(), link
