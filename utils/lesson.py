"""What every notebook uses besides the libraries it teaches: its folder, the banner, checks, and the end."""

from __future__ import annotations

import logging
import shutil
import textwrap
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from milvus_lite.server_manager import server_manager_instance as lite_servers
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from utils import models
from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.processes import is_alive, owner_mark
from utils.settings import Settings, load_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CheckFailed(CourseError):
    """A check cell found that something is not as it should be."""


class WorkspaceBusy(CourseError):
    """Another running process uses the notebook's folder."""


class MilvusUnreachable(CourseError):
    """The Milvus of MILVUS_URI does not answer or refuses the token."""


def workspace(name: str, fresh: bool = True) -> Path:
    """The folder that a notebook writes to, `data/local/<name>` unless COURSE_DATA says otherwise.

    Args:
        name: the notebook's file name without its ending.
        fresh: empty the folder first, so that a second run starts like the first.

    Raises:
        WorkspaceBusy: the same notebook is open in another kernel, which still uses the folder.
    """
    quiet_logs()
    folder = load_settings().data_folder / name
    lock = folder.with_suffix(".lock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    holder = lock.read_text(encoding="ascii", errors="replace") if lock.exists() else ""
    if holder and holder != owner_mark() and is_alive(holder):
        raise WorkspaceBusy(
            f"{name} is in use by process {holder.partition(':')[0]}: if that is another kernel, shut it down in "
            "JupyterLab's 'Running Terminals and Kernels' panel; if it is a command, let it end; then try again."
        )
    lock.write_text(owner_mark(), encoding="ascii")
    if fresh and folder.exists():
        close_lite(folder)
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    return folder


def close_lite(folder: Path) -> None:
    """Close every Milvus Lite database below `folder` that this process has open, so that its files may be removed."""
    for path in [path for path in lite_servers._servers if Path(path).resolve().is_relative_to(folder.resolve())]:
        lite_servers.release_server(path)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def quiet_logs() -> None:
    """Keep the libraries' log lines out of the cells; their exceptions are raised all the same."""
    # pymilvus logs the whole traceback of every error that it raises, and gRPC that of every call that Lite does not
    # have.
    for name in ("pymilvus", "grpc", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Agno logs every search and, in colour, every failed run; the cells look at run.status instead. It sets its level
    # anew on every run, so a filter it is.
    for name in ("agno", "agno-team", "agno-workflow"):
        logging.getLogger(name).addFilter(_nothing)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    pd.set_option("display.max_colwidth", None, "display.width", 120, "display.show_dimensions", False)


def milvus_uri(folder: Path, settings: Settings | None = None) -> str:
    """The Milvus to use: that of MILVUS_URI, else a Milvus Lite file in `folder`."""
    return (settings or load_settings()).milvus_uri or str(folder / "milvus.db")


def describe_milvus(folder: Path, settings: Settings | None = None) -> str:
    """Kind and version of the Milvus in use, asked from the server itself.

    Raises:
        MilvusUnreachable: nothing answers at MILVUS_URI, or the token is refused.
    """
    settings = settings or load_settings()
    if settings.on_lite:
        return (
            f"Milvus Lite {version('milvus-lite')}, in this process, at {show_path(Path(milvus_uri(folder, settings)))}"
        )
    try:
        client = MilvusClient(settings.milvus_uri, token=settings.milvus_token, timeout=10)
        found = client.get_server_version()
        client.close()
    except MilvusException:
        raise MilvusUnreachable(
            f"No Milvus answers at {settings.milvus_uri} (or it refuses MILVUS_TOKEN): start the server, "
            "correct MILVUS_URI and MILVUS_TOKEN, or remove MILVUS_URI to use Milvus Lite."
        ) from None
    # The server in the pip package calls itself "v2.3.5-lite" and is a server all the same.
    return f"Milvus server {found.removeprefix('v').removesuffix('-lite')} at {settings.milvus_uri}"


def show_path(path: Path) -> str:
    """A path as seen from the repository's folder, with forward slashes; a path outside of it by its last two parts."""
    path = path.resolve()
    inside = path.is_relative_to(ROOT)
    return path.relative_to(ROOT).as_posix() if inside else f".../{path.parent.name}/{path.name}"


def show_setup(folder: Path, always_lite: bool = False, own_milvus: bool = False) -> None:
    """Print the banner: which model, which embedder and which Milvus answer in this notebook.

    Args:
        folder: the notebook's `workspace`.
        always_lite: the notebook uses Milvus Lite even if MILVUS_URI names a server.
        own_milvus: the notebook starts a Milvus of its own.

    Raises:
        CourseError: one of them does not answer; the sentence says what to do.
    """
    settings = load_settings()
    found = models.connect(settings)
    print(f"model     {found.chat}")
    if speed := models.model_speed(settings):
        print(
            f"          {speed.first_token_seconds:.1f} s to the first token of a short prompt, then "
            f"{speed.tokens_per_second:.0f} tokens/s; prompts at {speed.prompt_tokens_per_second:.0f} tokens/s"
        )
    print(f"embedder  {found.embedding}, {found.dimensions} dimensions")
    if own_milvus:
        print("milvus    a server of its own, which a cell below starts")
    else:
        print(f"milvus    {describe_milvus(folder, replace(settings, milvus_uri='') if always_lite else settings)}")
    if (always_lite or own_milvus) and settings.milvus_uri:
        print("          This notebook does not use MILVUS_URI; `ask` and other notebooks do.")
    if found.chat.provider == "offline":
        print(f"          The offline model is {models.EXTRACTIVE}.")


def show_text(text: str, width: int = 100) -> None:
    """Print a text, its long lines broken between words."""
    for line in text.splitlines():
        print(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False))


def show_figure(figure: Figure, alt: str) -> None:
    """Draw a figure where the cell's output is, with a text for those who cannot see it."""
    import matplotlib.pyplot as plt  # here, for services and commands import this module, too, and draw nothing
    from IPython.display import display

    figure.tight_layout()
    plt.close(figure)  # else the kernel draws it once more, without the text
    display(figure, metadata={"image/png": {"alt": alt}})  # type: ignore[no-untyped-call]


def check(what: str, condition: object, otherwise: str) -> None:
    """Print that `what` holds, or stop with what to do.

    Args:
        what: the claim, in the words that are printed.
        condition: whether it holds.
        otherwise: what to do if it does not.

    Raises:
        CheckFailed: the condition does not hold.
    """
    if not condition:
        raise CheckFailed(f"not true: {what}. {otherwise}")
    print(f"check passed: {what}")


def finish(folder: Path) -> None:
    """End what the notebook started: the offline server, and Milvus Lite in the notebook's folder."""
    models.stop_offline()
    close_lite(folder)
    folder.with_suffix(".lock").unlink(missing_ok=True)
    print("Servers stopped.")
