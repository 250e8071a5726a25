"""`python3 -m utils`: arguments, exit codes, errors as one sentence, and the change into the environment's Python."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_project

from utils import __main__ as command_line
from utils import bootstrap
from utils.bootstrap import ROOT


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the running Python were the environment's, ready to go."""
    monkeypatch.setattr(bootstrap, "ensure_environment", lambda: Path(sys.executable))
    monkeypatch.setattr(bootstrap, "in_environment", lambda: True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A small course whose environment is this Python's, linked: only the change into it is tested here."""
    root = make_project(tmp_path_factory.mktemp("linked") / "course")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / ".venv")], check=True)
    finished = "import json; from utils import bootstrap as b; r = b.ROOT; import sys; "
    finished += "b._marker_path(r).write_text(json.dumps(b._finished(r, sys.executable)))"
    subprocess.run([sys.executable, "-c", finished], cwd=root, check=True, env=clean())
    return root


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def start(root: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "utils", *arguments],
        cwd=root,
        env=clean() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_command_the_help_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in ("lab", "test", "run", "ask", "eval", "serve", "milvus", "doctor"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["lab", "--port", "x"],
        ["run", "--every"],
        ["ask"],
        ["milvus", "big"],
        ["serve", "--app", "x"],
        ["eval", "--mode", "x"],
    ],
)
def test_wrong_arguments_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments)
    assert stop.value.code == 2
    assert "usage: python3 -m utils" in capsys.readouterr().err


def test_command_runs_in_the_environment_and_its_exit_code_comes_back(project: Path) -> None:
    output, errors = (process := start(project, "doctor")).communicate(timeout=120)
    assert (process.returncode, errors) == (7, "")
    assert output.strip() == f"doctor in {project / '.venv'}"


def test_error_for_the_learner_is_one_line(project: Path) -> None:
    _, errors = (process := start(project, "doctor", DOCTOR="error")).communicate(timeout=120)
    assert (process.returncode, errors) == (1, "error: Do this first.\n")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_ends_with_130_and_one_sentence(project: Path) -> None:
    process = start(project, "doctor", DOCTOR="sleep")
    assert process.stdout and process.stdout.readline().startswith("doctor in")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip().count("\n") == 0 and "Traceback" not in errors


def test_doctor_without_environment_installs_nothing(tmp_path: Path) -> None:
    root = make_project(tmp_path / "course")
    output, _ = (process := start(root, "doctor")).communicate(timeout=120)
    assert process.returncode == 1
    assert "environment: not set up; run python3 -m utils lab" in output
    assert "free disk: " in output and "Python: 3." in output
    assert not (root / ".venv").exists()


@pytest.mark.usefixtures("inside")
def test_unknown_notebook_is_one_sentence_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["run", "77"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: There is no notebook '77': choose from 00_start_here, 01_milvus_deployment")
    assert shown.count("\n") == 1


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("arguments", [["run"], ["run", "2", "--all"]])
def test_run_wants_notebooks_or_all(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(arguments) == 1
    assert "give --all" in capsys.readouterr().err


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("arguments", [[], ["--app", "knowledge_agent"], ["--app", "research_team"]])
def test_serve_with_a_wrong_setting_is_one_sentence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVICE_HOST", "0.0.0.0")
    assert command_line.main(["serve", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert shown.err.startswith("error: SERVICE_HOST 0.0.0.0 opens the service to the network without a key")


def test_test_passes_arguments_on_to_pytest(inside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def pytest_main(given: list[str]) -> int:
        seen.append(given)
        return 5

    monkeypatch.setattr(pytest, "main", pytest_main)
    assert command_line.main(["test", "-k", "search and not slow", "-x", "tests/test_bootstrap.py", "--quick"]) == 5
    assert seen == [["--quick", "-k", "search and not slow", "-x", "tests/test_bootstrap.py"]]


def test_quick_leaves_out_notebooks_and_the_tests_that_run_them(tmp_path: Path) -> None:
    root = tmp_path / "course"
    for folder in ("utils", "notebooks", "tests"):
        (root / folder).mkdir(parents=True)
    for name in ("__init__", "bootstrap", "errors", "notebooks", "settings", "testing"):
        shutil.copy(ROOT / "utils" / f"{name}.py", root / "utils")
    shutil.copy(ROOT / ".pytest.ini", root)
    shutil.copy(ROOT / "tests" / "nbval_sanitize.cfg", root / "tests")
    (root / "tests" / "test_one.py").write_text(
        "import os, pytest\n\ndef test_plain():\n    assert os.environ['MODEL_PROVIDER'] == 'offline'\n"
        "    assert not os.environ['OPENAI_API_KEY'] and not os.environ['MILVUS_URI']\n\n"
        "@pytest.mark.notebook_run\ndef test_whole():\n    pass\n"
    )
    (root / "notebooks" / "00_one.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "source": "print(1)",'
        ' "outputs": [{"name": "stdout", "output_type": "stream", "text": "1\\n"}]},'
        ' {"cell_type": "code", "execution_count": 2, "id": "b", "metadata": {}, "source": "print(2)",'
        ' "outputs": [{"name": "stdout", "output_type": "stream", "text": "3\\n"}]}],'
        ' "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    leaked = {"OPENAI_API_KEY": "x", "MODEL_PROVIDER": "openai", "MILVUS_URI": "http://elsewhere"}

    def suite(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=root, env=clean() | leaked, capture_output=True, text=True).stdout

    assert "1 passed, 1 deselected" in suite("--quick")
    whole = suite()
    assert "1 failed, 3 passed" in whole, "a stored output that differs must fail"
    assert "seconds per notebook" in whole and "notebooks/00_one.ipynb" in whole
