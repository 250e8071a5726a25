"""Makes the course's own environment, `.venv`, and keeps it whole. Standard library only.

This file, errors.py, __init__.py and __main__.py must parse on Python 3.8, so that an old Python gets one sentence
instead of a SyntaxError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from utils.errors import CourseError

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
# A fresh install was measured: 1.1 GB in .venv, and as much again for a moment in pip's cache and temporary folders.
NEEDED_BYTES = 3 * 10**9

# What pip's log says, and what that means for the learner; the first match wins.
_REASONS: Tuple[Tuple[Tuple[str, ...], str], ...] = (
    (
        ("No space left on device", "[Errno 28]", "[WinError 112]"),
        "The disk (or the temporary folder) is full: free about 3 GB, then run the same command again.",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED", "SSLError"),
        "The package registry's certificate was not accepted: behind a company proxy, set PIP_CERT to its certificate "
        "file, then run the same command again.",
    ),
    (
        ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyError")
        + ("ConnectionResetError", "Max retries exceeded", "Connection broken", "Network is unreachable"),
        "The package registry cannot be reached: check the network (behind a proxy, set HTTPS_PROXY), then run the "
        "same command again.",
    ),
    (
        ("Read-only file system", "Permission denied", "[WinError 5]"),
        "The folder .venv cannot be written: put the course into a folder of your own, then run the command again.",
    ),
)


def check_python(version: Tuple[int, ...] = tuple(sys.version_info[:2])) -> None:
    """Raise CourseError unless this is a 64-bit CPython of a supported version."""
    supported = "Python 3.%d to 3.%d" % (OLDEST[1], NEWEST[1])
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise CourseError(
            "This is Python %d.%d, and the course needs %s: install one of them and start the command with it, for "
            "example python3.12 -m utils lab." % (version[0], version[1], supported)
        )
    if sys.implementation.name != "cpython" or sys.maxsize <= 2**32:
        raise CourseError(
            "The packages of the course exist for 64-bit CPython only: install a 64-bit %s from python.org or your "
            "system's packages." % supported
        )


def environment_python(root: Path = ROOT) -> Path:
    """The path of the environment's Python, whether it exists or not."""
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def in_environment(root: Path = ROOT) -> bool:
    """True if the running Python is the environment's."""
    return Path(sys.prefix).resolve() == (root / ".venv").resolve()


