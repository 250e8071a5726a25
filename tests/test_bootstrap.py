"""The set-up of `.venv`: real processes and real environments, with a folder of tiny wheels as the registry."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import make_project

from utils import bootstrap
from utils.errors import CourseError

SETUP = "import sys; from utils.bootstrap import *; ensure_environment(needed_bytes=int(sys.argv[1]))"
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and file modes")


def command(root: Path, wheels: Path | None, needed: int = 1000, index: str = "") -> subprocess.Popen[str]:
    """Start the set-up of `root`; packages come from `wheels`, or from the address `index`."""
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)} if wheels else {"PIP_INDEX_URL": index}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "PYTHONPATH"}
    code = "import sys\nfrom utils.errors import CourseError\ntry:\n    " + SETUP.replace("; ", "\n    ")
    code += "\nexcept CourseError as error:\n    sys.exit('error: ' + str(error))"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(needed)],
        cwd=root,
        env=inherited | pip | {"PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def set_up(root: Path, wheels: Path | None, needed: int = 1000, index: str = "") -> tuple[int, str]:
    process = command(root, wheels, needed, index)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def tiny_version(root: Path) -> str:
    """What the environment's Python imports, from a folder where only the environment can help it."""
    code = "import tiny, utils.bootstrap; print(tiny.VERSION)"
    python = str(bootstrap.environment_python(root))
    return subprocess.run([python, "-c", code], cwd=root.parent, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A project that is set up. The tests that use it follow each other, and the last one leaves it unfinished."""
    root = make_project(tmp_path_factory.mktemp("course") / "one")
    code, output = set_up(root, wheels)
    assert code == 0, output
    assert "The environment is ready" in output
    return root


@pytest.fixture
def silent_registry() -> Iterator[tuple[str, Callable[[], None]]]:
    """A registry that accepts connections and does not answer, and a function that hangs up for good."""
    server = socket.create_server(("127.0.0.1", 0))
    yield f"http://127.0.0.1:{server.getsockname()[1]}/simple", server.close
    server.close()


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"'{text}' was not printed")


def test_second_start_runs_nothing(ready: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = ready / ".venv" / "course.json"
    before = marker.stat().st_mtime_ns
    assert set_up(ready, wheels) == (0, "")
    assert marker.stat().st_mtime_ns == before
    assert tiny_version(ready) == "1"
    monkeypatch.setattr(subprocess, "Popen", None)
    bootstrap.ensure_environment(ready)


def test_changed_requirements_are_installed_into_what_is_there(ready: Path, wheels: Path) -> None:
    kept = ready / ".venv" / "kept"
    kept.touch()
    (ready / "utils" / "constraints.txt").write_text("tiny==2.0\n")
    code, output = set_up(ready, wheels)
    assert (code, tiny_version(ready)) == (0, "2"), output
    assert "Updating" in output and kept.exists()


def test_moved_or_broken_environment_is_made_anew(ready: Path, wheels: Path) -> None:
    moved = ready.rename(ready.with_name("two"))
    assert not bootstrap.is_ready(moved), "scripts in it hold the old path"
    moved.rename(ready)
    assert bootstrap.is_ready(ready)

    for python in bootstrap.environment_python(ready).parent.glob("python*"):
        python.unlink()
    assert not bootstrap.is_ready(ready)
    code, output = set_up(ready, wheels)
    assert code == 0 and "Making" in output
    assert tiny_version(ready) == "2"


def test_other_python_version_counts_as_not_ready(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bootstrap.is_ready(ready)
    monkeypatch.setattr(sys, "version_info", (3, 12 if sys.version_info[1] != 12 else 13, 0, "final", 0))
    assert not bootstrap.is_ready(ready)


@POSIX
def test_interrupted_install_counts_as_not_made(tmp_path: Path, wheels: Path) -> None:
    root = make_project(tmp_path / "course")
    process = command(root, wheels)
    wait_for_line(process, "Making")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert (root / ".venv").exists() and not bootstrap.is_ready(root)


@POSIX
def test_killed_install_is_waited_for_and_then_made_anew(
    tmp_path: Path, wheels: Path, silent_registry: tuple[str, Callable[[], None]]
) -> None:
    address, hang_up = silent_registry
    root = make_project(tmp_path / "course")
    first = command(root, None, index=address)
    wait_for_line(first, "Installing")
    log = root / ".venv" / "install.log"
    while "Looking in indexes" not in log.read_text():
        time.sleep(0.05)
    half = root / ".venv" / "half-made"
    half.touch()
    first.kill()
    first.wait()

    second = command(root, wheels)  # the first one's pip still runs, and holds the lock in its place
    assert str(first.pid) in wait_for_line(second, "Waiting for process")
    time.sleep(0.4)
    assert second.poll() is None
    hang_up()
    output, _ = second.communicate(timeout=120)
    assert (second.returncode, tiny_version(root)) == (0, "1"), output
    assert not half.exists(), "half an environment must not be trusted"


def test_no_network_is_one_sentence(ready: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (ready / "utils" / "constraints.txt").write_text("tiny==3.0\n")
    code, output = set_up(ready, None, index=f"http://127.0.0.1:{port}/simple")
    assert code == 1
    assert output.splitlines()[-1].startswith("error: The package registry cannot be reached: check the network")


def test_too_little_disk_is_one_sentence(tmp_path: Path, wheels: Path) -> None:
    root = make_project(tmp_path / "course")
    code, output = set_up(root, wheels, needed=10**18)
    assert code == 1 and output.startswith("error: The disk has ") and output.count("\n") == 1
    assert not (root / ".venv").exists()


def test_disk_that_fills_up_is_one_sentence(small_disk: Callable[[int], Path], wheels: Path) -> None:
    root = make_project(small_disk(8) / "course")
    code, output = set_up(root, wheels)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: The disk (or the temporary folder) is full")


def test_read_only_folder_is_one_sentence(small_disk: Callable[[int], Path], wheels: Path) -> None:
    disk = small_disk(1)
    root = make_project(disk / "course")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, output = set_up(root, wheels)
    assert code == 1 and "cannot be written" in output and output.count("\n") == 1


def test_missing_requirements_file_is_named(tmp_path: Path) -> None:
    root = make_project(tmp_path / "course")
    (root / "requirements.txt").unlink()
    with pytest.raises(CourseError, match="requirements.txt is missing"):
        bootstrap.ensure_environment(root)


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "is full"),
        (
            "NameResolutionError: Failed to resolve 'x'\nERROR: No matching distribution found for y",
            "cannot be reached",
        ),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'", "certificate was not accepted"),
        ("ERROR: No matching distribution found for wordllama==0.4.0 (from x)", "package of wordllama==0.4.0 for this"),
        ("PermissionError: [Errno 13] Permission denied: '.venv/lib'", "cannot be written"),
    ],
)
def test_what_pip_says_becomes_one_sentence(log: str, sentence: str) -> None:
    assert sentence in (bootstrap.explain(log) or "")


def test_unknown_failure_is_left_to_the_log() -> None:
    assert bootstrap.explain("ERROR: something new") is None


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 14)])
def test_unsupported_python_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(
        CourseError, match=rf"This is Python 3\.{version[1]}, and the course needs Python 3\.11 to 3\.13"
    ):
        bootstrap.check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_supported_python_passes(version: tuple[int, int]) -> None:
    bootstrap.check_python(version)


def old_pythons() -> list[str]:
    found = [shutil.which(f"python3.{minor}") for minor in (8, 9, 10)]
    found += [str(path) for path in (Path.home() / ".pyenv" / "versions").glob("3.[89].*/bin/python")]
    return [path for path in found if path and subprocess.run([path, "-V"], capture_output=True).returncode == 0]


def test_real_old_python_gets_the_sentence_and_no_traceback(tmp_path: Path) -> None:
    pythons = old_pythons()
    if not pythons:
        pytest.skip("no old Python on this machine")
    root = make_project(tmp_path / "course")
    for python in pythons:
        done = subprocess.run([python, "-m", "utils", "lab"], cwd=root, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("error: This is Python 3.") and done.stderr.count("\n") == 1
    assert not (root / ".venv").exists()
