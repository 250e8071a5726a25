"""The lab broker: the part of Kafka's protocol that Milvus uses, on one node, with one partition for each topic.

It exists because no package brings a message queue that Milvus can use: librdkafka's mock broker drops the oldest
messages beyond 5 MiB without a word. This one appends every batch to a file of its topic and answers after that, so an
acknowledged message outlives any process, but not a power cut, because it does not wait for the disk. There is one
copy, no retention (files grow until the folder is deleted), no consumer groups, transactions or authentication, and it
listens on loopback only. Production uses Pulsar, Kafka or Woodpecker.

Layouts and numbers are those of the Kafka protocol guide; `VERSIONS` has the versions that are spoken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRODUCE, FETCH, LIST_OFFSETS, METADATA, OFFSET_FETCH, FIND_COORDINATOR, API_VERSIONS = 0, 1, 2, 3, 9, 10, 18
VERSIONS = {
    PRODUCE: (3, 7),
    FETCH: (4, 11),
    LIST_OFFSETS: (1, 1),
    METADATA: (1, 4),
    OFFSET_FETCH: (1, 1),
    FIND_COORDINATOR: (0, 0),
    API_VERSIONS: (0, 3),
}
OFFSET_OUT_OF_RANGE, UNKNOWN_TOPIC, UNSUPPORTED_VERSION = 1, 3, 35
NODE = 1
# A record batch starts with its first offset and the length of what follows; the distance to its last offset is at 23.
BATCH_HEADER = 61


class Reader:
    """Reads the fields of a request one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, kind: str) -> int:
        """The next number: b, h, i or q for 8, 16, 32 or 64 bits."""
        (value,) = struct.unpack_from(">" + kind, self._data, self._at)
        self._at += struct.calcsize(kind)
        return int(value)

    def take(self, length: int) -> bytes:
        """The next bytes; none for a negative length, which means null."""
        start = self._at
        self._at += max(length, 0)
        return self._data[start : self._at]

    def text(self) -> str:
        """The next string."""
        return self.take(self.number("h")).decode()

    def list(self, item: Callable[[], Any]) -> list[Any]:
        """The next array, each item read by `item`."""
        return [item() for _ in range(self.number("i"))]


def number(kind: str, *values: int) -> bytes:
    """Numbers of one kind each, such as `number("hi", 1, 2)`."""
    return struct.pack(">" + kind, *values)


def text(value: str) -> bytes:
    """A string."""
    data = value.encode()
    return number("h", len(data)) + data


def items(values: list[bytes]) -> bytes:
    """An array of what has been encoded already."""
    return number("i", len(values)) + b"".join(values)


class Topic:
    """One partition: a file of record batches, and where each of them starts.

    Attributes:
        end: the offset that the next message gets.
        grown: set when messages came in; readers wait for it.
    """

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        self._first, self._position = array("q"), array("q")
        self._size = self.end = 0
        self.grown = asyncio.Event()
        size = os.fstat(self._file).st_size
        while size - self._size >= BATCH_HEADER:
            offset, length, delta = self._header(os.pread(self._file, BATCH_HEADER, self._size))
            if self._size + length > size:
                break  # the writer was killed in the middle of it, and nobody was told that it is written
            self._add(offset, delta, length)
        os.ftruncate(self._file, self._size)

    def append(self, records: bytes) -> int:
        """Write the batches of a producer with their offsets, and return the first one."""
        first, data = self.end, bytearray(records)
        at = 0
        added: list[tuple[int, int]] = []
        while at < len(data):
            _, length, delta = self._header(bytes(data[at : at + BATCH_HEADER]))
            struct.pack_into(">q", data, at, first + sum(done[0] + 1 for done in added))
            added.append((delta, length))
            at += length
        written = os.pwrite(self._file, data, self._size)
        if written < len(data):  # a full disk: the rest is overwritten by the next attempt
            raise OSError(f"only {written} of {len(data)} bytes were written")
        for delta, length in added:
            self._add(self.end, delta, length)
        self.grown.set()
        self.grown = asyncio.Event()
        return first

    def read(self, offset: int, limit: int) -> bytes:
        """Whole batches from the one with `offset` on: at most `limit` bytes, but one batch in any case."""
        if offset >= self.end:
            return b""
        start = bisect_right(self._first, offset) - 1
        position = self._position[start]
        stop = bisect_right(self._position, position + limit) - 1
        end = self._position[stop] if stop > start else self._end_of(start)
        if position + limit >= self._size:
            end = self._size
        return os.pread(self._file, end - position, position)

    def _end_of(self, index: int) -> int:
        return self._position[index + 1] if index + 1 < len(self._position) else self._size

    def _add(self, offset: int, delta: int, length: int) -> None:
        self._first.append(offset)
        self._position.append(self._size)
        self._size += length
        self.end = offset + delta + 1

    @staticmethod
    def _header(data: bytes) -> tuple[int, int, int]:
        offset, length = struct.unpack_from(">qi", data)
        (delta,) = struct.unpack_from(">i", data, 23)
        return offset, length + 12, delta


