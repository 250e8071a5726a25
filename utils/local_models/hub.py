"""The hub of models: what a repository holds, and a file from any position on.

The client library does the addresses, tokens and proxies (HF_ENDPOINT, HF_TOKEN, HTTPS_PROXY). Its own download does
not go on with what a killed process left behind (version 2.4.0), so the bytes are read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from utils.local_models.catalog import LocalModelError
from utils.settings import read_values

SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_ID = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)(?:/(?P<path>.+\.gguf))?(?::(?P<quantization>[\w.-]+))?")
_PATIENCE = 5.0  # seconds for the hub to answer at all


class HubError(LocalModelError):
    """The hub cannot be reached, or does not have what was asked for."""


@dataclass(frozen=True)
class HubFile:
    """One model file on the hub, at a fixed revision."""

    repository: str
    revision: str
    path: str
    bytes: int
    sha256: str
    licence: str


def split_id(what: str) -> tuple[str, str, str] | None:
    """Repository, path of the file and quantization of owner/repository[/path.gguf][:quantization], else None."""
    found = _ID.fullmatch(what)
    if not found or found["repository"].lower().endswith(".gguf"):
        return None
    return found["repository"], found["path"] or "", found["quantization"] or ""


def look_up(repository: str, path: str = "", quantization: str = "") -> HubFile:
    """The file that is meant, and what the hub knows of it.

    Raises:
        HubError: nothing answers within a few seconds, there is no such file, or there are several to choose from.
    """
    endpoint, token = _endpoint_and_token()
    with _one_sentence(repository):
        from huggingface_hub import HfApi

        info = HfApi(endpoint=endpoint, token=token).model_info(repository, files_metadata=True, timeout=_PATIENCE)
    names = {one.rfilename: one for one in info.siblings or [] if one.rfilename.lower().endswith(".gguf")}
    files = {name: one for name, one in names.items() if not SPLIT.search(name)}
    exact = rf"(?<![a-z0-9]){re.escape(quantization.lower())}(?![a-z0-9_])" if quantization else ""
    chosen = [name for name in sorted(files) if (name == path if path else re.search(exact, name.lower()))]
    if not chosen:
        there = ", ".join(sorted(names)) or "none at all"
        raise HubError(f"{repository} has no such model in a single GGUF file: choose another (there are: {there}).")
    if len(chosen) > 1:
        raise HubError(
            f"{repository} has several GGUF files: run python3 -m utils model fetch {repository}/FILE with one of "
            f"{', '.join(chosen)}."
        )
    file = files[chosen[0]]
    if file.lfs is None or not info.sha:
        raise HubError(f"The hub states no SHA-256 for {chosen[0]}: download it yourself and give its path.")
    licence = str(getattr(info.card_data, "license", None) or "")
    return HubFile(repository, info.sha, chosen[0], file.lfs.size, file.lfs.sha256, licence)


def read(file: HubFile, start: int) -> Iterator[bytes]:
    """The bytes of a file from a position on.

    Raises:
        HubError: the hub refuses, or the connection breaks off.
    """
    endpoint, token = _endpoint_and_token()
    with _one_sentence(file.repository):
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(file.repository, file.path, revision=file.revision, endpoint=endpoint)
        headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
        with get_session().stream("GET", url, headers=headers, timeout=30) as response:
            hf_raise_for_status(response)
            to_skip = start if response.status_code == 200 else 0  # a server that knows no ranges sends everything
            for chunk in response.iter_bytes():
                yield chunk[to_skip:]
                to_skip = max(0, to_skip - len(chunk))


@contextmanager
def _one_sentence(repository: str) -> Iterator[None]:
    """Turn what the client library raises into a HubError."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before the import, which reads it
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError:
        raise HubError(
            f"The hub gives {repository} only to those who accept its terms: do that on its page, then set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"The hub has no repository {repository}: correct the id, or set HF_TOKEN if it is private."
        ) from None
    except HfHubHTTPError as error:
        raise HubError(
            f"The hub answers with status {error.response.status_code}: try again later (is HF_ENDPOINT right?)."
        ) from None
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"The hub does not answer ({error.__class__.__name__}): check the network and HTTPS_PROXY, then run the "
            "same command again, or download the .gguf file elsewhere and run python3 -m utils model fetch PATH."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise HubError(
            f"{repository} is not a repository's id, or what answers is not the hub: correct the id or HF_ENDPOINT."
        ) from None


def _endpoint_and_token() -> tuple[str | None, str | None]:
    """From the environment or `.env`; None lets the library decide."""
    values = read_values()
    return values.get("HF_ENDPOINT", "").rstrip("/") or None, values.get("HF_TOKEN") or None
