"""What the stock adapter and ReliableMilvus do right: `.venv/bin/python tests/benchmarks/adapter.py`.

    --save    store the table as data/benchmarks/adapter.json, which notebook 01 shows

Runs the checks of tests/store_checks.py, one for each known defect, with both adapters on Milvus Lite and on a
standalone server that it starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd  # noqa: E402
from agno.vectordb.milvus import Milvus  # noqa: E402
from store_checks import CHECKS, Place  # noqa: E402
from tqdm import tqdm  # noqa: E402

from utils import lesson  # noqa: E402
from utils.milvus_lab import standalone  # noqa: E402
from utils.milvus_store import ReliableMilvus  # noqa: E402

TABLE = ROOT / "data" / "benchmarks" / "adapter.json"


def passed(place: Place) -> dict[int, bool]:
    """Number of each check, and whether the place's adapter passes it."""
    place.prepare(len(CHECKS))
    results = {}
    for check in tqdm(CHECKS, desc=f"{place.adapter.__name__} on {place.mode}", leave=False):
        try:
            check.run(place)
            results[check.row] = True
        except Exception:  # whatever goes wrong, the check has failed
            results[check.row] = False
    return results


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    lesson.quiet_logs()
    columns: dict[str, dict[int, bool]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with standalone(folder / "standalone") as lab:
            for adapter in (Milvus, ReliableMilvus):
                lite = Place("lite", str(folder / f"{adapter.__name__}.db"), "", adapter, has_bm25=True)
                server = Place("standalone", lab.uri, lab.token, adapter, has_bm25=False, prefix=adapter.__name__)
                lite.lenient = server.lenient = adapter is Milvus
                for place in (lite, server):
                    columns[f"{adapter.__name__} on {place.mode}"] = passed(place)
        lesson.close_lite(folder)
    rows: list[dict[str, Any]] = [
        {"row": check.row, "check": check.title, **{name: column[check.row] for name, column in columns.items()}}
        for check in CHECKS
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    if options.save:
        result = {
            "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("agno", "pymilvus", "milvus-lite", "milvus")},
            "rows": rows,
        }
        TABLE.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
