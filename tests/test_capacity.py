"""The capacity sheet: worked examples, the memory of a real server, and the files that its defaults come from."""

from __future__ import annotations

import ast
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from agno.run.concurrency import DEFAULT_BACKGROUND_MAX_CONCURRENCY
from hypothesis import given, settings
from hypothesis import strategies as st
from pymilvus import DataType, MilvusClient

from utils.bootstrap import ROOT
from utils.capacity import INDEXES, LOADING_MB, MEASURED, SHEET, CapacityError, Load, Measured, plan
from utils.capacity_widget import GROUPS, CapacityPanel, result_html, result_text
from utils.errors import CourseError
from utils.hosting.database import POOL
from utils.milvus_lab import standalone

if TYPE_CHECKING:
    from utils.milvus_lab.servers import ServerLab

DEPLOY = ROOT / "utils" / "deploy"


@pytest.mark.parametrize(
    ("index", "others", "documented"),
    [
        ("FLAT", {}, 512),
        ("IVF_FLAT", {"nlist": 2000}, 515),
        ("IVF_SQ8", {"nlist": 2000}, 131),
        ("HNSW", {"m": 16}, 640),
    ],
)
def test_a_million_vectors_of_the_milvus_documentation(index: str, others: dict[str, Any], documented: float) -> None:
    """Its example counts 2 bytes for the list of a vector, Faiss keeps 8; and it leaves HNSW's upper layers out."""
    megabytes = plan(Load(index=index, vectors=1_000_000, dimensions=128, row_bytes=0, **others))["index_bytes"] / 1e6
    assert documented <= megabytes <= documented + 8


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row.index}-{row.vectors}-{row.row_bytes}")
def test_the_formula_is_within_its_bound_of_the_measured_memory(row: Measured) -> None:
    assert row.formula_mb <= row.loaded_mb <= row.formula_mb + LOADING_MB


def test_the_measured_growth_is_that_of_the_formula() -> None:
    """Between two sizes the buffers of loading cancel out, but for FLAT: there they differ from run to run."""
    collections = {(one.index, one.m, one.row_bytes) for one in MEASURED} - {("FLAT", 30, 0)}
    for kind in collections:
        small, *_, large = [one for one in MEASURED if (one.index, one.m, one.row_bytes) == kind]
        grown = (large.loaded_mb - small.loaded_mb) / (large.formula_mb - small.formula_mb)
        assert 0.9 <= grown <= 1.2, kind
    assert len(collections) == 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerLab]:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the server is for Linux on x86-64")
    with standalone(tmp_path_factory.mktemp("capacity"), progress=False) as lab:
        yield lab


@pytest.mark.notebook_run  # a minute: insert, restart, load
@pytest.mark.parametrize(
    "row", [one for one in MEASURED if one.index == "FLAT" and one.vectors == 100_000], ids=["FLAT"]
)
def test_a_real_server_needs_what_the_formula_says(server: ServerLab, row: Measured) -> None:
    """The procedure of every row of MEASURED; FLAT alone has no index to build."""
    assert row.formula_mb <= loaded_megabytes(server, row) <= row.formula_mb + LOADING_MB


def loaded_megabytes(lab: ServerLab, row: Measured) -> float:
    """By how much the resident memory of a server that has just started grows when it loads the collection."""
    random = np.random.default_rng(7)
    client = MilvusClient(lab.uri, token=lab.token, dedicated=True)
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=row.dimensions)
    if row.row_bytes:
        schema.add_field("text", DataType.VARCHAR, max_length=row.row_bytes)
    client.create_collection("memory", schema=schema)
    for start in range(0, row.vectors, 20_000):
        vectors = random.standard_normal((min(20_000, row.vectors - start), row.dimensions), dtype=np.float32)
        text = {"text": "x" * row.row_bytes} if row.row_bytes else {}
        client.insert("memory", [{"id": start + n, "vector": vector, **text} for n, vector in enumerate(vectors)])
    client.flush("memory")
    index = client.prepare_index_params()
    parameters = {"HNSW": {"M": row.m, "efConstruction": 100}}.get(row.index, {"nlist": row.nlist})
    index.add_index("vector", index_type=row.index, metric_type="L2", params=parameters)
    client.create_index("memory", index)
    while int(client.describe_index("memory", "vector")["pending_index_rows"]):
        time.sleep(0.5)
    client.close()
    lab.kill()
    lab.restart()
    time.sleep(8)  # until a started server needs no more
    client = MilvusClient(lab.uri, token=lab.token, dedicated=True)
    before = lab.memory()["standalone"]
    client.load_collection("memory")
    client.search("memory", [[0.0] * row.dimensions], limit=10)
    time.sleep(12)  # until it has given back what it gives back
    after = lab.memory()["standalone"]
    client.drop_collection("memory")
    client.close()
    return (after - before) / 1e6


