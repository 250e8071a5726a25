"""Settings: environment variables and a `.env` file in the repository's folder become one frozen `Settings` object.

    MODEL_PROVIDER    openai, compatible, local or offline (default: openai if OPENAI_API_KEY is set, compatible if
                      OPENAI_BASE_URL is set, else offline)
    OPENAI_API_KEY    the key of OpenAI or of the compatible server
    OPENAI_BASE_URL   URL of an OpenAI-compatible server, ending in /v1
    MODEL_ID          chat model (default: openai: gpt-5.4-mini; compatible: the only model that the server lists;
                      local: the larger of those that python3 -m utils model fetch brought; also a GGUF file's path)
    EMBEDDING_ID      embedding model (default: openai: text-embedding-3-small; compatible: the offline embedder)
    LOCAL_CONTEXT     tokens that one request to the local model may have, its reply included (default: 8192)
    LOCAL_TOOLS       policy: the local model writes a tool call when the policy finds one due; native: it decides by
                      itself, for larger models that do this well (default: policy)
    MODEL_FOLDER      folder for fetched models (default: the user's cache folder)
    OFFLINE_TOKENS_PER_SECOND  slows the offline model down to the pace of another one (default: 0, at once)
    MILVUS_URI        http://host:19530 of a server, or a path ending in .db for Milvus Lite (default: Milvus Lite in
                      the notebook's own folder)
    MILVUS_TOKEN      user:password or API key of that server
    AGNO_TELEMETRY    true lets Agno report runs to its makers (default: false)
    LARGE_DATA        true uses the large data sets (default: false)
    COURSE_DATA       folder for what notebooks write (default: data/local)

A variable of the environment wins over the same one in `.env`. A relative path counts from the repository's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

from utils.bootstrap import ROOT
from utils.errors import CourseError

PROVIDERS = ("openai", "compatible", "local", "offline")
# The one place that names OpenAI's models. gpt-5.4-mini is what Agno 3.1.10 itself defaults to.
OPENAI_MODEL = "gpt-5.4-mini"
OPENAI_EMBEDDING = "text-embedding-3-small"


class SettingsError(CourseError):
    """A setting is missing or wrong."""


@dataclass(frozen=True)
class Settings:
    """What the learner chose. Keys and tokens are kept out of `repr`.

    Attributes:
        provider: "openai", "compatible", "local" or "offline".
        api_key: OpenAI's key, or that of the compatible server ("" if it needs none).
        base_url: of the compatible server, without a final slash; "" otherwise.
        model_id: chat model; "" means the compatible server's only model, or the largest fetched one.
        embedding_id: embedding model; "" means the offline embedder.
        milvus_uri: server URI or Lite path; "" means Lite in the notebook's own folder.
        milvus_token: credentials for the server; "" for none.
        local_context: tokens that one request to the local model may have.
        local_native_tools: whether the local model decides by itself when it calls a tool.
        offline_tokens_per_second: pace of the offline model; 0 for at once.
        telemetry: whether Agno may report runs.
        large_data: whether notebooks use their large data sets.
        data_folder: where notebooks write.
    """

    provider: str = "offline"
    api_key: str = field(default="", repr=False)
    base_url: str = ""
    model_id: str = ""
    embedding_id: str = ""
    milvus_uri: str = ""
    milvus_token: str = field(default="", repr=False)
    local_context: int = 8192
    local_native_tools: bool = False
    offline_tokens_per_second: int = 0
    telemetry: bool = False
    large_data: bool = False
    data_folder: Path = ROOT / "data" / "local"

    @property
    def on_lite(self) -> bool:
        """Whether Milvus is Milvus Lite and not a server."""
        return not self.milvus_uri or self.milvus_uri.endswith(".db")


def load_settings(environment: Mapping[str, str] | None = None, env_file: Path | None = None) -> Settings:
    """Read the settings.

    Args:
        environment: variables to read instead of `os.environ`.
        env_file: file to read instead of `.env` in the repository's folder; it may be absent.

    Raises:
        SettingsError: a value is unknown or a needed one is missing; the message names the variable and what to set.
    """
    values = read_values(environment, env_file)
    key, url = values.get("OPENAI_API_KEY", ""), values.get("OPENAI_BASE_URL", "").rstrip("/")
    provider = values.get("MODEL_PROVIDER", "").lower() or ("compatible" if url else "openai" if key else "offline")
    if provider not in PROVIDERS:
        raise SettingsError(
            f"MODEL_PROVIDER is '{provider}'; set it to one of {', '.join(PROVIDERS)}, "
            "or leave it out for the offline model."
        )
    if provider == "openai" and not key:
        raise SettingsError(
            "MODEL_PROVIDER is openai but OPENAI_API_KEY is not set; put the key into .env, "
            "or set MODEL_PROVIDER=offline to work without one."
        )
    if provider == "compatible":
        if not url:
            raise SettingsError(
                "MODEL_PROVIDER is compatible but OPENAI_BASE_URL is not set; set it to the server's URL, "
                "for example http://localhost:11434/v1."
            )
        _check_url("OPENAI_BASE_URL", url)
    if provider in ("openai", "compatible") and not (key.isascii() and key.isprintable() and " " not in key):
        raise SettingsError("OPENAI_API_KEY holds a character that no key has; copy the key again.")
    uri = values.get("MILVUS_URI") or values.get("MILVUS_LITE_PATH", "")  # the latter is set by utils/__init__.py
    if uri.endswith(".db"):
        uri = str(read_path("MILVUS_URI", uri))
    elif uri:
        _check_url("MILVUS_URI", uri)
    # The offline provider has a key and models of its own; what is set for another one does not concern it. The local
    # one has a chat model to choose.
    chosen = {} if provider == "offline" else values
    openai, local = provider == "openai", provider == "local"
    tools = values.get("LOCAL_TOOLS", "") or "policy"
    if tools not in ("policy", "native"):
        raise SettingsError(f"LOCAL_TOOLS is '{tools}'; set it to policy or native.")
    return Settings(
        provider=provider,
        api_key="" if local else chosen.get("OPENAI_API_KEY", ""),
        base_url=url if provider == "compatible" else "",
        model_id=chosen.get("MODEL_ID") or (OPENAI_MODEL if openai else ""),
        embedding_id=("" if local else chosen.get("EMBEDDING_ID", "")) or (OPENAI_EMBEDDING if openai else ""),
        milvus_uri=uri,
        milvus_token=values.get("MILVUS_TOKEN", ""),
        local_context=read_number(values, "LOCAL_CONTEXT", 8192, 1024, 1_000_000),
        local_native_tools=tools == "native",
        offline_tokens_per_second=read_number(values, "OFFLINE_TOKENS_PER_SECOND", 0, 0, 100_000),
        telemetry=read_truth(values, "AGNO_TELEMETRY"),
        large_data=read_truth(values, "LARGE_DATA"),
        data_folder=read_path("COURSE_DATA", values.get("COURSE_DATA", "") or "data/local"),
    )


def read_values(environment: Mapping[str, str] | None = None, env_file: Path | None = None) -> dict[str, str]:
    """The variables of the environment and of `.env`, stripped; arguments and errors as above."""
    try:
        # The encoding without the mark that Windows editors put before the first variable.
        found = dotenv_values(env_file or ROOT / ".env", encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read ({error.__class__.__name__}); save it as UTF-8 text.") from None
    from_file = {k: v for k, v in found.items() if v is not None}
    return {k: v.strip() for k, v in {**from_file, **(os.environ if environment is None else environment)}.items()}


def _check_url(name: str, value: str) -> None:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.port != 0 and value.isprintable() and " " not in value
        usable = usable and bool((parts.hostname or "").encode("idna"))
    except ValueError:  # not a number after the colon, an unclosed bracket, no name of a computer
        usable = False
    if not usable:
        allowed = (
            "a URL such as http://localhost:19530 or a path ending in .db"
            if name == "MILVUS_URI"
            else "a URL such as http://localhost:11434/v1"
        )
        raise SettingsError(f"{name} is '{value}', which is not {allowed}.")
    if "@" in parts.netloc:
        better = "MILVUS_TOKEN" if name == "MILVUS_URI" else "OPENAI_API_KEY"
        raise SettingsError(f"{name} holds a user or password, which would be shown; put it into {better} instead.")


def read_path(name: str, value: str) -> Path:
    """A path as seen from the repository's folder, so that notebooks and the command line mean the same one."""
    try:
        return (ROOT / os.path.expanduser(value)).resolve()
    except (OSError, ValueError, RuntimeError):
        raise SettingsError(f"{name} is {value!r}, which is not a path.") from None


def read_number(values: Mapping[str, str], name: str, default: int, lowest: int, highest: int) -> int:
    """A variable as a whole number between two bounds, which both belong to it."""
    value = values.get(name, "")
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None if value else default
    if number is None or not lowest <= number <= highest:
        raise SettingsError(f"{name} is '{value}'; set it to a whole number from {lowest} to {highest}.")
    return number


def read_truth(values: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes; no by default."""
    value = values.get(name, "").lower()
    if value not in ("", "0", "1", "true", "false", "yes", "no", "on", "off"):
        raise SettingsError(f"{name} is '{value}'; set it to true or false.")
    return value in ("1", "true", "yes", "on")