def course_environment(root: Path = ROOT) -> Dict[str, str]:
    """The variables every command and kernel of the course runs with.

    Nothing of the learner's own Python or Jupyter leaks in (a `python3` kernel, a server password, a PYTHONPATH), and
    Jupyter keeps its files in `.jupyter` beside `.venv` instead of the home folder.
    """
    with contextlib.suppress(OSError):  # IPython wants it to exist; whoever cannot write here is told so elsewhere
        (root / ".jupyter").mkdir(exist_ok=True)
    foreign = ("PYTHONHOME", "JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "__PYVENV_LAUNCHER__")
    own = {
        "JUPYTER_CONFIG_DIR": str(root / ".jupyter" / "config"),
        "JUPYTER_DATA_DIR": str(root / ".jupyter" / "data"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(root / ".jupyter" / "ipython"),
        "PIP_USER": "0",
        "PYTHONPATH": str(ROOT),
        "PYTHONUTF8": "1",
        # A company's proxy must not be asked for the servers of this machine.
        **dict.fromkeys(("NO_PROXY", "no_proxy"), _without_proxy()),
        # Milvus Lite and its clients live in processes that start others; gRPC must not hook into their fork.
        "GRPC_ENABLE_FORK_SUPPORT": "false",
        # Its C core writes to the terminal, and so into cells, what its users get as exceptions anyway: for one that a
        # client which waited for a slow model asked Milvus Lite too often whether it is there.
        "GRPC_VERBOSITY": "NONE",
    }
    return {**{name: value for name, value in os.environ.items() if name not in foreign}, **own}


def _without_proxy() -> str:
    found = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in found.split(",") if name.strip()]
    return ",".join(dict.fromkeys(names + ["127.0.0.1", "localhost"]))


def use_course_environment(root: Path = ROOT) -> None:
    """Give this process, and what it starts, the variables of course_environment()."""
    environment = course_environment(root)
    os.environ.clear()
    os.environ.update(environment)


def is_ready(root: Path = ROOT) -> bool:
    """True if `.venv` was finished for exactly these requirements, this Python version and this folder."""
    marker = _read_marker(root)
    return (
        marker == _finished(root, marker.get("base", ""))
        and os.path.exists(marker["base"])
        and environment_python(root).exists()
    )


def ensure_environment(root: Path = ROOT, needed_bytes: int = NEEDED_BYTES) -> Path:
    """Make `.venv` and install the requirements, unless that is done already; return the path of its Python.

    An interrupted or broken `.venv` is made anew; changed requirements are installed into the one that is there. A
    second command that needs it at the same time waits. Raises CourseError with one sentence for everything that can
    go wrong on the learner's side.
    """
    check_python()
    for name in ("requirements.txt", "utils/constraints.txt"):
        if not (root / name).is_file():
            raise CourseError("%s is missing: get it back with git checkout -- %s, or clone again." % (name, name))
    if not is_ready(root):
        try:
            with _lock(root) as lock:
                if not is_ready(root):  # else the command that held the lock has done the work
                    _make(root, needed_bytes, lock)
        except OSError as error:
            raise CourseError(
                explain(str(error)) or "The folder %s cannot be written: %s." % (root, error.strerror or error)
            ) from error
    return environment_python(root)


def explain(log: str) -> Optional[str]:
    """The sentence for the learner that fits an error text of pip or the system, or None."""
    for signs, sentence in _REASONS:
        if any(sign in log for sign in signs):
            return sentence
    for line in log.splitlines():
        if "No matching distribution found for" in line:
            return (
                "There is no ready-made package of %s for this platform and Python: use Linux, macOS or Windows (WSL) "
                "on a 64-bit machine with Python 3.12." % line.split(" for ", 1)[1].split(" (")[0]
            )
    return None


def _marker_path(root: Path) -> Path:
    return root / ".venv" / "course.json"


def _site_packages(root: Path) -> Path:
    folder = "Lib" if os.name == "nt" else "lib/python%d.%d" % sys.version_info[:2]
    return root / ".venv" / folder / "site-packages"


def _read_marker(root: Path) -> Dict[str, Any]:
    try:
        marker = json.loads(_marker_path(root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _finished(root: Path, base: str) -> Dict[str, Any]:
    """What the marker holds when the environment is complete."""
    version = "%d.%d" % sys.version_info[:2]
    digest = hashlib.sha256(version.encode())
    for name in ("requirements.txt", "utils/constraints.txt"):
        digest.update((root / name).read_bytes())
    # The path, because scripts in .venv hold it: a moved folder is made anew.
    return {"sha256": digest.hexdigest(), "python": version, "path": str(root.resolve()), "base": base}


def _make(root: Path, needed_bytes: int, lock: int) -> None:
    venv, marker = root / ".venv", _read_marker(root)
    base = getattr(sys, "_base_executable", None) or sys.executable
    free = shutil.disk_usage(str(root)).free
    if free < needed_bytes:
        raise CourseError(
            "The disk has %.1f GB free, and the course needs about %.1f GB: free some space, then run the same command "
            "again." % (free / 1e9, needed_bytes / 1e9)
        )
    started = time.monotonic()
    update = marker.get("path", str(root.resolve())) == str(root.resolve()) and "state" not in marker and _works(root)
    if not update:
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            raise CourseError(
                "This Python cannot make virtual environments: on Debian and Ubuntu run sudo apt install python3-venv, "
                "then run the same command again."
            )
        _move_away(venv)
        venv.mkdir()
    # From here on until the end the environment counts as half made: the next run makes it anew.
    _marker_path(root).write_text(json.dumps({"state": "installing"}), encoding="utf-8")
    print("%s .venv with Python %d.%d ..." % (("Updating" if update else "Making",) + sys.version_info[:2]), flush=True)
    with open(str(venv / "install.log"), "w", encoding="utf-8") as log:
        if not update:
            _step([base, "-m", "venv", str(venv)], root, log, lock, "making the environment", started)
        pip = [str(environment_python(root)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        install = ["install", "--progress-bar", "off", "--only-binary", ":all:", "-r", str(root / "requirements.txt")]
        constraints = ["-c", str(root / "utils" / "constraints.txt")]
        print("Installing the packages: a few minutes the first time (details in .venv/install.log) ...", flush=True)
        _step(pip + install + constraints, root, log, lock, "installing", started)
        _step(pip + ["check"], root, log, lock, "checking", started)
    # So that `import utils` works in every notebook, also in an editor that starts the kernel itself.
    (_site_packages(root) / "course.pth").write_text(str(root.resolve()) + "\n", encoding="utf-8")
    _marker_path(root).write_text(json.dumps(_finished(root, base)), encoding="utf-8")
    print("The environment is ready (%.0f s)." % (time.monotonic() - started), flush=True)


def _works(root: Path) -> bool:
    """True if the environment's Python starts, has pip and is of the running version."""
    code = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([str(environment_python(root)), "-c", code], stdout=subprocess.PIPE, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.decode().strip() == "%d.%d" % sys.version_info[:2]


def _move_away(venv: Path) -> None:
    """Remove `venv`, by a rename first: a removal that is interrupted then never leaves half an environment."""
    old = venv.with_name(".venv-old")
    shutil.rmtree(str(old), ignore_errors=True)
    if os.path.lexists(str(venv)):
        try:
            venv.rename(old)
        except OSError as error:
            raise CourseError(
                "The folder .venv must be made anew but is in use: close JupyterLab and every terminal that works in "
                "it, delete .venv, then run the same command again."
            ) from error
        shutil.rmtree(str(old), ignore_errors=True)


def _step(command: List[str], root: Path, log: Any, lock: int, doing: str, started: float) -> None:
    """Run one command into the log with a live note of how far it is; raise CourseError if it fails."""
    log_path = root / ".venv" / "install.log"
    before = log_path.stat().st_size
    # Should this process be killed, pip goes on; holding the lock too, it keeps others waiting until it has ended.
    inherit: Dict[str, Any] = {} if os.name == "nt" else {"pass_fds": (lock,)}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=course_environment(root), **inherit
    )
    live = sys.stdout.isatty()
    try:
        while process.poll() is None:
            if live:
                note = "  %3.0f s  %s" % (time.monotonic() - started, _package_in_work(root) or doing)
                print("\r" + note[:78].ljust(78), end="", flush=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        if live:
            print("\r" + " " * 78 + "\r", end="", flush=True)
    if process.returncode != 0:
        text = log_path.read_bytes()[before:].decode("utf-8", "replace")
        if shutil.disk_usage(str(root)).free < 10**7:  # then the log could not be written either
            text += os.strerror(errno.ENOSPC)
        lines = [line for line in text.splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "")
        raise CourseError(
            explain(text) or "%s failed (%s): see .venv/install.log." % (doing.capitalize(), last.strip()[:160])
        )


def _package_in_work(root: Path) -> str:
    """The package that pip is fetching or unpacking now, read from its log and from what it has put in place."""
    lines = (root / ".venv" / "install.log").read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines[-30:]):
        words = line.split()
        if words[:1] == ["Installing"]:
            folders = list(_site_packages(root).glob("*.dist-info"))
            newest = max(folders, key=lambda folder: folder.stat().st_mtime, default=None)
            return "installing %s (%d packages in place)" % (newest.name.split("-")[0] if newest else "", len(folders))
        if words[:1] in (["Collecting"], ["Downloading"], ["Using"]) and len(words) > 1:
            return "%s %s" % (words[0].lower(), words[-1] if words[0] == "Using" else words[1].rsplit("/", 1)[-1])
    return ""


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[int]:
    """Hold `.venv.lock`; wait for a process that has it. The system lets go of it when its holder dies, however."""
    lock = os.open(str(root / ".venv.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waiting = False
        while not _try_lock(lock):
            if not waiting:
                os.lseek(lock, 0, os.SEEK_SET)
                owner = os.read(lock, 20).decode("ascii", "replace").strip()
                print("Waiting for process %s, which is installing the packages ..." % owner, flush=True)
            waiting = True
            time.sleep(0.2)
        os.ftruncate(lock, 0)
        os.lseek(lock, 0, os.SEEK_SET)
        os.write(lock, ("%d\n" % os.getpid()).encode("ascii"))
        yield lock
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte far behind the end: a locked byte cannot be read, and the owner's number must be readable.
            os.lseek(lock, 1 << 20, os.SEEK_SET)
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
