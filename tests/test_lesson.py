"""What every notebook uses: its folder and lock, the banner, checks, quiet logs, the end; partly in a real kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import psutil
import pytest
from milvus_lite.server_manager import server_manager_instance as lite_servers
from nbclient import NotebookClient
from pymilvus import DataType, MilvusClient

from utils import lesson, models
from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.lesson import CheckFailed, MilvusUnreachable, WorkspaceBusy
from utils.models import Models
from utils.offline import CHAT_MODEL, DIMENSIONS, EMBEDDING_MODEL
from utils.processes import owner_mark
from utils.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def write_row(path: Path) -> MilvusClient:
    client = MilvusClient(str(path))
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    client.create_collection("rows", schema=schema)  # without an index, for which pymilvus waits half a second
    client.insert("rows", [{"id": 1, "vector": [0.1, 0.9]}])
    return client


def test_workspace_starts_empty_unless_told_otherwise(course_data: Path) -> None:
    folder = lesson.workspace("00_some")
    assert folder == course_data / "00_some" and list(folder.iterdir()) == []
    (folder / "deep").mkdir()
    (folder / "deep" / "note.txt").write_text("kept?")
    assert lesson.workspace("00_some", fresh=False) == folder
    assert (folder / "deep" / "note.txt").exists()
    assert list(lesson.workspace("00_some").iterdir()) == []
    assert lesson.workspace("01_other") != folder


def test_workspace_is_emptied_while_milvus_lite_is_open_in_it(course_data: Path) -> None:
    folder = lesson.workspace("02_lite")
    write_row(folder / "milvus.db")  # never closed, like a notebook whose first cells are run again
    assert str(folder / "milvus.db") in lite_servers._servers
    other = course_data / "other.db"
    with_rows = write_row(other)
    lesson.workspace("02_lite")
    assert list(folder.iterdir()) == [] and str(folder / "milvus.db") not in lite_servers._servers
    again = MilvusClient(str(folder / "milvus.db"))
    assert again.list_collections() == []
    assert with_rows.list_collections() == ["rows"], "a database elsewhere stays open"
    lesson.close_lite(course_data)
    assert not [path for path in lite_servers._servers if path.startswith(str(course_data))]


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_close_lite_sees_through_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_row(tmp_path / "link" / "milvus.db")
    lesson.close_lite(tmp_path / "real")
    assert not [path for path in lite_servers._servers if path.startswith(str(tmp_path))]


def test_the_lock_of_a_dead_process_is_taken_over(course_data: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock = course_data / "04_dead.lock"
    course_data.mkdir()
    lock.write_text(f"{holder.pid}:{psutil.Process(holder.pid).create_time()}")
    with pytest.raises(WorkspaceBusy, match=rf"process {holder.pid}.*shut it down"):
        lesson.workspace("04_dead")
    holder.kill()
    holder.wait()
    lesson.workspace("04_dead")
    assert lock.read_text() == owner_mark()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff\xfe", b"1:x", b"-1:0"])
def test_a_damaged_lock_holds_nobody_up(course_data: Path, content: bytes) -> None:
    course_data.mkdir()
    (course_data / "05_odd.lock").write_bytes(content)
    assert lesson.workspace("05_odd").is_dir()


def test_banner(course_data: Path, offline_models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    lesson.show_setup(lesson.workspace("06_banner"))
    model, embedder, milvus, note = capsys.readouterr().out.splitlines()
    assert model == f"model     {CHAT_MODEL} (offline)"
    assert embedder == f"embedder  {EMBEDDING_MODEL} (offline), {DIMENSIONS} dimensions"
    assert milvus == f"milvus    Milvus Lite {version('milvus-lite')}, in this process, at .../06_banner/milvus.db"
    assert note.strip() == (
        "The offline model is extractive: it quotes fitting sentences, or declines; it cannot reason."
    )


def test_banner_of_another_server_says_nothing_about_the_offline_model(
    course_data: Path, offline_models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_PROVIDER", "compatible")
    monkeypatch.setenv("OPENAI_BASE_URL", offline_models.chat.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", offline_models.chat.api_key)
    monkeypatch.setenv("MODEL_ID", CHAT_MODEL)
    monkeypatch.setenv("MILVUS_URI", "elsewhere/lab.db")
    lesson.show_setup(lesson.workspace("07_other"))
    shown = capsys.readouterr().out
    assert f"model     {CHAT_MODEL} (compatible)\nembedder  {EMBEDDING_MODEL} (offline)" in shown
    assert shown.endswith("at elsewhere/lab.db\n") and "extractive:" not in shown


def test_banner_of_a_notebook_that_always_uses_lite(
    course_data: Path, offline_models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILVUS_URI", "http://127.0.0.1:1")  # nothing answers there, and nobody asks it
    lesson.show_setup(lesson.workspace("09_lite"), always_lite=True)
    shown = capsys.readouterr().out
    assert "in this process, at .../09_lite/milvus.db" in shown and "does not use MILVUS_URI" in shown
    monkeypatch.setenv("MILVUS_URI", "")
    lesson.show_setup(lesson.workspace("09_lite"), always_lite=True)
    assert "MILVUS_URI" not in capsys.readouterr().out


@pytest.mark.parametrize("indent", ["", "- "])
def test_long_lines_are_broken_between_words(indent: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{indent}one two-three four\nshort\n{'x' * 30}"
    lesson.show_text(text, 12)
    shown = capsys.readouterr().out
    assert shown.split() == text.split() and "short\n" in shown
    assert [line for line in shown.splitlines() if len(line) > 12] == ["x" * 30]


def test_milvus_of_the_settings_or_lite_in_the_folder(tmp_path: Path) -> None:
    assert lesson.milvus_uri(tmp_path, Settings()) == str(tmp_path / "milvus.db")
    assert lesson.milvus_uri(tmp_path, Settings(milvus_uri="http://m:1")) == "http://m:1"


def test_a_server_is_described_by_what_it_says_itself(tmp_path: Path) -> None:
    uri = lite_servers.start_and_get_uri(str(tmp_path / "served.db"))  # Lite's own gRPC server, reached by URL
    assert uri is not None
    says = MilvusClient(uri).get_server_version()
    assert lesson.describe_milvus(tmp_path, Settings(milvus_uri=uri)) == f"Milvus server {says.lstrip('v')} at {uri}"
    lesson.close_lite(tmp_path)


def test_a_milvus_that_does_not_answer_is_one_sentence(tmp_path: Path, closed_port: int) -> None:
    uri = f"http://127.0.0.1:{closed_port}"
    with pytest.raises(MilvusUnreachable) as error:
        lesson.describe_milvus(tmp_path, Settings(milvus_uri=uri, milvus_token="root:secret"))
    said = str(error.value)
    assert said.startswith(f"No Milvus answers at {uri}") and "remove MILVUS_URI to use Milvus Lite" in said
    assert "\n" not in said and "secret" not in said
    assert error.value.__suppress_context__, "no chain of pymilvus errors behind it"


def test_paths_are_shown_without_the_machine(tmp_path: Path) -> None:
    assert lesson.show_path(ROOT / "data" / "local" / "x") == "data/local/x"
    assert lesson.show_path(tmp_path / "a" / "b.db") == ".../a/b.db"


def test_check_prints_or_stops(capsys: pytest.CaptureFixture[str]) -> None:
    lesson.check("two rows", [1, 2], "Insert them.")
    assert capsys.readouterr().out == "check passed: two rows\n"
    with pytest.raises(CheckFailed, match=r"^not true: two rows\. Insert them\.$"):
        lesson.check("two rows", [], "Insert them.")
    assert capsys.readouterr().out == ""
    assert issubclass(CheckFailed, CourseError)


def outputs_of(*cells: str) -> list[list[nbformat.NotebookNode]]:
    """What the cells of a notebook show, run in a kernel of their own."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    return [cell.outputs for cell in notebook.cells]


