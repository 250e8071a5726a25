"""At how many vectors a search of IVF gets too slow: `python3 -m utils.deploy.monitoring.growth`.

The number in rules/recording.yml comes from here. `--file` takes a run of your own (python3 -m utils bench index).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.bootstrap import ROOT
from utils.index_bench.store import search_table

STORED = ROOT / "data" / "benchmarks" / "index.json"
NLIST, NPROBE = 128, 8
BUDGET_MS = 10.0


class Line(NamedTuple):
    """Median milliseconds of a search, as a floor and a price for each vector compared."""

    floor_ms: float
    ms_per_vector: float

    def compared(self, budget_ms: float) -> int:
        """Vectors that a search compares in `budget_ms`, rounded down to thousands."""
        return int((budget_ms - self.floor_ms) / self.ms_per_vector) // 1000 * 1000


def fit(file: Path = STORED) -> Line:
    """The line of notebook 07, Figure 4: all measured searches of IVF_FLAT, each with the same weight.

    Raises:
        ResultsError: the file is not one of results.
    """
    searches = search_table(file)
    cells = searches[searches["kind"] == "IVF_FLAT"]
    compared = cells["rows"] * cells["nprobe"] / cells["nlist"]
    slope, floor = np.polyfit(compared, cells["p50 ms"], 1, w=1 / cells["p50 ms"])
    return Line(float(floor), float(slope))


def main() -> None:
    """Print the two numbers that belong into recording.yml, and what they mean."""
    parser = argparse.ArgumentParser(prog="python3 -m utils.deploy.monitoring.growth")
    parser.add_argument("--file", type=Path, default=STORED, help="measurements (default: the stored runs)")
    parser.add_argument(
        "--ms", type=float, default=BUDGET_MS, help="median that a search may take (default %(default)s)"
    )
    parser.add_argument("--nlist", type=int, default=NLIST, help="of your index (default %(default)s)")
    parser.add_argument("--nprobe", type=int, default=NPROBE, help="of your searches (default %(default)s)")
    chosen = parser.parse_args()
    line = fit(chosen.file)
    compared = line.compared(chosen.ms)
    print(
        f"{line.floor_ms:.1f} ms for a search, and {1e6 * line.ms_per_vector:.0f} ms for each million vectors compared"
    )
    print(f"milvus:probed_share:ratio       vector({chosen.nprobe} / {chosen.nlist})")
    print(f"milvus:compared_limit:vectors   vector({compared})")
    print(f"{chosen.ms:g} ms are reached at {compared * chosen.nlist // chosen.nprobe:,} vectors")


if __name__ == "__main__":
    main()
