"""`python3 -m utils model fetch | list | remove`."""

from __future__ import annotations

import sys
from pathlib import Path

from utils.local_models import catalog
from utils.local_models.catalog import LocalModelError, ModelFile
from utils.local_models.fetch import fetch, writing


def model_command(action: str, what: str | None) -> int:
    """Fetch, list or remove model files; return the exit code.

    Raises:
        LocalModelError: the learner's errors, in one sentence.
    """
    if action == "list":
        return _list()
    if action == "remove":
        return _remove(what or "")
    try:
        found = fetch(what or "default")
    except KeyboardInterrupt:
        print("\nStopped. What has been fetched is kept: the same command goes on there.", file=sys.stderr)
        return 130
    _show(found)
    return 0


def _show(found: ModelFile) -> None:
    known = catalog.known_model(found.name)
    stated = f"{found.licence} (LICENSE in the hub's repository {known.repository})" if known else found.licence
    print(f"model     {found.name}, {found.bytes / 1e6:.0f} MB, SHA-256 checked")
    print(f"licence   {stated or 'not stated, see where the file came from'}")
    print(f"kept in   {found.path.parent}")
    print(f"next      set MODEL_PROVIDER=local and MODEL_ID={known.alias if known else found.name}")


def _list() -> int:
    print(f"folder: {catalog.folder()}")
    rows = [("name", "alias", "size", "licence", "source", "fetched on")]
    paths = catalog.model_paths()
    for path in paths:
        known = catalog.known_model(path.name)
        alias = known.alias if known else ""
        try:
            one = catalog.describe(path)
            size = f"{one.bytes / 1e6:.0f} MB"
            rows.append((one.name, alias, size, one.licence or "not stated", one.source or "by hand", one.fetched))
        except LocalModelError:
            rows.append((path.stem, alias, "damaged", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows if paths else []:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for partial in sorted(catalog.folder().glob("*.gguf.*.partial")):
        name = partial.name.rsplit(".", 3)[0]
        print(f"not finished: {name}, {partial.stat().st_size / 1e6:.0f} MB so far; the same fetch goes on there")
    here = {path.name for path in paths}
    for known in (one for one in catalog.KNOWN if one.file not in here):
        print(f"to fetch: {known.alias} ({known.file}, {known.bytes / 1e6:.0f} MB, {known.licence})")
    return 0


def _remove(name: str) -> int:
    known = catalog.known_model(name)
    file = known.file if known else name if name.endswith(".gguf") else f"{name}.gguf"
    if not catalog.folder().is_dir():
        raise LocalModelError("No model was fetched yet, so there is nothing to remove.")
    with writing(wait=False) as folder:
        # Only names that the folder itself lists are removed, so that no path can lead out of it.
        found = [path for path in folder.iterdir() if _belongs(path, file)]
        if not found:
            there = ", ".join(path.stem for path in catalog.model_paths())
            raise LocalModelError(f"There is no model '{name}' in {folder}; there are: {there or 'none'}.")
        freed = sum(path.lstat().st_size for path in found)
        for path in found:
            path.unlink()
    print(f"Removed {Path(file).stem}: {freed / 1e6:.1f} MB are free again.")
    return 0


def _belongs(path: Path, file: str) -> bool:
    partial = path.name.startswith(f"{file}.") and path.suffix == ".partial"
    return path.name in (file, f"{file}.json") or partial
