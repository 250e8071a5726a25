"""The files of utils/deploy/monitoring, as the tests read them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from utils.bootstrap import ROOT

MONITORING = ROOT / "utils" / "deploy" / "monitoring"
RULES = MONITORING / "rules"
METRIC = re.compile(r"(?<![\w:])(?:agent|milvus|process)_\w+")


def program(name: str) -> str:
    """Path of a program of Debian's package prometheus; skips without it, and fails in CI."""
    found = shutil.which(name)
    if found:
        return found
    message = f"{name} is not installed (Debian's package prometheus)"
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(message)
    pytest.skip(message)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(name: str) -> list[dict[str, Any]]:
    """The rules of recording.yml or alerts.yml."""
    return [rule for group in load(RULES / name)["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((MONITORING / "grafana" / "dashboard.json").read_text(encoding="utf-8")))


def panels() -> list[dict[str, Any]]:
    """The panels that draw something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> dict[str, str]:
    """PromQL of each target, by "panel: legend", with Grafana's variables replaced."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$component", ".*")
        for panel in panels()
        for target in panel["targets"]
    }


def metrics_used() -> set[str]:
    """Names of all metrics that rules and dashboard read, as an endpoint writes them."""
    expressions = [rule["expr"] for name in ("recording.yml", "alerts.yml") for rule in rules(name)]
    text = "\n".join([*expressions, *dashboard_expressions().values()])
    # Strings in quotes are label values.
    return set(METRIC.findall(re.sub(r'"[^"]*"', "", text)))
