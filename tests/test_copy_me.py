"""The cell of notebook 02 that is made to be copied: alone in an empty folder, without this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat

from utils import models
from utils.bootstrap import ROOT
from utils.settings import load_settings


def copy_me() -> str:
    notebook = nbformat.read(ROOT / "notebooks" / "02_knowledge_assistant.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if "copy-me" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    return str(cells[0])


def test_it_uses_nothing_from_this_repository_and_answers_again_after_a_restart(tmp_path: Path) -> None:
    source = copy_me()
    assert "utils" not in source
    (tmp_path / "assistant.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, **models.client_environment(load_settings()), "AGNO_TELEMETRY": "false"}
    environment.pop("PYTHONPATH", None)
    for _ in range(2):
        # -P keeps the current folder off the path, so that no module of this repository can be found.
        command = [sys.executable, "-P", "assistant.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-500:]
        assert "9:30" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"assistant.py", "my_knowledge.db", "my_assistant.db"}