class LabBroker:
    """A broker with its files in one folder.

    Attributes:
        address: host:port once `start()` has returned.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._topics: dict[str, Topic] = {}
        self.address = ""

    async def start(self) -> None:
        """Listen on a free loopback port."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in self._folder.glob("*.log"):
            self._topics[file.stem] = Topic(file)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = int(self._server.sockets[0].getsockname()[1])
        self.address = f"127.0.0.1:{self._port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                answer = await self._answer(Reader(await reader.readexactly(size)))
                writer.write(number("i", len(answer)) + answer)
                await writer.drain()
        writer.close()

    async def _answer(self, request: Reader) -> bytes:
        api, version, correlation = request.number("h"), request.number("h"), request.number("i")
        request.take(request.number("h"))  # the client's name
        head = number("i", correlation)
        lowest, highest = VERSIONS.get(api, (0, -1))
        if api == API_VERSIONS:
            return head + self._api_versions(version if version <= highest else -1)
        if not lowest <= version <= highest:
            raise ConnectionError(f"API {api} version {version} is not spoken here")  # as Kafka does: hang up
        if api == FETCH:
            return head + await self._fetch(request, version)
        handlers = {
            PRODUCE: self._produce,
            LIST_OFFSETS: self._list_offsets,
            METADATA: self._metadata,
            OFFSET_FETCH: self._offset_fetch,
            FIND_COORDINATOR: self._find_coordinator,
        }
        return head + handlers[api](request, version)

    def _api_versions(self, version: int) -> bytes:
        known = [number("hhh", api, *versions) for api, versions in VERSIONS.items()]
        if version == 3:  # the compact layout: lengths plus one in a byte, and a zero for "no tagged fields"
            body = bytes([len(known) + 1]) + b"".join(one + b"\0" for one in known)
            return number("h", 0) + body + number("i", 0) + b"\0"
        error = UNSUPPORTED_VERSION if version < 0 else 0
        return number("h", error) + items(known) + (number("i", 0) if version > 0 else b"")

    def _metadata(self, request: Reader, version: int) -> bytes:
        names = request.list(request.text)
        for name in names if version < 4 or request.number("b") else []:
            if name not in self._topics:
                self._topics[name] = Topic(self._folder / f"{name}.log")
        broker = number("i", NODE) + text("127.0.0.1") + number("ih", self._port, -1)
        partition = number("hiiiiii", 0, 0, NODE, 1, NODE, 1, NODE)
        topics = [
            number("h", 0 if name in self._topics else UNKNOWN_TOPIC)
            + text(name)
            + number("b", 0)
            + items([partition] if name in self._topics else [])
            for name in names or self._topics
        ]
        throttle = number("i", 0) if version >= 3 else b""
        cluster = text("lab") if version >= 2 else b""
        return throttle + items([broker]) + cluster + number("i", NODE) + items(topics)

    def _produce(self, request: Reader, version: int) -> bytes:
        request.text()  # transaction
        request.number("h"), request.number("i")  # acknowledgements wanted, time limit

        def partition(topic: Topic | None) -> bytes:
            index = request.number("i")
            records = request.take(request.number("i"))
            first = topic.append(records) if topic else -1
            answer = number("ihqq", index, 0 if topic else UNKNOWN_TOPIC, first, -1)
            return answer + (number("q", 0) if version >= 5 else b"")

        return self._for_topics(request, partition) + number("i", 0)

    async def _fetch(self, request: Reader, version: int) -> bytes:
        request.number("i")  # replica
        wait, _, limit = request.number("i"), request.number("i"), request.number("i")
        request.number("b")  # isolation
        if version >= 7:
            request.number("i"), request.number("i")  # session
        wanted: list[tuple[str, int, int, int]] = []

        def topic() -> None:
            name = request.text()
            for _ in range(request.number("i")):
                index = request.number("i")
                if version >= 9:
                    request.number("i")  # leader epoch
                offset = request.number("q")
                if version >= 5:
                    request.number("q")  # start of the log
                wanted.append((name, index, offset, min(request.number("i"), limit)))

        request.list(topic)
        found = [self._topics.get(name) for name, *_ in wanted]
        if not any(log is None or offset != log.end for log, (_, _, offset, _) in zip(found, wanted, strict=True)):
            waiters = [asyncio.ensure_future(log.grown.wait()) for log in found if log]
            _, late = await asyncio.wait(waiters, timeout=wait / 1000, return_when=asyncio.FIRST_COMPLETED)
            for waiter in late:
                waiter.cancel()
        answers = []
        for log, (name, index, offset, most) in zip(found, wanted, strict=True):
            error = UNKNOWN_TOPIC if log is None else OFFSET_OUT_OF_RANGE if not 0 <= offset <= log.end else 0
            end = log.end if log else -1
            records = log.read(offset, most) if log and not error else b""
            one = number("ihqq", index, error, end, end) + (number("q", 0) if version >= 5 else b"")
            one += number("i", -1) + (number("i", -1) if version >= 11 else b"")  # aborted transactions; other replica
            answers.append(text(name) + items([one + number("i", len(records)) + records]))
        return number("i", 0) + (number("hi", 0, 0) if version >= 7 else b"") + items(answers)

    def _list_offsets(self, request: Reader, version: int) -> bytes:
        request.number("i")  # replica

        def partition(topic: Topic | None) -> bytes:
            index, time = request.number("i"), request.number("q")
            offset = 0 if time == -2 else topic.end if topic else -1  # -2 asks for the first message, -1 for the end
            return number("ihqq", index, 0 if topic else UNKNOWN_TOPIC, -1, offset)

        return self._for_topics(request, partition)

    def _offset_fetch(self, request: Reader, version: int) -> bytes:
        request.text()  # group
        return self._for_topics(
            request, lambda topic: number("iq", request.number("i"), -1) + text("") + number("h", 0)
        )

    def _find_coordinator(self, request: Reader, version: int) -> bytes:
        return number("hi", 0, NODE) + text("127.0.0.1") + number("i", self._port)

    def _for_topics(self, request: Reader, partition: Callable[[Topic | None], bytes]) -> bytes:
        """The answer for an array of topics, each with an array of partitions."""

        def topic() -> bytes:
            name = request.text()
            log = self._topics.get(name)
            return text(name) + items(request.list(lambda: partition(log)))

        return items(request.list(topic))
