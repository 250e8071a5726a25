"""The pytest plugin of the suite (named in .pytest.ini, so that it is there for whatever path is tested).

It gives every test and notebook the same surroundings, sets nbval up, says what may run side by side, adds --quick and
--local-model, and prints the time per notebook.
"""

from __future__ import annotations

import os
import re
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

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
    parser.addoption("--local-model", action="store_true", help="run what is about the model, with the small local one")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    left_out = config.getoption("--quick") or config.getoption("--local-model")
    if left_out and collection_path.suffix == ".ipynb":
        return True
    return None


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # nbval's collector of a notebook
        collector.skip_compare += ("stderr", "text/html")


def _group(nodeid: str) -> str:
    """What must run in one process, one after the other: a notebook, all that needs Milvus servers, else a file."""
    notebook = re.match(r"notebooks/(\d\d_\w+)|.*::test_run_again_alone\w*\[(\d\d_\w+)\]", nodeid)
    if notebook:
        return notebook[1] or notebook[2]
    return "milvus" if nodeid.startswith("tests/test_milvus_") else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute the groups to the workers. (xdist 3.8's own --dist loadgroup has no effect with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval's cell; its own 5 seconds are too few on a busy machine
            item.output_timeout = 30
    left_out = [item for item in items if not _is_wanted(item, config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_wanted(item: pytest.Item, config: pytest.Config) -> bool:
    marks = {mark.name for mark in item.iter_markers()}
    if config.getoption("--quick") and "notebook_run" in marks:
        return False
    if config.getoption("--local-model"):
        return bool(marks & {"model_server", "local_model"}) and "extractive" not in marks
    return "local_model" not in marks


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if ".ipynb::" in report.nodeid:  # setup of the first cell starts the kernel, so all three phases count
        _seconds[report.nodeid.split("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _seconds:
        terminalreporter.section("seconds per notebook")
        for name, seconds in _seconds.items():
            terminalreporter.line(f"{seconds:7.1f}  {name}")