def test_a_figure_is_drawn_once_and_has_a_text(course_data: Path) -> None:
    drawing, open_figures = outputs_of(
        "import matplotlib.pyplot as plt\nfrom utils.lesson import show_figure\n"
        "figure, axes = plt.subplots()\nshow_figure(figure, 'An empty plot')",
        "print(plt.get_fignums())",
    )
    [picture] = drawing
    assert picture.data["image/png"] and picture.metadata["image/png"]["alt"] == "An empty plot"
    assert open_figures[0].text == "[]\n", "else the kernel draws it again"


def test_in_a_real_kernel_an_error_is_a_sentence_without_traceback(course_data: Path) -> None:
    ours = lesson.workspace("03_busy")
    (ours / "work.txt").write_text("mine")
    started, failed, python_error, busy, finished = outputs_of(
        "from utils import lesson\nfolder = lesson.workspace('08_kernel')\nprint(folder.with_suffix('.lock').exists())",
        "lesson.check('the answer is 42', False, 'Think again.')",
        "1 / 0",
        "lesson.workspace('03_busy')",
        "lesson.finish(folder)",
    )
    assert [output.get("text") for output in started] == ["True\n"], started
    [error] = failed
    assert error.traceback == ["CheckFailed: not true: the answer is 42. Think again."]
    assert (error.ename, error.evalue) == ("CheckFailed", "not true: the answer is 42. Think again.")
    assert len(python_error[0].traceback) > 1, "other errors keep their traceback"
    assert busy[0].ename == "WorkspaceBusy" and len(busy[0].traceback) == 1
    assert busy[0].evalue.startswith(f"03_busy is in use by process {os.getpid()}: if")
    assert (ours / "work.txt").read_text() == "mine"
    assert finished[0].text == "Servers stopped.\n"
    assert not (course_data / "08_kernel.lock").exists()


