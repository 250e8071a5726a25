"""The file of results: written anew after every measurement, so that a stopped run continues after the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import CourseError
from utils.lesson import show_path


class ResultsError(CourseError):
    """A file of results cannot be used."""


class Results:
    """What has been measured.

    Args:
        file: its place; it need not exist.
        conditions: what must be the same for all measurements in the file.

    Attributes:
        file: its place.

    Raises:
        ResultsError: the file holds measurements under other conditions, or something else.
    """

    def __init__(self, file: Path, conditions: Mapping[str, Any]) -> None:
        self.file = file
        self._data: dict[str, Any] = {**conditions, "sizes": {}}
        if not file.exists():
            return
        stored = _read(file)
        # Through JSON, which has no tuples and no number as a key.
        wanted = json.loads(json.dumps(conditions))
        other = [name for name, value in wanted.items() if stored.get(name) != value]
        if other:
            raise ResultsError(
                f"{show_path(file)} was measured under other conditions ({', '.join(other)}): name another file with "
                "--out, or delete this one."
            )
        self._data = stored

    def size(self, rows: int) -> dict[str, Any]:
        """The entry of a size, which may be changed; `save()` afterwards."""
        entry: dict[str, Any] = self._data["sizes"].setdefault(str(rows), {})
        return entry

    def forget(self, rows: int) -> None:
        """Remove a size."""
        self._data["sizes"].pop(str(rows), None)

    def build_seconds(self, kind: str) -> dict[int, float]:
        """Seconds of the build of a kind of index, by size."""
        return {
            int(rows): index["build seconds"]
            for rows, entry in self._data["sizes"].items()
            for index in entry.get("indexes", {}).values()
            if index["kind"] == kind and "build seconds" in index
        }

    def save(self) -> None:
        """Write the file as a whole or not at all.

        Raises:
            ResultsError: its folder cannot be written.
        """
        self._data["sizes"] = dict(sorted(self._data["sizes"].items(), key=lambda item: int(item[0])))
        draft = self.file.with_name(self.file.name + ".draft")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(self._data, indent=1) + "\n", encoding="utf-8")
            os.replace(draft, self.file)
        except OSError as error:
            raise ResultsError(f"{show_path(self.file)} cannot be written ({error.strerror}).") from None


def build_table(file: Path) -> pd.DataFrame:
    """One row for each index that was built: size, kind, parameters, seconds, bytes, segments.

    Raises:
        ResultsError: the file is not one of results.
    """
    return pd.DataFrame(
        [
            {"rows": int(rows), **{name: value for name, value in index.items() if name not in ("build", "searches")}}
            | index["build"]
            for rows, entry in _read(file)["sizes"].items()
            for index in entry.get("indexes", {}).values()
        ]
    )


def search_table(file: Path) -> pd.DataFrame:
    """One row for each search that was measured: size, kind, parameters of build and search, recall, milliseconds.

    Raises:
        ResultsError: the file is not one of results.
    """
    return pd.DataFrame(
        [
            {"rows": int(rows), "kind": index["kind"], **index["build"], **search["parameters"]}
            | {name: value for name, value in search.items() if name != "parameters"}
            for rows, entry in _read(file)["sizes"].items()
            for index in entry.get("indexes", {}).values()
            for search in index.get("searches", [])
        ]
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        data["sizes"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ResultsError(
            f"{show_path(file)} is no file of index measurements: python3 -m utils bench index makes one."
        ) from None
    return dict(data)