def test_the_sheet_by_hand() -> None:
    made = plan(
        Load(
            requests_per_second=20,
            average_share=0.5,
            model_calls=2,
            first_token_seconds=0.5,
            output_tokens=200,
            tokens_per_second=100,
            searches=2,
            search_seconds=0.01,
            agent_cpu_seconds=0.08,
            agent_runs=30,
            utilisation=0.8,
            vectors=10_000_000,
            dimensions=768,
            row_bytes=480,
            row_factor=2,
            index="IVF_SQ8",
            nlist=1000,
            node_searches=25,
            input_tokens=2000,
            usd_input=1,
            usd_output=5,
        )
    )
    assert made["model_seconds"] == pytest.approx(3) and made["run_seconds"] == pytest.approx(3.1)
    assert made["runs_in_flight"] == pytest.approx(62), "Little: 20 a second, 3.1 s each"
    assert made["busy_processes"] == pytest.approx(2) and made["agent_replicas"] == 3, "62 runs at 30 each"
    assert made["connections"] == 90 and made["sessions_gib"] == pytest.approx(10 * 86400 * 90 * 16_000 / 2**30)
    assert made["segments"] == 34
    assert made["index_bytes"] == pytest.approx(1e7 * 776 + 34 * 1000 * 768 * 4)
    assert made["memory_gib"] == pytest.approx((made["index_bytes"] + 1e10) / 2**30)
    assert made["nodes_for_memory"] == 7, "two copies of 16.6 GiB in nodes that hold 5.15"
    assert made["nodes_for_searches"] == 2 and made["query_nodes"] == 8
    assert made["model_usd"] == pytest.approx(10 * 3600 * 730 * 0.003)
    assert made["total_usd"] == pytest.approx(sum(made.costs().values()))


def test_the_shown_formulas_use_every_input_and_only_what_stands_above_them() -> None:
    inputs = {one.name for one in fields(Load)} - {"index"}
    known, used = set(inputs) | {"ceil", "max"}, set[str]()
    for line in SHEET:
        for formula in INDEXES.values() if line.name == "index_bytes" else [line]:
            names = {node.id for node in ast.walk(ast.parse(formula.text)) if isinstance(node, ast.Name)}
            assert names <= known and formula.source and formula.unit, formula
            used |= names
        known.add(line.name)
    assert inputs <= used, "an input that changes nothing"
    shown = plan(Load(index="IVF_FLAT")).table()
    assert INDEXES["IVF_FLAT"].text in set(shown["formula"]) and not shown.isna().any(axis=None)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 1e4), st.floats(1, 1e9), st.sampled_from([*INDEXES]), st.sampled_from(["traffic", "data", "copies"])
)
def test_more_work_never_needs_less(rate: float, vectors: float, index: str, more: str) -> None:
    small = Load(requests_per_second=rate, vectors=vectors, index=index)
    large = {
        "traffic": replace(small, requests_per_second=2 * rate),
        "data": replace(small, vectors=2 * vectors),
        "copies": replace(small, replicas=3),
    }[more]
    before, after = plan(small), plan(large)
    assert all(after[line.name] >= before[line.name] for line in SHEET)
    assert plan(replace(small, node_gib=16))["query_nodes"] <= before["query_nodes"]


def test_prices_count_once_and_only_in_their_layer() -> None:
    before = plan(Load()).costs()
    assert plan(Load(usd_output=9)).costs() == before | {
        "model": pytest.approx(before["model"] + 1.5 * 730 * 3600 * 3e2 * 4.5e-6)
    }
    free: dict[str, Any] = {one.name: 0 for one in fields(Load) if one.metadata["group"] == "prices"}
    assert set(plan(Load(**free)).costs().values()) == {0.0} and "0 USD" in result_html(plan(Load(**free)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"index": "DISKANN"}, "choose one of FLAT, IVF_FLAT, IVF_SQ8, HNSW"),
        ({"vectors": 0}, "vectors is 0; it must be from 1 to 1e"),
        ({"requests_per_second": -1}, "requests_per_second is -1"),
        ({"requests_per_second": float("nan")}, "requests_per_second is nan"),
        ({"vectors": float("inf")}, "vectors is inf"),
        ({"utilisation": 1.5}, "utilisation is 1.5; it must be from 0.01 to 1"),
        ({"m": 1}, "m is 1; it must be from 2"),
        ({"node_gib": 1}, "raise node_gib"),
    ],
)
def test_an_impossible_input_is_refused_in_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CapacityError, match=sentence) as refused:
        plan(Load(**values))
    assert isinstance(refused.value, CourseError)


def test_extreme_inputs_give_numbers() -> None:
    for one in fields(Load):
        if one.name != "index" and one.name != "node_base_gib":
            low = {"node_gib": 2.0, "memory_share": 0.5}.get(one.name, one.metadata["low"])
            for value in (low, one.metadata["high"]):
                changed: dict[str, Any] = {one.name: value}
                assert np.isfinite([result for _, result in plan(Load(**changed)).lines]).all(), one.name


