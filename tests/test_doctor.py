"""`doctor`: everything well is exit 0; each problem is exit 1, one line where it shows and one remedy."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest

from utils import doctor
from utils.models import Models
from utils.offline import CHAT_MODEL, EMBEDDING_MODEL

NAMES = ["python", "platform", "disk", "packages", "settings", "model", "embedder", "milvus", "can start"]


def examine(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], list[str]]:
    """Exit code, what is said about each thing, and the numbered remedies."""
    code = doctor.main()
    shown = capsys.readouterr().out
    found = dict(re.findall(r"^(\S[\w ]{11}) ((?:ok|PROBLEM) .*)$", shown, re.M))
    assert "Traceback" not in shown
    return code, {name.strip(): said for name, said in found.items()}, re.findall(r"^  \d+\. (.*)$", shown, re.M)


@pytest.fixture
def compatible(offline_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline server, used as a compatible one."""
    monkeypatch.setenv("MODEL_PROVIDER", "compatible")
    monkeypatch.setenv("OPENAI_BASE_URL", offline_models.chat.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", offline_models.chat.api_key)
    monkeypatch.setenv("MODEL_ID", CHAT_MODEL)


def test_all_is_well(offline_models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, remedies = examine(capsys)
    assert (code, remedies) == (0, [])
    assert list(found) == NAMES and all(said.startswith("ok ") for said in found.values())
    assert f"agno {version('agno')}" in found["packages"] and "GB free" in found["disk"]
    assert found["settings"].split(maxsplit=1)[1].startswith("provider offline")
    assert f"{CHAT_MODEL} (offline) answers" in found["model"]
    assert f"{EMBEDDING_MODEL} (offline) returns 256 dimensions" in found["embedder"]
    assert f"Milvus Lite {version('milvus-lite')} writes and finds" in found["milvus"]


def test_a_milvus_that_does_not_answer(
    offline_models: Models, closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILVUS_URI", f"http://127.0.0.1:{closed_port}")
    code, found, remedies = examine(capsys)
    assert code == 1
    assert [name for name, said in found.items() if said.startswith("PROBLEM")] == ["milvus"]
    [remedy] = remedies
    assert (
        remedy.startswith(f"milvus: No Milvus answers at http://127.0.0.1:{closed_port}")
        and "remove MILVUS_URI" in remedy
    )


def test_a_provider_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MODEL_PROVIDER", "gemini")
    code, found, remedies = examine(capsys)
    assert code == 1 and list(found) == NAMES, "it goes on after a problem"
    broken = [name for name, said in found.items() if said.startswith("PROBLEM")]
    assert broken == ["settings", "model", "embedder", "milvus"]
    [remedy] = remedies
    assert remedy.startswith("settings: MODEL_PROVIDER is 'gemini'; set it to one of"), "one cause, one remedy"


@pytest.mark.usefixtures("compatible")
def test_a_model_that_the_server_does_not_know_beside_another_problem(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_ID", "gpt-99")
    monkeypatch.setenv("MILVUS_URI", f"http://127.0.0.1:{closed_port}")
    code, found, remedies = examine(capsys)
    assert code == 1 and found["settings"].startswith("ok ")
    assert [remedy.partition(":")[0] for remedy in remedies] == ["model", "milvus"]
    assert f"does not know the model 'gpt-99'; set MODEL_ID to one of: {CHAT_MODEL}, " in remedies[0]


@pytest.mark.usefixtures("compatible")
def test_a_model_that_does_not_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MODEL_ID", EMBEDDING_MODEL)
    code, found, remedies = examine(capsys)
    assert code == 1 and found["embedder"].startswith("ok ") and found["milvus"].startswith("ok ")
    assert remedies == [
        f"model: {EMBEDDING_MODEL} (compatible) does not chat (NotFoundError): set MODEL_ID to a chat model."
    ]
