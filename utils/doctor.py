"""What works here, what does not, and the remedy: `python3 -m utils doctor`."""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from openai import OpenAI, OpenAIError
from packaging.requirements import Requirement
from pymilvus import MilvusClient

from utils import lesson, models
from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.settings import load_settings

NEEDED_GB = 1.0


def main() -> int:
    """Examine everything, print a line each, and return 1 if anything needs a remedy, else 0."""
    lesson.quiet_logs()
    remedies: list[str] = []
    for name, examine in EXAMINATIONS:
        try:
            print(f"{name:<12} ok       {examine()}")
        except CourseError as error:
            if not any(remedy.endswith(f": {error}") for remedy in remedies):  # one cause shows in several lines
                remedies.append(f"{name}: {error}")
            print(f"{name:<12} PROBLEM  {error}")
    print()
    if remedies:
        print(f"{len(remedies)} problem{'s' * (len(remedies) > 1)} to solve:")
        print("\n".join(f"  {number}. {remedy}" for number, remedy in enumerate(remedies, 1)))
        return 1
    print("Everything works. Start with: python3 -m utils lab")
    return 0


def _python() -> str:
    return f"{platform.python_version()} at {lesson.show_path(Path(sys.prefix))}"


def _platform() -> str:
    return f"{platform.system()} {platform.machine()}"


def _disk() -> str:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDED_GB:
        raise CourseError(f"only {free:.1f} GB are free: free at least {NEEDED_GB:.0f} GB on the disk of this folder.")
    return f"{free:.0f} GB free"


def _packages() -> str:
    wrong = list(_wrong_packages())
    if wrong:
        raise CourseError(f"{', '.join(wrong)}: delete the folder .venv and run python3 -m utils lab.")
    shown = ("agno", "pymilvus", "milvus-lite", "openai", "jupyterlab", "nbval")
    return ", ".join(f"{name} {version(name)}" for name in shown)


def _wrong_packages() -> Iterator[str]:
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            if version(wanted.name) not in wanted.specifier:
                yield f"{wanted.name} is {version(wanted.name)} instead of {wanted.specifier}"
        except PackageNotFoundError:
            yield f"{wanted.name} is missing"


def _settings() -> str:
    settings = load_settings()
    env_file = ".env read" if (ROOT / ".env").exists() else "no .env file"
    return f"provider {settings.provider}, {env_file}"


def _model() -> str:
    chat = models.connect(load_settings()).chat
    try:
        with OpenAI(base_url=chat.base_url, api_key=chat.api_key, timeout=60) as client:
            reply = client.chat.completions.create(
                model=chat.model_id, messages=[{"role": "user", "content": "Say hello."}]
            )
    except OpenAIError as error:
        raise CourseError(f"{chat} does not chat ({error.__class__.__name__}): set MODEL_ID to a chat model.") from None
    if not reply.choices or not reply.choices[0].message.content:
        raise CourseError(f"{chat} answered without text: choose another model with MODEL_ID.")
    return f"{chat} answers"


def _embedder() -> str:
    found = models.connect(load_settings())
    vector = models.embedder().get_embedding("a test")
    if len(vector) != found.dimensions:
        raise CourseError(
            f"{found.embedding} returned {len(vector)} numbers instead of {found.dimensions}: "
            "choose another with EMBEDDING_ID."
        )
    return f"{found.embedding} returns {found.dimensions} dimensions"


def _milvus() -> str:
    settings = load_settings()
    if not settings.on_lite:
        return f"{lesson.describe_milvus(ROOT, settings)} answers"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "doctor.db"
        client = MilvusClient(str(path))
        client.create_collection("doctor", dimension=2)
        client.insert("doctor", [{"id": 1, "vector": [0.1, 0.9]}])
        hits = client.search("doctor", data=[[0.1, 0.9]], limit=1)[0]
        client.close()
        lesson.close_lite(Path(folder))
    if [hit["id"] for hit in hits] != [1]:
        raise CourseError(
            "Milvus Lite did not find the row just written: delete the folder .venv and run python3 -m utils lab."
        )
    return f"Milvus Lite {version('milvus-lite')} writes and finds"


def _servers() -> str:
    docker = "Docker's command line is here" if shutil.which("docker") else "no Docker (not needed)"
    return f"offline model server, Milvus Lite server; {docker}"


EXAMINATIONS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("python", _python),
    ("platform", _platform),
    ("disk", _disk),
    ("packages", _packages),
    ("settings", _settings),
    ("model", _model),
    ("embedder", _embedder),
    ("milvus", _milvus),
    ("can start", _servers),
)