NOISE = """
import sys, tempfile
from pathlib import Path
from agno.utils.log import log_info, set_log_level_to_info
from pymilvus import MilvusClient
from utils import lesson

def make_noise(client):
    set_log_level_to_info()
    log_info("agno info line")
    try:
        client.search("not there", data=[[0.1, 0.2]])
    except Exception as error:
        print("raised", type(error).__name__)
    print("-----", flush=True)

with tempfile.TemporaryDirectory() as folder:
    client = MilvusClient(f"{folder}/noise.db")
    make_noise(client)
    lesson.quiet_logs()
    lesson.quiet_logs()
    make_noise(client)
    lesson.close_lite(Path(folder))
"""


def test_quiet_logs_keeps_info_and_pymilvus_errors_away() -> None:
    program = subprocess.run(
        [sys.executable, "-c", NOISE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    loud, quiet, _ = program.stdout.split("-----\n")
    assert "agno info line" in loud and "RPC error" in loud, "otherwise this test would prove nothing"
    assert quiet == "raised MilvusException\n" and quiet in loud, "the exception itself is still raised"


def test_finish_ends_everything_and_the_next_notebook_gets_another_server(
    course_data: Path, offline_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lesson.workspace("10_end")
    write_row(folder / "milvus.db")
    process = models._servers[None].process
    lesson.finish(folder)
    assert capsys.readouterr().out == "Servers stopped.\n"
    assert not process.running and not psutil.pid_exists(process.pid)
    assert not folder.with_suffix(".lock").exists() and str(folder / "milvus.db") not in lite_servers._servers
    models.stop_offline()  # nothing runs: nothing happens
    again = models.connect(Settings())
    assert again.chat.base_url != offline_models.chat.base_url
    assert again.chat.api_key != offline_models.chat.api_key
    assert models.embedder(Settings()).get_embedding("it answers")
