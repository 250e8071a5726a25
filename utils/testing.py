"""The pytest plugin of the suite (named in .pytest.ini, so that it is there for whatever path is tested).

It gives every test and notebook the same surroundings, sets nbval up, says what may run side by side, adds --quick, and
prints the time per notebook.
"""

from __future__ import annotations

import os
import re
import signal
from collections import defaultdict
from pathlib import Path

import pytest

from utils.bootstrap import use_course_environment
from utils.notebooks import offline_environment

# At import: nbval's kernels are started outside every fixture. The developer's own keys and servers stay out.
use_course_environment()
os.environ.update(offline_environment())
# Started in the background (nohup, some CI), the suite would hand its ignored Ctrl-C on to the commands that it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

_seconds: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the notebooks and the tests that run them")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--quick") and collection_path.suffix == ".ipynb":
        return True
    return None


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # nbval's collector of a notebook
        collector.skip_compare += ("stderr", "text/html")


def _group(item: pytest.Item) -> str:
    """What must run in one process, one after the other: a notebook, all that needs Milvus servers, else a file."""
    notebook = re.search(r"\b\d\d_\w+", item.nodeid)
    if notebook and (".ipynb::" in item.nodeid or item.get_closest_marker("notebook_run")):
        return notebook[0]
    return "milvus" if item.path.name.startswith("test_milvus_") else item.path.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        if hasattr(item, "output_timeout"):  # nbval's cell; its own 5 seconds are too few on a busy machine
            item.output_timeout = 30
    if config.getoption("--quick"):
        left_out = [item for item in items if item.get_closest_marker("notebook_run")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if ".ipynb::" in report.nodeid:  # setup of the first cell starts the kernel, so all three phases count
        _seconds[report.nodeid.split("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _seconds:
        terminalreporter.section("seconds per notebook")
        for name, seconds in _seconds.items():
            terminalreporter.line(f"{seconds:7.1f}  {name}")
