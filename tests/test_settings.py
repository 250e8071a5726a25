"""Settings: every variable, which source wins, and an error sentence for everything that cannot be right."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.settings import OPENAI_EMBEDDING, OPENAI_MODEL, PROVIDERS, Settings, SettingsError, load_settings

quick = examples(deadline=None)  # a busy machine is not an error
NO_FILE = Path("no such file")
VARIABLES = ["MODEL_PROVIDER", "OPENAI_API_KEY", "OPENAI_BASE_URL", "MODEL_ID", "EMBEDDING_ID"]
VARIABLES += [
    "LOCAL_CONTEXT",
    "LOCAL_TOOLS",
    "MODEL_FOLDER",
    "OFFLINE_TOKENS_PER_SECOND",
    "MILVUS_URI",
    "MILVUS_TOKEN",
    "AGNO_TELEMETRY",
    "LARGE_DATA",
    "COURSE_DATA",
]
SERVER = "http://localhost:11434/v1"


def read(**variables: str) -> Settings:
    return load_settings(variables, NO_FILE)


def test_nothing_set_is_the_offline_model_and_milvus_lite() -> None:
    assert read() == Settings() == load_settings(dict.fromkeys(VARIABLES, " "), NO_FILE)
    assert (Settings().provider, Settings().milvus_uri, Settings().telemetry) == ("offline", "", False)
    assert Settings().data_folder == ROOT / "data" / "local"


def test_every_variable_arrives(tmp_path: Path) -> None:
    found = read(
        MODEL_PROVIDER=" Compatible ",
        OPENAI_API_KEY="the-key",
        OPENAI_BASE_URL=f"{SERVER}/",
        MODEL_ID="chat",
        EMBEDDING_ID="vectors",
        MILVUS_URI="https://milvus:19530",
        MILVUS_TOKEN="root:Milvus",
        AGNO_TELEMETRY="true",
        LARGE_DATA="Yes",
        COURSE_DATA=str(tmp_path),
    )
    assert found == Settings(
        provider="compatible",
        api_key="the-key",
        base_url=SERVER,
        model_id="chat",
        embedding_id="vectors",
        milvus_uri="https://milvus:19530",
        milvus_token="root:Milvus",
        telemetry=True,
        large_data=True,
        data_folder=tmp_path.resolve(),
    )


def test_the_module_describes_exactly_the_variables_it_reads() -> None:
    from utils import settings

    assert re.findall(r"^    ([A-Z_]+) ", settings.__doc__ or "", re.M) == VARIABLES


@pytest.mark.parametrize(
    ("variables", "provider"),
    [
        ({}, "offline"),
        ({"OPENAI_API_KEY": "k"}, "openai"),
        ({"OPENAI_BASE_URL": SERVER}, "compatible"),
        ({"OPENAI_BASE_URL": SERVER, "OPENAI_API_KEY": "k"}, "compatible"),
        ({"OPENAI_BASE_URL": SERVER, "OPENAI_API_KEY": "k", "MODEL_PROVIDER": "openai"}, "openai"),
        ({"OPENAI_API_KEY": "k", "MODEL_PROVIDER": "OFFLINE"}, "offline"),
    ],
)
def test_provider_follows_from_what_is_set(variables: dict[str, str], provider: str) -> None:
    assert load_settings(variables, NO_FILE).provider == provider


def test_openai_names_its_models_and_the_others_name_none() -> None:
    openai = read(OPENAI_API_KEY="k", OPENAI_BASE_URL=SERVER, MODEL_PROVIDER="openai")
    assert (openai.model_id, openai.embedding_id, openai.base_url) == (OPENAI_MODEL, OPENAI_EMBEDDING, "")
    other = read(OPENAI_API_KEY="k", MODEL_ID="m", EMBEDDING_ID="e")
    assert (other.model_id, other.embedding_id) == ("m", "e")
    compatible = read(OPENAI_BASE_URL=SERVER)
    assert (compatible.model_id, compatible.embedding_id, compatible.api_key) == ("", "", "")
    offline = read(MODEL_PROVIDER="offline", OPENAI_API_KEY="k", OPENAI_BASE_URL=SERVER, MODEL_ID="m", EMBEDDING_ID="e")
    assert offline == Settings(), "the offline model takes nothing that belongs to another server"
    own = {"MODEL_ID": "small", "LOCAL_CONTEXT": "4096", "LOCAL_TOOLS": "native"}
    local = read(MODEL_PROVIDER="local", OPENAI_API_KEY="k", OPENAI_BASE_URL=SERVER, EMBEDDING_ID="e", **own)
    assert local == Settings(provider="local", model_id="small", local_context=4096, local_native_tools=True)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(f"OPENAI_BASE_URL={SERVER}\nMODEL_ID='from file' # note\nexport LARGE_DATA=1\nAGNO_TELEMETRY\n")
    assert load_settings({}, env_file) == read(OPENAI_BASE_URL=SERVER, MODEL_ID="from file", LARGE_DATA="1")
    assert load_settings({"MODEL_ID": "from shell"}, env_file).model_id == "from shell"
    assert load_settings({"OPENAI_BASE_URL": ""}, env_file).provider == "offline", "an empty variable hides the file's"


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILVUS_TOKEN", "from the process")
    assert load_settings(env_file=NO_FILE).milvus_token == "from the process"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_from_a_windows_editor_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("MILVUS_TOKEN=grün\r\nMODEL_PROVIDER=offline\r\n".encode(encoding))
    assert load_settings({}, tmp_path / ".env").milvus_token == "grün"


def test_a_file_that_is_not_utf8_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("MODEL_ID=x".encode("utf-16"))
    with pytest.raises(SettingsError, match=r"^\.env cannot be read .*; save it as UTF-8 text\.$"):
        load_settings({}, tmp_path / ".env")


def test_relative_paths_count_from_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a notebook's working directory is not the command line's
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    found = read(MILVUS_URI="./data/lab.db", COURSE_DATA="elsewhere")
    assert (found.milvus_uri, found.data_folder) == (str(ROOT / "data" / "lab.db"), ROOT / "elsewhere")
    assert read(COURSE_DATA="~/course").data_folder == tmp_path.resolve() / "course"


@pytest.mark.parametrize("value", ["1", "true", "Yes", "on"])
def test_truth(value: str) -> None:
    assert read(AGNO_TELEMETRY=value).telemetry and read(LARGE_DATA=value).large_data


@pytest.mark.parametrize("value", ["", "0", "false", "NO", "off"])
def test_untruth(value: str) -> None:
    assert not read(AGNO_TELEMETRY=value).telemetry and not read(LARGE_DATA=value).large_data


BAD_URLS = ["localhost:19530", "http://", "tcp://h:1", "http://[", "http://h:x", "http://h:99999", "http://h:0"]
BAD_URLS += ["http://a b", "http://℀", "http://.", f"http://{'a' * 300}", "milvus.db/", "/a/path"]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"MODEL_PROVIDER": "gemini"}, ("MODEL_PROVIDER", "gemini", *PROVIDERS)),
        ({"MODEL_PROVIDER": "openai"}, ("MODEL_PROVIDER", "OPENAI_API_KEY", "MODEL_PROVIDER=offline")),
        ({"MODEL_PROVIDER": "compatible", "OPENAI_API_KEY": "k"}, ("MODEL_PROVIDER", "OPENAI_BASE_URL", SERVER)),
        ({"LOCAL_CONTEXT": "1023"}, ("LOCAL_CONTEXT", "1024")),
        ({"LOCAL_TOOLS": "some"}, ("LOCAL_TOOLS", "policy", "native")),
        ({"AGNO_TELEMETRY": "maybe"}, ("AGNO_TELEMETRY", "maybe", "true or false")),
        ({"LARGE_DATA": "2"}, ("LARGE_DATA", "true or false")),
        ({"COURSE_DATA": "a\0b"}, ("COURSE_DATA", "not a path")),
        ({"MILVUS_URI": "a\0.db"}, ("MILVUS_URI", "not a path")),
        *(({"MILVUS_URI": url}, ("MILVUS_URI", "a path ending in .db")) for url in BAD_URLS),
        *(({"OPENAI_BASE_URL": url}, ("OPENAI_BASE_URL", SERVER)) for url in BAD_URLS),
    ],
)
def test_error_names_the_variable_and_what_to_set(variables: dict[str, str], named: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(variables, NO_FILE)
    assert isinstance(error.value, CourseError)
    assert [word for word in named if word not in str(error.value)] == []
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("key", ["schlüssel", "sk-a\nb", "sk-a b", "“sk”"])
def test_a_key_that_cannot_be_one_is_told_without_showing_it(key: str) -> None:
    with pytest.raises(SettingsError) as error:
        read(OPENAI_API_KEY=key)
    assert "OPENAI_API_KEY" in str(error.value) and key not in str(error.value)


@pytest.mark.parametrize(
    ("variable", "better"), [("MILVUS_URI", "MILVUS_TOKEN"), ("OPENAI_BASE_URL", "OPENAI_API_KEY")]
)
def test_a_password_in_a_url_is_refused_without_showing_it(variable: str, better: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings({variable: "http://ana:hunter2@host:1/v1"}, NO_FILE)
    assert variable in str(error.value) and better in str(error.value) and "hunter2" not in str(error.value)


def test_keys_are_not_shown() -> None:
    found = read(OPENAI_API_KEY="secret-one", MILVUS_TOKEN="secret-two")
    assert (found.api_key, found.milvus_token) == ("secret-one", "secret-two")
    assert "secret" not in f"{found} {found!r}"


def test_settings_cannot_be_changed_and_can_be_a_key() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().provider = "openai"  # type: ignore[misc]
    assert {read(): 1}[Settings()] == 1


ANYTHING = st.text(max_size=20)
LIKELY = st.sampled_from(
    ("", *PROVIDERS, "true", "off", SERVER, "http://[::1]:19530", "x.db", "~", "~nobody/x", "http://")
)
VALUE = ANYTHING | LIKELY | st.builds("http://{}".format, ANYTHING) | st.builds("{}.db".format, ANYTHING)


@quick
@given(st.dictionaries(st.sampled_from(VARIABLES) | ANYTHING, VALUE))
def test_whatever_is_set_only_settings_errors_come_out(environment: dict[str, str]) -> None:
    try:
        found = load_settings(environment, NO_FILE)
    except SettingsError as error:
        assert any(name in str(error) for name in VARIABLES)
    else:
        assert found.provider in PROVIDERS
        assert (found.provider == "compatible") == bool(found.base_url)
        assert found.data_folder.is_absolute()


@pytest.fixture(scope="module")
def any_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / ".env"


@quick
@given(content=st.binary(max_size=60) | st.builds("MODEL_ID={}\n".format, ANYTHING).map(str.encode))
def test_whatever_the_file_holds_only_settings_errors_come_out(any_file: Path, content: bytes) -> None:
    any_file.write_bytes(content)
    try:
        assert load_settings({"MODEL_PROVIDER": "offline"}, any_file).provider == "offline"
    except SettingsError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("in_file", [False, True], ids=["variable", ".env"])
def test_path_of_milvus_lite_does_not_trouble_pymilvus(in_file: bool, tmp_path: Path) -> None:
    """pymilvus reads MILVUS_URI, from the environment or .env, while it is imported, and takes no path."""
    package = tmp_path / "utils"
    package.mkdir()
    for name in ("__init__.py", "settings.py", "bootstrap.py", "errors.py"):
        shutil.copy(ROOT / "utils" / name, package / name)
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    if in_file:
        (tmp_path / ".env").write_text("MILVUS_TOKEN=x\nMILVUS_URI='lab.db'\n", encoding="utf-8")
    else:
        environment["MILVUS_URI"] = "lab.db"
    program = "import utils, pymilvus; from utils.settings import load_settings; print(load_settings().milvus_uri)"
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.stdout.strip() == str(tmp_path.resolve() / "lab.db"), ran.stderr
