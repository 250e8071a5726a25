"""Lint, form and types are clean, and no tracked file names the machine or the registry it was made with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from utils.bootstrap import ROOT

# Written in pieces, so that this file does not hold what it looks for.
FOREIGN = re.compile(
    r"(?<![\w.~])/(?:home|Users|root|work|private|workspace|builds)/(?=[\w.])"  # folders of someone's machine
    r"|\b[A-Z]:\\+(?:Users|Documents)\b"
    r"|/(?:site|dist)-packages/"
    r"|(?:files\.pythonhosted|pypi\.org/simple|test\.pypi|artifactory|nexus\.|/simple/\b)"  # registries
    r"|--(?:extra-)?index" + "-url"
)
EXEMPT = {"tests/test_code_quality.py", "tests/test_corpus.py", "tests/test_notebooks.py"}  # they look for the same


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def type_check() -> Iterator[subprocess.Popen[str]]:
    """mypy, which needs half a minute without its cache, runs while the other tests do."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mypy", "utils", "tests"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.mark.usefixtures("type_check")
def test_lint_is_clean() -> None:
    result = run("ruff", "check", "--no-cache", "utils", "tests", "notebooks")
    assert result.returncode == 0, result.stdout + result.stderr


def test_form_is_clean() -> None:
    result = run("ruff", "format", "--check", "--no-cache", "utils", "tests")
    assert result.returncode == 0, result.stdout + result.stderr


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Name and text of each file that git tracks or would track."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this folder is not a git repository")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content[:8000]:
            yield name, content.decode("utf-8")


def machine() -> set[str]:
    """What would give this very machine away: its folders and the hosts of its package registries."""
    folders = {str(ROOT), str(Path.home()), str(Path(sys.prefix)), tempfile.gettempdir()}
    configured = run("pip", "config", "list").stdout + " ".join(
        v for k, v in os.environ.items() if k.startswith("PIP_")
    )
    hosts = {urlsplit(url).hostname or "" for url in re.findall(r"https?://[^\s'\"]+", configured)}
    return {f"{folder}{os.sep}" for folder in folders if len(Path(folder).parts) > 1} | hosts - {
        "",
        "localhost",
        "127.0.0.1",
    }


def test_no_registry_and_no_folder_of_a_machine_in_any_tracked_file() -> None:
    names = machine()
    texts = list(tracked_texts())
    assert "requirements.txt" in dict(texts) and "utils/constraints.txt" in dict(texts)
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts
        if name not in EXEMPT
        for number, line in enumerate(text.splitlines(), 1)
        if FOREIGN.search(line) or any(own in line for own in names)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "foreign"),
    [
        ("/home/ana/course", True),
        ('"C:\\\\Users\\\\ana"', True),
        ("https://pypi.org/simple", True),
        ("pip install " + "--index" + "-url x", True),
        ("see /usr/share and https://pypi.org/project/agno", False),
        ("/v1/models, ./home/x and the root/ folder", False),
    ],
)
def test_the_search_finds_what_it_is_for(line: str, foreign: bool) -> None:
    assert bool(FOREIGN.search(line)) is foreign


def test_types_are_clean(type_check: subprocess.Popen[str]) -> None:
    output, _ = type_check.communicate(timeout=900)
    assert type_check.returncode == 0, output
