"""How much of each layer a load needs, and what a month of it costs: a small sheet of formulas that can be read.

What is shown is what is computed: each `Formula` holds a Python expression as text, over the fields of `Load` and the
formulas above it. `plan(load)` evaluates them from top to bottom. Traffic, measurements and prices are inputs; the
defaults come from this course's measurements and from list prices of the day that their source names, which were read
in articles that quote the vendors: look at the vendor's own list before you decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import pandas as pd

from utils.errors import CourseError

COURSE = "data/benchmarks/service.json"
SEARCHES = "data/benchmarks/index.json: 1M x 96, IVF_FLAT, nlist 1024, nprobe 8, 2 cores"
VALUES = "utils/deploy/milvus-distributed/values.yaml"
AGENT = "utils/deploy/kubernetes/agent.yaml"
FARGATE = "AWS Fargate, Linux x86, us-east-1, list price of June 2026"
OPENAI = "OpenAI, gpt-5.4-mini, standard price of June 2026"
RDS = "Amazon RDS for PostgreSQL, db.t4g.medium, Multi-AZ, us-east-1, list price of 2026"
INDEX_DOCS = "milvus.io/docs/index-explained.md, section on memory"

POSTGRES_CONNECTIONS = 100  # max_connections as PostgreSQL ships it
MOST = 1e12  # beyond it an input is a slip of the keyboard


class CapacityError(CourseError):
    """An input of the calculation is out of its range."""


def _given(default: float, group: str, unit: str, source: str, low: float = 0, high: float = MOST) -> Any:
    return field(default=default, metadata={"group": group, "unit": unit, "source": source, "low": low, "high": high})


@dataclass(frozen=True)
class Load:
    """What is asked of the system, what its parts were measured to do, and prices; each with its unit and source.

    Raises:
        CapacityError: a value is out of its range, or `index` is none of `INDEXES`.
    """

    requests_per_second: float = _given(5, "traffic", "1/s, at the busiest time", "yours")
    average_share: float = _given(0.3, "traffic", "average traffic as a share of the busiest", "yours", 0, 1)
    model_calls: float = _given(2, "traffic", "per request", "notebook 02: one to search, one to answer")
    input_tokens: float = _given(3000, "traffic", "per request, all calls together", "yours; run.metrics has it")
    output_tokens: float = _given(300, "traffic", "per request, all calls together", "yours; run.metrics has it")
    searches: float = _given(1, "traffic", "per request", "notebook 04 counts them")

    vectors: float = _given(1_000_000, "knowledge", "", "yours", 1)
    dimensions: float = _given(1536, "knowledge", "", "text-embedding-3-small", 1)
    row_bytes: float = _given(1000, "knowledge", "bytes of text and metadata per vector", "yours; about 200 words")
    row_factor: float = _given(
        2.4, "knowledge", "bytes in memory per byte of text", "measured, Milvus 2.3.5; near 0 with mmap for the field"
    )
    index: str = field(default="HNSW", metadata={"group": "knowledge", "unit": "", "source": "yours"})
    m: float = _given(30, "knowledge", "links per vector of HNSW", "Milvus's default", 2)
    nlist: float = _given(1024, "knowledge", "clusters per segment of IVF", "yours; notebook 07", 1)
    replicas: float = _given(2, "knowledge", "copies in memory (replica_number)", "yours", 1)

    first_token_seconds: float = _given(0.6, "measured", "s per call of the model", "an assumption: measure yours")
    tokens_per_second: float = _given(80, "measured", "output tokens of one call", "an assumption: measure yours", 0.1)
    search_seconds: float = _given(0.003, "measured", "s per search", f"{SEARCHES}, p50 of one client")
    agent_cpu_seconds: float = _given(
        0.027, "measured", "s of CPU per request", f"{COURSE}: 37.7 runs/s of one worker with PostgreSQL"
    )
    agent_runs: float = _given(
        32,
        "measured",
        "places: runs at once in a replica",
        f"AGNO_BACKGROUND_MAX_CONCURRENCY as Agno sets it; {COURSE} had 16 at once, notebook 06 fills them",
        1,
    )
    node_searches: float = _given(
        650, "measured", "searches/s of a node over a whole copy", f"{SEARCHES}, 4 clients", 0.1
    )
    run_bytes: float = _given(16_000, "measured", "bytes in PostgreSQL per run", "60 runs of the assistant, measured")

    utilisation: float = _given(
        0.7, "machines", "share of the CPU to plan with", "agent-autoscaling.yaml, the autoscaler's target", 0.01, 1
    )
    memory_share: float = _given(
        0.8, "machines", "share of a node's memory to fill", "the autoscaler's target", 0.01, 1
    )
    agent_cores: float = _given(1, "machines", "per AgentOS replica", f"{AGENT}: one Python process uses one")
    agent_gib: float = _given(1, "machines", "GiB per AgentOS replica", AGENT)
    node_cores: float = _given(2, "machines", "per query node", VALUES)
    node_gib: float = _given(8, "machines", "GiB per query node", VALUES, 0.5)
    node_base_gib: float = _given(
        1.25, "machines", "GiB of a node for itself", "0.25 idle, measured, and a segment of 1 GiB while it is loaded"
    )
    spare_nodes: float = _given(1, "machines", "query nodes that take over", f"{VALUES}: two replicas, three nodes")
    other_cores: float = _given(6, "machines", "cores of Milvus's other roles, etcd, MinIO", VALUES)
    other_gib: float = _given(30, "machines", "GiB of the same", VALUES)
    pool: float = _given(30, "machines", "connections per replica", "utils/hosting/database.py, POOL")
    retention_days: float = _given(90, "machines", "days that sessions are kept", "yours")

    usd_core_hour: float = _given(0.04048, "prices", "USD", FARGATE)
    usd_gib_hour: float = _given(0.004445, "prices", "USD", FARGATE)
    usd_database_hour: float = _given(0.130, "prices", "USD", RDS)
    usd_database_gib: float = _given(0.23, "prices", "USD per GiB and month", "Amazon RDS, gp3, Multi-AZ, 2026")
    usd_object_gib: float = _given(
        0.023, "prices", "USD per GiB and month", "Amazon S3 Standard, us-east-1, undated: look it up"
    )
    usd_input: float = _given(0.75, "prices", "USD per million input tokens", OPENAI)
    usd_output: float = _given(4.50, "prices", "USD per million output tokens", OPENAI)

    def __post_init__(self) -> None:
        if self.index not in INDEXES:
            raise CapacityError(f"index is '{self.index}'; choose one of {', '.join(INDEXES)}.")
        for one in fields(self):
            value, low, high = getattr(self, one.name), one.metadata.get("low", 0), one.metadata.get("high", MOST)
            if one.name != "index" and not low <= value <= high:
                raise CapacityError(f"{one.name} is {value:g}; it must be from {low:g} to {high:g}.")


@dataclass(frozen=True)
class Formula:
    """One line of the sheet.

    Attributes:
        layer: "agents", "sessions", "retrieval", "model" or "total".
        name: what later lines call it.
        unit: of the value.
        text: a Python expression over the fields of `Load`, the lines above, `ceil` and `max`.
        source: why it holds.
    """

    layer: str
    name: str
    unit: str
    text: str
    source: str


# Bytes of one copy of the vectors in memory. HNSW: M links in each layer, twice as many in the lowest, which holds all
# vectors; the layers above add 1 part in M - 1. IVF: Faiss keeps a 64-bit number with each vector of a list.
INDEXES: Mapping[str, Formula] = MappingProxyType(
    {
        "FLAT": Formula("retrieval", "index_bytes", "bytes", "vectors * dimensions * 4", INDEX_DOCS),
        "IVF_FLAT": Formula(
            "retrieval",
            "index_bytes",
            "bytes",
            "vectors * (dimensions * 4 + 8) + segments * nlist * dimensions * 4",
            f"{INDEX_DOCS}; Faiss, wiki page on indexes: 8 bytes for the number",
        ),
        "IVF_SQ8": Formula(
            "retrieval",
            "index_bytes",
            "bytes",
            "vectors * (dimensions + 8) + segments * nlist * dimensions * 4",
            f"{INDEX_DOCS}; Faiss, wiki page on indexes: 8 bytes for the number",
        ),
        "HNSW": Formula(
            "retrieval",
            "index_bytes",
            "bytes",
            "vectors * (dimensions * 4 + 2 * m * 4 + m * 4 / (m - 1))",
            f"{INDEX_DOCS}; Malkov and Yashunin, arXiv 1603.09320, section 4.2.3",
        ),
    }
)
SHEET = (
    Formula(
        "model",
        "model_seconds",
        "s per request",
        "model_calls * first_token_seconds + output_tokens / tokens_per_second",
        "time to the first token, then the tokens one by one",
    ),
    Formula(
        "agents",
        "run_seconds",
        "s per request",
        "model_seconds + searches * search_seconds + agent_cpu_seconds",
        "a run waits for its parts one after the other",
    ),
    Formula(
        "agents",
        "runs_in_flight",
        "runs at once",
        "requests_per_second * run_seconds",
        "Little's law, L = lambda W (Operations Research 9, 1961)",
    ),
    Formula(
        "agents",
        "busy_processes",
        "processes",
        "requests_per_second * agent_cpu_seconds / utilisation",
        "utilisation law; a Python process computes on one core",
    ),
    Formula(
        "agents",
        "agent_replicas",
        "replicas",
        "max(2, ceil(busy_processes), ceil(runs_in_flight / agent_runs))",
        "two, so that one may fail",
    ),
    Formula("sessions", "connections", "connections", "agent_replicas * pool", "PostgreSQL allows 100 by default"),
    Formula(
        "sessions",
        "sessions_gib",
        "GiB",
        "requests_per_second * average_share * 86400 * retention_days * run_bytes / 2**30",
        "rate times time kept times size",
    ),
    Formula(
        "retrieval",
        "segments",
        "per copy",
        "ceil(vectors * (dimensions * 4 + row_bytes) / 2**30)",
        "dataCoord.segment.maxSize: 1024 MB in Milvus 3.0, 512 MB in 2.3.5",
    ),
    Formula("retrieval", "index_bytes", "bytes per copy", "", ""),  # the line of INDEXES
    Formula(
        "retrieval",
        "memory_gib",
        "GiB per copy",
        "(index_bytes + vectors * (row_bytes * row_factor + 40)) / 2**30",
        "scalar fields are loaded too; 40 bytes: row number, time stamp, 64-bit primary key, and the table of keys"
        " (Milvus 2.3, segcore/InsertRecord.h)",
    ),
    Formula(
        "retrieval",
        "nodes_for_memory",
        "query nodes",
        "ceil(replicas * memory_gib / (node_gib * memory_share - node_base_gib))",
        "copies divided by what a node can hold",
    ),
    Formula(
        "retrieval",
        "nodes_for_searches",
        "query nodes",
        "ceil(requests_per_second * searches / (node_searches * utilisation))",
        "utilisation law; nodes that share a copy share the work of each search (not in full with HNSW)",
    ),
    Formula(
        "retrieval",
        "query_nodes",
        "query nodes",
        "max(replicas, nodes_for_memory, nodes_for_searches) + spare_nodes",
        "each copy on a node of its own, and some to take over",
    ),
    Formula(
        "retrieval",
        "stored_gib",
        "GiB in object storage",
        "(vectors * (dimensions * 4 + row_bytes) + index_bytes) / 2**30",
        "the inserted data and the index files; replicas share them",
    ),
    Formula(
        "agents",
        "agents_usd",
        "USD per month",
        "agent_replicas * (agent_cores * usd_core_hour + agent_gib * usd_gib_hour) * 730",
        "730 hours a month",
    ),
    Formula(
        "sessions",
        "sessions_usd",
        "USD per month",
        "usd_database_hour * 730 + sessions_gib * usd_database_gib",
        "one database with a standby",
    ),
    Formula(
        "retrieval",
        "retrieval_usd",
        "USD per month",
        "(query_nodes * node_cores + other_cores) * usd_core_hour * 730"
        " + (query_nodes * node_gib + other_gib) * usd_gib_hour * 730 + stored_gib * usd_object_gib",
        "machines and object storage",
    ),
    Formula(
        "model",
        "model_usd",
        "USD per month",
        "requests_per_second * average_share * 3600 * 730"
        " * (input_tokens * usd_input + output_tokens * usd_output) / 1e6",
        "tokens are paid by average traffic, machines by the busiest hour",
    ),
    Formula("total", "total_usd", "USD per month", "agents_usd + sessions_usd + retrieval_usd + model_usd", "the sum"),
)


@dataclass(frozen=True)
class Plan:
    """The sheet for one load.

    Attributes:
        load: the inputs.
        lines: formula and value, from top to bottom.
    """

    load: Load
    lines: tuple[tuple[Formula, float], ...]

    def __getitem__(self, name: str) -> float:
        """The value of the line with this name."""
        return {formula.name: value for formula, value in self.lines}[name]

    def table(self) -> pd.DataFrame:
        """The sheet as a table: layer, name, value, unit, formula and source."""
        rows = [(f.layer, f.name, value, f.unit, f.text, f.source) for f, value in self.lines]
        return pd.DataFrame(rows, columns=["layer", "name", "value", "unit", "formula", "source"])

    def costs(self) -> dict[str, float]:
        """USD per month of each layer: agents, sessions, retrieval, model."""
        return {layer: self[f"{layer}_usd"] for layer in ("agents", "sessions", "retrieval", "model")}

    def warnings(self) -> list[str]:
        """What the plan would run into, one sentence each."""
        found = []
        if self["connections"] > POSTGRES_CONNECTIONS:
            found.append(
                f"{self['connections']:.0f} connections are more than PostgreSQL's {POSTGRES_CONNECTIONS}: raise "
                "max_connections, make the pools smaller, or put PgBouncer between."
            )
        if self["nodes_for_memory"] > max(self["nodes_for_searches"], self.load.replicas):
            found.append(
                "Memory, not searches, sets the number of query nodes: compare another index, a smaller embedding, or "
                "larger nodes."
            )
        return found


@dataclass(frozen=True)
class Measured:
    """Memory of a real server: Milvus Standalone 2.3.5, 2 cores, 24 GB, Linux x86-64, 2026-11-23, one segment.

    Attributes:
        index: one of `INDEXES`.
        vectors: how many, in one collection.
        loaded_mb: by how many MB the resident memory of a server that has just started grows when it loads the
            collection; tests/test_capacity.py has the procedure.
        dimensions: 32-bit floats of each.
        row_bytes: of a text field.
        m: links of HNSW.
        nlist: clusters of IVF.
    """

    index: str
    vectors: int
    loaded_mb: float
    dimensions: int = 128
    row_bytes: int = 0
    m: int = 30
    nlist: int = 1024

    @property
    def formula_mb(self) -> float:
        """What the sheet says for the same collection."""
        load = Load(
            vectors=self.vectors,
            dimensions=self.dimensions,
            row_bytes=self.row_bytes,
            index=self.index,
            m=self.m,
            nlist=self.nlist,
        )
        return plan(load)["memory_gib"] * 2**30 / 1e6


MEASURED = (
    Measured("FLAT", 100_000, 87.9),
    Measured("FLAT", 300_000, 246.6),
    Measured("IVF_FLAT", 100_000, 99.4),
    Measured("IVF_FLAT", 300_000, 207.0),
    Measured("IVF_SQ8", 100_000, 51.7),
    Measured("IVF_SQ8", 300_000, 89.0),
    Measured("HNSW", 100_000, 73.5, m=16),
    Measured("HNSW", 300_000, 230.0, m=16),
    Measured("HNSW", 100_000, 88.1),
    Measured("HNSW", 300_000, 261.6),
    Measured("IVF_FLAT", 50_000, 237.7, row_bytes=1000, nlist=128),
    Measured("IVF_FLAT", 100_000, 388.7, row_bytes=1000),
    Measured("IVF_FLAT", 200_000, 684.6, row_bytes=1000, nlist=128),
)
# The process keeps buffers of loading: 5 to 92 MB here, and not more with more vectors. Four runs of FLAT with 100,000
# gave 74, 88, 88 and 121 MB, the others are single runs.
LOADING_MB = 100


def plan(load: Load) -> Plan:
    """Evaluate the sheet.

    Raises:
        CapacityError: a query node is too small to hold anything.
    """
    if load.node_gib * load.memory_share <= load.node_base_gib:
        raise CapacityError(
            f"A query node of {load.node_gib:g} GiB has no room beside its own {load.node_base_gib:g} GiB: "
            "raise node_gib."
        )
    known = {one.name: getattr(load, one.name) for one in fields(load)}
    lines = []
    for formula in (INDEXES[load.index] if line.name == "index_bytes" else line for line in SHEET):
        # The text comes from this file only; what the user gives are numbers.
        known[formula.name] = float(eval(formula.text, {"__builtins__": {}, "ceil": math.ceil, "max": max}, known))
        lines.append((formula, known[formula.name]))
    return Plan(load, tuple(lines))
