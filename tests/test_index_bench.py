"""`python3 -m utils bench index`: vectors, exact neighbours, going on after a kill, refusals, the file of results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import psutil
import pytest
from conftest import _skip_without_server
from pymilvus import MilvusClient
from waiting import gone, named, wait_for

from utils import __main__ as command_line
from utils import bootstrap
from utils.bootstrap import ROOT
from utils.index_bench import measure, plan, run, store
from utils.index_bench.dataset import BLOCK, DIMENSIONS, Clustered, exact_neighbours, recall
from utils.index_bench.run import Options, require_room
from utils.index_bench.store import Results, ResultsError
from utils.milvus_lab import standalone

ROWS = 2000
QUERIES = 60


@pytest.fixture(scope="module")
def vectors() -> Clustered:
    return Clustered()


def test_vectors_are_the_same_at_every_call_and_size(vectors: Clustered) -> None:
    first, second = Clustered().blocks(BLOCK + 500)
    assert first.shape == (BLOCK, DIMENSIONS) and second.shape == (500, DIMENSIONS)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, vectors.block(0))
    np.testing.assert_array_equal(second, vectors.block(1)[:500])
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert not np.allclose(first, Clustered(seed=8).block(0))


def test_queries_are_of_the_same_kind_but_no_copies(vectors: Clustered) -> None:
    block, queries = vectors.block(0), vectors.queries(200)
    near, numbers = faiss.knn(queries, block, 1, metric=faiss.METRIC_INNER_PRODUCT)
    assert near.max() < 0.999
    # As near to the vectors as those are to each other.
    among, _ = faiss.knn(block[:200], block[200:], 1, metric=faiss.METRIC_INNER_PRODUCT)
    assert abs(float(np.median(near)) - float(np.median(among))) < 0.02
    assert len(set(numbers[:, 0].tolist())) > 150


def test_recall_grows_with_nprobe_step_by_step(vectors: Clustered) -> None:
    block, queries = vectors.block(0), vectors.queries(300)
    truth = exact_neighbours([block], queries, 10)
    index: Any = faiss.index_factory(DIMENSIONS, "IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(block)
    index.add(block)
    curve = []
    for nprobe in (1, 2, 4, 8, 16, 32, 64):
        index.nprobe = nprobe
        curve.append(recall(index.search(queries, 10)[1].tolist(), truth))
    steps = np.diff(curve)
    assert 0.2 < curve[0] < 0.7 and curve[-1] > 0.999
    assert steps.min() >= 0 and steps.max() < 0.3


def test_exact_neighbours_are_those_of_a_full_comparison(vectors: Clustered) -> None:
    block, queries = vectors.block(0)[:1205], vectors.queries(40)
    expected = np.argsort(-(queries @ block.T), axis=1)[:, :10]
    found = exact_neighbours([block[:700], block[700:1200], block[1200:]], queries, 10)  # the last is smaller than 10
    np.testing.assert_array_equal(found, expected)


def test_recall_counts_shared_neighbours_in_any_order() -> None:
    truth = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall([[4, 3, 2, 1], [5, 0, 9]], truth) == 5 / 8


@pytest.mark.parametrize(("text", "rows"), [("10k", 10_000), ("1M", 1_000_000), ("2_000", 2000), ("10,000", 10_000)])
def test_sizes_are_read(text: str, rows: int) -> None:
    assert plan.read_size(text) == rows


@pytest.mark.parametrize("text", ["", "many", "10", "11M", "-5k", "1.5M", "99999999999"])
def test_a_wrong_size_is_one_sentence(text: str) -> None:
    with pytest.raises(plan.SizeError, match="is no size: give a number of vectors from 1k to 10M"):
        plan.read_size(text)


def test_the_plan_is_what_the_course_promises() -> None:
    for rows in plan.SIZES:
        found = list(plan.indexes(rows))
        kinds = [index.kind for index in found]
        assert ("FLAT" in kinds) is (rows <= 1_000_000)
        assert kinds.count("IVF_FLAT") >= 2 and "IVF_SQ8" in kinds and "HNSW" in kinds
        assert any(index.build == {"nlist": 128} for index in found), "the server's default, at every size"
        assert all(
            search.get("nprobe", 0) <= index.build.get("nlist", 0) for index in found for search in index.searches
        )


def test_hnsw_is_estimated_from_the_largest_smaller_size() -> None:
    assert plan.hnsw_seconds(10_000_000, {10_000_000: 5.0}) is None
    estimate = plan.hnsw_seconds(10_000_000, {10_000: 9.0, 1_000_000: 600.0})
    assert estimate == pytest.approx(600 * 10 * 7 / 6)


def options(folder: Path, **changed: Any) -> Options:
    """A run of seconds instead of hours."""
    small: dict[str, Any] = {"sizes": [ROWS], "folder": folder, "out": folder / "index.json", "kinds": ("FLAT", "HNSW")}
    small |= {"clients": 2, "queries": QUERIES, "client_seconds": 0.2, "batch": 50}
    return Options(**(small | changed))


class Memory(NamedTuple):
    total: int
    available: int


def test_too_little_memory_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(8 * 10**9, 2 * 10**9))
    results = Results(tmp_path / "index.json", {})
    with pytest.raises(run.RoomError) as refused:
        require_room(tmp_path, results, {10_000_000: list(plan.indexes(10_000_000))})
    sentence = str(refused.value)
    assert sentence.startswith("10,000,000 vectors need ") and "and 2.0 GB are free: " in sentence
    assert "choose smaller --sizes" in sentence and "\n" not in sentence
    require_room(tmp_path, results, {10_000: list(plan.indexes(10_000))})


def test_too_little_disk_is_refused_beforehand(tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(4) / "not" / "made" / "yet"
    with pytest.raises(run.RoomError, match=r"100,000 vectors need 0\.\d GB of free disk, and 0\.0 GB are free: "):
        require_room(folder, Results(tmp_path / "index.json", {}), {100_000: list(plan.indexes(100_000))})
    assert not folder.exists()


def test_results_of_other_conditions_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "index.json"
    first = Results(file, {"seed": 7, "server settings": {"a": 1}})
    first.size(10_000)["insert"] = {"rows": 5}
    first.save()
    assert Results(file, {"seed": 7, "server settings": {"a": 1}}).size(10_000) == {"insert": {"rows": 5}}
    with pytest.raises(ResultsError, match=r"measured under other conditions \(seed\): name another file with --out"):
        Results(file, {"seed": 8, "server settings": {"a": 1}})


@pytest.mark.parametrize("text", ["", "[]", '{"sizes": 3}', '{"other": {}}', '{"sizes": {"10'])
def test_another_file_is_no_file_of_results(text: str, tmp_path: Path) -> None:
    file = tmp_path / "index.json"
    file.write_text(text)
    with pytest.raises(ResultsError, match="is no file of index measurements: python3 -m utils bench index makes one"):
        Results(file, {})
    assert file.read_text() == text


def test_a_build_that_would_take_hours_is_left_out(tmp_path: Path) -> None:
    results = Results(tmp_path / "index.json", {})
    index = plan.Index("HNSW", plan.HNSW, ({"ef": 10},))
    stored = {"kind": "HNSW", "build": dict(index.build), "build seconds": 800.0}
    results.size(1_000_000)["indexes"] = {index.name: stored}
    assert run.leave_out(results, 10_000_000, index) == (
        "its build would take 2.6 hours, as estimated from the smaller sizes"
    )
    assert run.leave_out(results, 2_000_000, index) is None
    assert run.leave_out(results, 10_000_000, plan.Index("IVF_FLAT", {"nlist": 128})) is None


def start(chosen: Options) -> subprocess.Popen[str]:
    """A run in a process of its own, to be killed."""
    code = f"from pathlib import Path, PosixPath\nfrom utils.index_bench.run import Options, run\nrun({chosen!r})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def stored(file: Path) -> Any:
    """The entry of the size; empty before the first measurement."""
    return json.loads(file.read_text())["sizes"].get(str(ROWS), {}) if file.exists() else {}


def kill_when(process: subprocess.Popen[str], reached: Callable[[], object]) -> None:
    assert wait_for(lambda: reached() or process.poll() is not None, 300)
    assert process.poll() is None, "it had ended before it could be killed"
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 3, "keeper, etcd and Milvus at least"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert wait_for(lambda: all(gone(one) for one in started)), "servers and clients end with the command"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, list[Any]]:
    """A run that was killed in the insert and in the searches, and then ended; and what was stored at each kill."""
    _skip_without_server()
    chosen = options(tmp_path_factory.mktemp("bench"))
    kills = []
    inserting = lambda: stored(chosen.out).get("insert", {}).get("rows", 0) >= 400  # noqa: E731
    searching = lambda: len(stored(chosen.out).get("indexes", {}).get(HNSW, {}).get("searches", [])) >= 2  # noqa: E731
    for reached in (inserting, searching):
        kill_when(start(chosen), reached)
        kills.append(stored(chosen.out))
    run.run(chosen)
    return chosen, kills


HNSW = plan.Index("HNSW", plan.HNSW).name


def test_a_killed_insert_goes_on_and_no_vector_is_missing_or_there_twice(measured: tuple[Options, list[Any]]) -> None:
    chosen, (in_insert, _) = measured
    assert 400 <= in_insert["insert"]["rows"] < ROWS
    done = stored(chosen.out)
    assert done["insert"]["rows"] == ROWS and done["insert"]["interruptions"] == 1
    assert sum(done["segment rows"]) == ROWS and len(done["segment rows"]) == 2
    with standalone(chosen.folder / "server", progress=False) as lab:
        client = MilvusClient(lab.uri, token=lab.token)
        client.load_collection(f"bench_{ROWS}")
        rows = client.query(f"bench_{ROWS}", filter="id >= 0", output_fields=["id", measure.FIELD])
        client.close()
    assert sorted(row["id"] for row in rows) == list(range(ROWS))
    there = np.array([row[measure.FIELD] for row in sorted(rows, key=lambda row: int(row["id"]))], dtype=np.float32)
    np.testing.assert_allclose(there, Clustered().block(0)[:ROWS], atol=1e-6)


def test_finished_measurements_are_not_repeated(measured: tuple[Options, list[Any]]) -> None:
    chosen, (_, in_search) = measured
    before, done = in_search["indexes"], stored(chosen.out)["indexes"]
    assert 2 <= len(before[HNSW]["searches"]) < len(plan.EF) == len(done[HNSW]["searches"])
    assert done["FLAT"] == before["FLAT"]
    assert done[HNSW]["build seconds"] == before[HNSW]["build seconds"], "the index was still there"
    assert done[HNSW]["searches"][:2] == before[HNSW]["searches"][:2]
    written = chosen.out.stat().st_mtime_ns
    content = chosen.out.read_text()
    run.run(chosen)
    assert chosen.out.read_text() == content and chosen.out.stat().st_mtime_ns >= written


def test_the_servers_flat_search_agrees_with_the_exact_neighbours(measured: tuple[Options, list[Any]]) -> None:
    assert stored(measured[0].out)["indexes"]["FLAT"]["searches"][0]["recall"] > 0.999


def test_the_tables_have_what_the_notebook_plots(measured: tuple[Options, list[Any]]) -> None:
    builds, searches = store.build_table(measured[0].out), store.search_table(measured[0].out)
    assert builds["kind"].tolist() == ["FLAT", "HNSW"] and set(builds["rows"]) == {ROWS}
    positive = ["build seconds", "load seconds", "memory before loading, bytes", "memory after loading, bytes"]
    assert (builds[positive] > 0).all(axis=None)
    assert (builds["segments"] == 2).all()
    hnsw = builds.set_index("kind").loc["HNSW"]
    assert (hnsw["M"], hnsw["efConstruction"]) == (16, 100)
    assert 0 < hnsw["index bytes"] < 2 * ROWS * DIMENSIONS * 4
    assert searches["ef"].dropna().tolist() == list(plan.EF)
    assert ((searches["recall"] > 0.5) & (searches["recall"] <= 1)).all()
    assert (searches["p50 ms"] <= searches["p95 ms"]).all() and (searches["searches per second"] > 1).all()
    head = json.loads(measured[0].out.read_text())
    assert head["versions"]["milvus"] == "2.3.5" and "processors" in head["machine"]
    assert (head["seed"], head["dimensions"], head["metric"]) == (7, 96, "COSINE")


def test_redo_measures_searches_again_and_keeps_the_rest(measured: tuple[Options, list[Any]]) -> None:
    chosen, _ = measured
    before = stored(chosen.out)
    run.run(options(chosen.folder, kinds=("FLAT",)), redo="search")
    after = stored(chosen.out)
    assert after["insert"] == before["insert"] and after["indexes"][HNSW] == before["indexes"][HNSW]
    (old,), (new,) = before["indexes"]["FLAT"]["searches"], after["indexes"]["FLAT"]["searches"]
    assert new["recall"] == old["recall"] and new["p50 ms"] > 0 and new != old


def test_restart_inserts_anew(measured: tuple[Options, list[Any]]) -> None:
    chosen, _ = measured
    run.run(options(chosen.folder, kinds=("FLAT",), batch=500), restart=True)
    anew = stored(chosen.out)
    assert anew["segment rows"] == [ROWS] and anew["insert"]["interruptions"] == 0
    assert list(anew["indexes"]) == ["FLAT"] and anew["indexes"]["FLAT"]["searches"][0]["recall"] > 0.999


CLIENTS = """
import numpy as np
from utils.index_bench import measure

