"""utils.notebooks: running, saving, the table, and JupyterLab, with real kernels and a real server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
from waiting import gone, wait_for

from utils import notebooks
from utils.bootstrap import ROOT
from utils.errors import CourseError

ENTRY = """
[[notebook]]
file = "{name}.ipynb"
title = "{name}"
minutes = 1
level = "beginner"
needs = "nothing"
works_with = "offline"
adds = "a"
proof = "p"
from_post = "-"
"""


def make_course(root: Path, **contents: list[str]) -> Path:
    """A course whose notebooks have these code cells; README.md has a place for the table."""
    (root / "notebooks").mkdir(parents=True)
    (root / ".jupyter").mkdir()
    names = {key.replace("nb", "", 1): cells for key, cells in contents.items()}
    (root / "notebooks" / "course.toml").write_text("".join(ENTRY.format(name=name) for name in names))
    (root / "README.md").write_text(f"# Course\n\n{notebooks.TABLE_BEGIN}\nold\n{notebooks.TABLE_END}\n\nAfter.\n")
    for name, cells in names.items():
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(book, root / "notebooks" / f"{name}.ipynb")
    return root


def printed(root: Path, name: str) -> str:
    book = nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)
    return "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))


@pytest.mark.filterwarnings("ignore:Non-unique cell id")
def test_saving_twice_gives_the_same_file_in_canonical_form(tmp_path: Path) -> None:
    cells = ["import sys, os\nprint('a')\nprint('b', flush=True)\nprint(os.path.basename(os.getcwd()))", "", "6 * 7"]
    cells += ["import ipywidgets\nipywidgets.IntSlider()"]
    root = make_course(tmp_path / "course", nb01_one=cells)
    path = root / "notebooks" / "01_one.ipynb"
    raw = json.loads(path.read_text())
    raw["metadata"] = {"widgets": {"state": 1}, "vscode": {"x": 1}, "language_info": {"version": "3.9.1"}}
    raw["cells"][0]["metadata"] = {"tags": ["solution"], "collapsed": True, "jupyter": {"source_hidden": True}}
    raw["cells"][2]["metadata"] = {"execution": {"iopub.status.busy": "2020-01-01"}, "vscode": {}}
    raw["cells"][2]["id"] = raw["cells"][0]["id"]
    path.write_text(json.dumps(raw))

    assert notebooks.run_command(["1"], save=True, root=root) == 0
    first = path.read_bytes()
    assert notebooks.run_command(["01_one"], save=True, root=root) == 0
    assert path.read_bytes() == first

    saved = json.loads(first)
    nbformat.validate(saved)
    assert first.endswith(b"}\n") and b"\r" not in first
    assert [cell["execution_count"] for cell in saved["cells"]] == [1, None, 2, 3]
    assert [cell["metadata"] for cell in saved["cells"]] == [
        {"jupyter": {"source_hidden": True}, "tags": ["solution"]},
        {},
        {},
        {},
    ]
    assert saved["cells"][0]["outputs"] == [
        {"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n", "notebooks\n"]}
    ]
    assert list(saved["cells"][3]["outputs"][0]["data"]) == ["text/plain"]
    assert saved["metadata"]["kernelspec"]["name"] == "python3"
    assert saved["metadata"]["language_info"] == {"name": "python"}
    assert "widgets" not in saved["metadata"]
    assert len({cell["id"] for cell in saved["cells"]}) == 4


def test_failing_notebook_is_told_in_short_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raises = "from utils.errors import CourseError\nraise CourseError('Start the server first.')"
    fails = ["x = 1", raises, "print('later')"]
    root = make_course(tmp_path / "course", nb01_fails=fails, nb02_works=["print('fine')"])
    before = (root / "notebooks" / "01_fails.ipynb").read_bytes()
    assert notebooks.run_command([], everything=True, save=True, root=root) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "01_fails failed: cell 2 (from utils.errors import CourseError)",
        "  CourseError: Start the server first.",
    ]
    table = [line.split() for line in shown.out.splitlines()[-2:]]
    assert [(row[0], row[2], row[3]) for row in table] == [("01_fails", "2", "failed"), ("02_works", "1", "ok")]
    assert (root / "notebooks" / "01_fails.ipynb").read_bytes() == before, "a failed run is not stored"
    assert printed(root, "02_works") == "fine\n"


def test_course_error_in_a_notebook_shows_the_sentence_without_traceback(tmp_path: Path) -> None:
    cell = "from utils.errors import CourseError\ndef deep():\n    raise CourseError('Start the server first.')\ndeep()"
    root = make_course(tmp_path / "course", nb01_one=[cell])
    path = root / "notebooks" / "01_one.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[0].metadata["tags"] = ["raises-exception"]
    nbformat.write(book, path)
    assert notebooks.run_command(["1"], save=True, root=root) == 0
    output = nbformat.read(path, as_version=4).cells[0].outputs[0]
    assert output.traceback == ["CourseError: Start the server first."]


def test_kernel_is_this_python_and_stored_outputs_are_offline_whatever_the_learner_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["no-such-python", "-f", "{connection_file}"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    code = "import os, sys\nprint(sys.executable, os.environ['MODEL_PROVIDER'], os.environ['OPENAI_API_KEY'] or '-')"
    root = make_course(tmp_path / "course", nb01_one=[code])
    run = "import sys; from pathlib import Path; from utils import bootstrap, notebooks\n"
    run += "bootstrap.use_course_environment()\n"
    run += "sys.exit(notebooks.run_command(['1'], save=True, root=Path(sys.argv[1])))"
    own = {"JUPYTER_PATH": str(foreign.parent.parent), "JUPYTER_DATA_DIR": str(foreign.parent.parent)}
    own |= {"MODEL_PROVIDER": "openai", "OPENAI_API_KEY": "secret"}
    done = subprocess.run([sys.executable, "-c", run, str(root)], cwd=ROOT, env=os.environ | own, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert printed(root, "01_one") == f"{sys.executable} offline -\n"


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_ends_the_kernel(tmp_path: Path) -> None:
    root = make_course(tmp_path / "course", nb01_one=["open('started', 'w').close()\nimport time\ntime.sleep(60)"])
    run = "import sys; from pathlib import Path; from utils import notebooks\n"
    run += "try:\n    notebooks.run_command(['1'], root=Path(sys.argv[1]))\n"
    run += "except KeyboardInterrupt:\n    sys.exit(130)"
    process = subprocess.Popen([sys.executable, "-c", run, str(root)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: (root / "notebooks" / "started").exists())
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert kernels and wait_for(lambda: all(gone(kernel) for kernel in kernels))


@pytest.mark.parametrize("word", ["2", "02", "02_two", "two", "notebooks/02_two.ipynb"])
def test_a_notebook_has_many_names(tmp_path: Path, word: str) -> None:
    root = make_course(tmp_path / "course", nb01_one=[], nb02_two=[])
    assert [notebook.name for notebook in notebooks.select([word, "2"], root)] == ["02_two"]


def test_unknown_notebook_lists_the_known_ones(tmp_path: Path) -> None:
    root = make_course(tmp_path / "course", nb01_one=[], nb02_two=[])
    with pytest.raises(CourseError, match="no notebook '3': choose from 01_one, 02_two"):
        notebooks.select(["3"], root)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not toml", "cannot be read"),
        (ENTRY.format(name="one"), "Correct the entry 'one'"),
        (ENTRY.format(name="01_one") + "extra = 1\n", "unexpected keyword argument 'extra'"),
    ],
)
def test_wrong_course_list_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    root = make_course(tmp_path / "course")
    (root / "notebooks" / "course.toml").write_text(text)
    with pytest.raises(CourseError, match=says):
        notebooks.course(root)


def test_readme_table_is_written_between_its_comments(tmp_path: Path) -> None:
    root = make_course(tmp_path / "course", nb01_one=[])
    notebooks.update_readme(root)
    text = (root / "README.md").read_text()
    assert text.startswith("# Course\n") and text.endswith("\nAfter.\n") and "old" not in text
    assert "| 01 | [01_one](notebooks/01_one.ipynb) | 1 | beginner | a | p |" in text
    (root / "README.md").write_text("# Course\n")
    with pytest.raises(CourseError, match="no place for its table"):
        notebooks.update_readme(root)


def test_taken_port_is_one_sentence_with_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CourseError, match=f"Port {port} is taken: choose another, for example --port \\d+"):
            notebooks.open_lab(port, browser=False)


def test_lab_serves_this_machine_only_with_a_token_and_writes_nothing_at_home(tmp_path: Path) -> None:
    root = make_course(tmp_path / "course", nb00_start_here=[])
    (home := tmp_path / "home").mkdir()
    run = "import sys; from pathlib import Path; from utils import bootstrap, notebooks; root = Path(sys.argv[1])\n"
    run += "bootstrap.use_course_environment(root)\nnotebooks.open_lab(None, browser=False, root=root)"
    process = subprocess.Popen(
        [sys.executable, "-c", run, str(root)],
        cwd=ROOT,
        env=os.environ | {"HOME": str(home), "USERPROFILE": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout
        address = next(line.strip() for line in process.stdout if "http://" in line)
        base, _, token = address.partition("/lab/tree/notebooks/00_start_here.ipynb?token=")
        assert base.startswith("http://127.0.0.1:") and len(token) >= 32
        # JupyterLab prints its address a moment before it listens.
        assert wait_for(lambda: [c for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"])
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{base}/api/contents", timeout=60)
        with urllib.request.urlopen(f"{base}/api/contents?token={token}", timeout=60) as reply:
            assert {"notebooks", "README.md"} <= {entry["name"] for entry in json.load(reply)["content"]}
        with urllib.request.urlopen(f"{base}/lab?token={token}", timeout=60) as reply:
            page = reply.read().decode()
        assert "@jupyterlab/apputils-extension:announcements" in page and '"news": {"disabled": true}' in page
        listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
        assert set(listening) == {"127.0.0.1"}
    finally:
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert [path for path in home.rglob("*") if path.is_file()] == []
