"""What every notebook uses: its folder and lock, the banner, checks, quiet logs, and the end; partly in a real kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from milvus_lite.server_manager import server_manager_instance as lite_servers
from nbclient import NotebookClient
from pymilvus import MilvusClient

from utils import lesson
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
    client.create_collection("rows", dimension=2)
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
    assert list(folder.iterdir()) == []
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


def test_a_second_process_is_told_that_the_folder_is_in_use(course_data: Path) -> None:
    folder = lesson.workspace("03_busy")
    (folder / "work.txt").write_text("mine")
    code = "from utils import lesson; lesson.workspace('03_busy')"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    last = other.stderr.splitlines()[-1]
    assert other.returncode == 1
    assert last.startswith(f"utils.lesson.WorkspaceBusy: 03_busy is already running in another kernel (process {os.getpid()})")
    assert (folder / "work.txt").read_text() == "mine"


def test_the_lock_of_a_dead_process_is_taken_over(course_data: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock = course_data / "04_dead.lock"
    course_data.mkdir()
    lock.write_text(f"{holder.pid}:{psutil.Process(holder.pid).create_time()}")
    with pytest.raises(WorkspaceBusy, match=rf"process {holder.pid}\).*shut that kernel down"):
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
    assert milvus == "milvus    Milvus Lite 3.2.2, in this process, at .../06_banner/milvus.db"
    assert note.strip() == (
        "The offline model is extractive: it quotes the sentences that fit best, or declines; it cannot reason."
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


def test_milvus_of_the_settings_or_lite_in_the_folder(tmp_path: Path) -> None:
    assert lesson.milvus_uri(tmp_path, Settings()) == str(tmp_path / "milvus.db")
    assert lesson.milvus_uri(tmp_path, Settings(milvus_uri="http://m:1")) == "http://m:1"


def test_a_server_is_described_by_what_it_says_itself(tmp_path: Path) -> None:
    uri = lite_servers.start_and_get_uri(str(tmp_path / "served.db"))  # Lite's own gRPC server, reached by URL
    assert uri is not None
    version = MilvusClient(uri).get_server_version()
    assert lesson.describe_milvus(tmp_path, Settings(milvus_uri=uri)) == f"Milvus server {version.lstrip('v')} at {uri}"
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


def test_in_a_real_kernel_an_error_is_a_sentence_and_finish_stops_everything(course_data: Path) -> None:
    cells = [
        "from utils import lesson, models\nfolder = lesson.workspace('08_kernel')\nlesson.show_setup(folder)\n"
        "print(models._offline_server().process.pid, (folder.with_suffix('.lock')).exists())",
        "lesson.check('the answer is 42', False, 'Think again.')",
        "1 / 0",
        "lesson.finish(folder)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(
        notebook, timeout=60, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    started, failed, python_error, finished = (cell.outputs for cell in notebook.cells)
    assert [output.output_type for output in started] == ["stream"], started
    pid, locked = started[0].text.splitlines()[-1].split()
    assert locked == "True"
    [error] = failed
    assert error.traceback == ["CheckFailed: not true: the answer is 42. Think again."]
    assert (error.ename, error.evalue) == ("CheckFailed", "not true: the answer is 42. Think again.")
    assert len(python_error[0].traceback) > 1, "other errors keep their traceback"
    assert finished[0].text == "Servers stopped.\n"
    assert not psutil.pid_exists(int(pid))
    assert not (course_data / "08_kernel.lock").exists()


NOISE = """
import sys, tempfile
from pathlib import Path
from agno.utils.log import log_info, set_log_level_to_info
from pymilvus import MilvusClient
from utils import lesson
if sys.argv[1] == "quiet":
    lesson.quiet_logs()
    lesson.quiet_logs()
set_log_level_to_info()
log_info("agno info line")
with tempfile.TemporaryDirectory() as folder:
    client = MilvusClient(f"{folder}/noise.db")
    try:
        client.search("not there", data=[[0.1, 0.2]])
    except Exception as error:
        print("raised", type(error).__name__)
    lesson.close_lite(Path(folder))
"""


def test_quiet_logs_keeps_info_and_pymilvus_errors_away() -> None:
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", NOISE, how],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in ("loud", "quiet")
    ]
    (loud_out, loud_errors), (quiet_out, quiet_errors) = [program.communicate(timeout=60) for program in programs]
    loud, quiet = loud_out + loud_errors, quiet_out + quiet_errors
    assert "agno info line" in loud and "pymilvus" in loud, "otherwise this test would prove nothing"
    assert "agno info line" not in quiet and "pymilvus" not in quiet and "Traceback" not in quiet
    assert "raised " in quiet_out and quiet_out.count("raised") == loud_out.count("raised") == 1