if __name__ == "__main__":
    with measure.clients(2, "http://127.0.0.1:1", "") as clients:
        clients.searches_per_second("none", np.zeros((2, 4), np.float32), {}, 1, 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_clients_are_born_with_ctrl_c_held_back(tmp_path: Path) -> None:
    """While they still import, it would print a traceback of each of them."""
    program = tmp_path / "clients.py"
    program.write_text(CLIENTS, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(program)], env={**os.environ, "PYTHONPATH": str(ROOT)})

    def clients() -> list[psutil.Process]:
        return named(psutil.Process(process.pid).children(), "spawn_main")

    try:
        assert wait_for(lambda: len(clients()) == 2)
        states = [Path(f"/proc/{client.pid}/status").read_text(encoding="utf-8") for client in clients()]
    finally:
        process.kill()
        process.wait()
    blocked = [int(line.split()[1], 16) for state in states for line in state.splitlines() if line.startswith("SigBlk")]
    assert [mask >> (signal.SIGINT - 1) & 1 for mask in blocked] == [1, 1]


@pytest.mark.parametrize(
    "arguments", [["bench"], ["bench", "model"], ["bench", "index", "--restart", "--redo", "build"]]
)
def test_wrong_arguments_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments)
    assert stop.value.code == 2
    assert "usage: python3 -m utils bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(["--sizes", "20M"], "'20M' is no size"), (["--clients", "0"], "--clients 0: choose")]
)
def test_a_wrong_value_is_one_sentence(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "ensure_environment", lambda: Path(sys.executable))
    monkeypatch.setattr(bootstrap, "in_environment", lambda: True)
    assert command_line.main(["bench", "index", *arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {sentence}") and shown.count("\n") == 1


def test_the_stored_run_has_everything_that_the_plan_asks_for(tmp_path: Path) -> None:
    stored = Results(ROOT / "data" / "benchmarks" / "index.json", {})
    for rows in plan.SIZES:
        assert run.unmeasured(stored.size(rows), options(tmp_path, kinds=()), rows) == [], rows
        assert sum(stored.size(rows)["segment rows"]) == rows
        for index in stored.size(rows)["indexes"].values():
            assert index["load seconds"] > 0 and all(0 < search["recall"] <= 1 for search in index["searches"])
