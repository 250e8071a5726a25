"""Fixtures for several test modules. What all tests and notebooks share is in utils/testing.py."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from utils.bootstrap import ROOT

if TYPE_CHECKING:
    import openai

    from utils.milvus_lab.distributed import Cluster
    from utils.milvus_lab.lite import LiteServer
    from utils.milvus_lab.servers import ServerLab
    from utils.models import Models
    from utils.offline import OfflineServer


def make_wheel(folder: Path, name: str, version: str, code: str) -> None:
    """Write the smallest wheel that pip installs: one module."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/RECORD,,\n")


def make_project(root: Path) -> Path:
    """A course in small: the real bootstrap files, one tiny requirement, and a `doctor` that shows where it runs."""
    (root / "utils").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "bootstrap.py", "errors.py"):
        shutil.copy(ROOT / "utils" / name, root / "utils" / name)
    (root / "utils" / "constraints.txt").write_text("tiny==1.0\n")
    (root / "requirements.txt").write_text("tiny\n")
    (root / "utils" / "doctor.py").write_text(
        "import sys, time\nfrom utils.errors import CourseError\n\n"
        "def main():\n    print('doctor in', sys.prefix, flush=True)\n"
        "    if (p := __import__('os').environ.get('DOCTOR')) == 'sleep':\n        time.sleep(60)\n"
        "    if p == 'error':\n        raise CourseError('Do this first.')\n    return 7\n"
    )
    return root


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels that takes the registry's place."""
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, "tiny", "1.0", "VERSION = 1\n")
    make_wheel(folder, "tiny", "2.0", "VERSION = 2\n")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a real file system of a few megabytes; skips where that is not allowed."""
    mounted: list[Path] = []

    def make(megabytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("a small file system can be made by root on Linux only")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def offline_models() -> Models:
    """The endpoints of the offline server that this process shares; started by the first test that asks for it."""
    from utils import models  # here, so that tests which need no model do not wait for these libraries
    from utils.settings import Settings

    return models.connect(Settings())


@pytest.fixture
def closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def course_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for what lesson.workspace() makes."""
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "course-data"))
    return (tmp_path / "course-data").resolve()


@pytest.fixture(scope="session")
def start_server(request: pytest.FixtureRequest) -> Callable[..., OfflineServer]:
    """Starts a model server with the engine under test: the extractive one, or with --local-model a language model."""
    from utils import local_models, offline

    if not request.config.getoption("--local-model"):
        return offline.start
    return partial(offline.start, model=offline.LanguageModelFile(local_models.find("small").path))


@pytest.fixture(scope="session")
def offline_server(
    start_server: Callable[..., OfflineServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OfflineServer]:
    """A model server of its own log file, one for all tests of its protocol."""
    with start_server(tmp_path_factory.mktemp("offline") / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def client(offline_server: OfflineServer) -> Iterator[openai.OpenAI]:
    """The official client, as a program would make it, but without retries."""
    import openai

    with openai.OpenAI(
        base_url=offline_server.base_url, api_key=offline_server.api_key, max_retries=0, timeout=300
    ) as made:
        yield made


def _skip_without_server() -> None:
    from utils.milvus_lab.programs import LabError, require_server

    try:
        require_server()
    except LabError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def milvus_standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerLab]:
    """A real Milvus Standalone (ready in 5 s), one for all tests: use collection names of your own."""
    from utils.milvus_lab import standalone

    _skip_without_server()
    with standalone(tmp_path_factory.mktemp("standalone")) as lab:
        yield lab


@pytest.fixture(scope="session")
def milvus_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Milvus Distributed with two query nodes (ready in 6 s), one for all tests; leave two nodes behind."""
    from utils.milvus_lab import cluster

    _skip_without_server()
    with cluster(tmp_path_factory.mktemp("cluster")) as lab:
        yield lab


@pytest.fixture(scope="session")
def milvus_lite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteServer]:
    """Milvus Lite as a server (ready in 1 s), one for all tests: use collection names of your own."""
    from utils.milvus_lab import lite_server

    with lite_server(tmp_path_factory.mktemp("lite")) as lab:
        yield lab


@pytest.fixture(scope="session")
def offline_environment(offline_server: OfflineServer) -> dict[str, str]:
    """The settings with which a service uses the offline server that all tests share."""
    return model_environment(offline_server)


def model_environment(server: OfflineServer) -> dict[str, str]:
    """The settings with which a service uses an offline server as if it were any OpenAI-compatible one."""
    from utils.offline import EMBEDDING_MODEL

    return {
        "MODEL_PROVIDER": "compatible",
        "OPENAI_BASE_URL": server.base_url,
        "OPENAI_API_KEY": server.api_key,
        "MODEL_ID": server.model,
        "EMBEDDING_ID": EMBEDDING_MODEL,
    }
