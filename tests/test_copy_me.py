"""The cell of notebook 02 that is made to be copied: with milvus_store.py alone, without this repository."""

from __future__ import annotations

import os
import re
import shutil
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
    store = ROOT / "utils" / "milvus_store.py"
    for text in (source, store.read_text(encoding="utf-8")):
        assert not re.search(r"^\s*(from|import) utils", text, re.MULTILINE)
    (tmp_path / "assistant.py").write_text(source, encoding="utf-8")
    shutil.copy(store, tmp_path)
    environment = {**os.environ, **models.client_environment(load_settings()), "AGNO_TELEMETRY": "false"}
    environment |= {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(2):
        command = [sys.executable, "assistant.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]
        assert "9:30" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "assistant.py",
        "milvus_store.py",
        "my_knowledge.db",
        "my_assistant.db",
    }