def test_warnings_say_what_the_plan_runs_into() -> None:
    assert [text[:19] for text in plan(Load(requests_per_second=50)).warnings()][:1] == ["240 connections are"]
    assert plan(Load(vectors=100_000)).warnings() == []
    assert "Memory" in plan(Load(vectors=5_000_000)).warnings()[0]


def test_the_defaults_are_those_of_the_files_that_they_name() -> None:
    load = Load()
    node = yaml.safe_load((DEPLOY / "milvus-distributed" / "values.yaml").read_text(encoding="utf-8"))["queryNode"]
    assert (f"{load.node_cores:g}", f"{load.node_gib:g}Gi") == tuple(node["resources"]["requests"].values())
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    cores = node["replicas"] * load.node_cores + load.other_cores
    memory = node["replicas"] * load.node_gib + load.other_gib
    assert f"{cores:.0f} cores and {memory:.0f} GB of memory" in readme
    assert node["replicas"] == load.replicas + load.spare_nodes
    agent, *_ = yaml.safe_load_all((DEPLOY / "kubernetes" / "agent.yaml").read_text(encoding="utf-8"))
    requests = agent["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert (f"{load.agent_cores:g}", f"{load.agent_gib:g}Gi") == (requests["cpu"], requests["memory"])
    scaler = yaml.safe_load((DEPLOY / "kubernetes" / "agent-autoscaling.yaml").read_text(encoding="utf-8"))["spec"]
    assert scaler["metrics"][0]["resource"]["target"]["averageUtilization"] == 100 * load.utilisation
    nodes = yaml.safe_load((DEPLOY / "milvus-distributed" / "values-autoscaling.yaml").read_text(encoding="utf-8"))
    assert nodes["queryNode"]["hpa"]["memoryUtilization"] == 100 * load.memory_share
    assert load.pool == POOL["pool_size"] + POOL["max_overflow"]
    measured = json.loads((ROOT / "data" / "benchmarks" / "service.json").read_text(encoding="utf-8"))
    assert 1 / measured["PostgreSQL, 1 worker"]["runs/s of the service"] == pytest.approx(
        load.agent_cpu_seconds, rel=0.2
    )
    assert load.agent_runs == DEFAULT_BACKGROUND_MAX_CONCURRENCY >= measured["at once"]
    index = json.loads((ROOT / "data" / "benchmarks" / "index.json").read_text(encoding="utf-8"))
    searches = index["sizes"]["1000000"]["indexes"][f"IVF_FLAT nlist={load.nlist:g}"]["searches"]
    (found,) = [one for one in searches if one["parameters"] == {"nprobe": 8}]
    # A factor of two, for the machine's mood: the sheet plans machines, not milliseconds.
    assert found["searches per second"] / 2 <= load.node_searches <= found["searches per second"] * 2
    assert found["p50 ms"] / 2 <= 1000 * load.search_seconds <= found["p50 ms"] * 2


def test_every_input_has_a_group_of_the_panel_a_unit_or_a_source() -> None:
    for one in fields(Load):
        assert one.metadata["group"] in GROUPS and one.metadata["source"]


# The panel


def test_the_panel_calculates_when_an_input_changes() -> None:
    panel = CapacityPanel()
    assert panel.plan == plan(Load()) and "5 query nodes" in panel.result.value
    before = panel.result.value
    panel.inputs["vectors"].value = 20_000_000
    assert panel.plan == plan(Load(vectors=20_000_000)) and panel.result.value != before
    panel.inputs["index"].value = "IVF_SQ8"
    assert panel.plan == plan(Load(vectors=20_000_000, index="IVF_SQ8"))


def test_the_panel_says_what_is_wrong_and_goes_on() -> None:
    panel = CapacityPanel(Load(requests_per_second=7))
    panel.inputs["vectors"].value = -5
    assert "vectors is -5; it must be from 1" in panel.result.value and 'role="alert"' in panel.result.value
    assert panel.plan == plan(Load(requests_per_second=7)), "the last one that could be made"
    panel.inputs["vectors"].value = 1000
    assert "alert" not in panel.result.value and panel.plan["memory_gib"] < 0.01


def test_the_panel_is_set_from_python_as_a_whole_or_not_at_all() -> None:
    panel = CapacityPanel()
    assert panel.set(node_gib=1, node_base_gib=0.1) == panel.plan == plan(Load(node_gib=1, node_base_gib=0.1))
    with pytest.raises(CapacityError, match="searches is -1"):
        panel.set(vectors=5, searches=-1)
    assert panel.plan.load.vectors == 1_000_000


def test_the_panel_shows_every_formula_and_as_text_the_costs() -> None:
    panel = CapacityPanel()
    for formula, _ in panel.plan.lines:
        assert f"<code>{formula.text}</code>" in panel.result.value
    shown = panel._repr_mimebundle_()
    assert shown["text/plain"] == result_text(panel.plan) and "application/vnd.jupyter.widget-view+json" in shown
    total = panel.plan["total_usd"]
    assert f"{total:,.0f} USD a month" in shown["text/plain"]
