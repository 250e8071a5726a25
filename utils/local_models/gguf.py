"""The beginning of a GGUF file: enough to tell that it is one, and under which licence it says that it stands."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

# The bytes of a value by its type; 8 is a text and 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT = 8


def read_licence(path: Path) -> str:
    """What the file states as `general.license`, or "".

    Raises:
        ValueError: this is not a GGUF file of version 2 or 3.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(24)
        if len(start) < 24 or start[:4] != b"GGUF" or struct.unpack_from("<I", start, 4)[0] not in (2, 3):
            raise ValueError(f"{path.name} is not a GGUF file of version 2 or 3")
        try:
            for _ in range(struct.unpack_from("<Q", start, 16)[0]):
                key, kind = _read_text(file), struct.unpack("<I", file.read(4))[0]
                if key == "general.license" and kind == _TEXT:
                    return _read_text(file)
                if kind == _TEXT:
                    _read_text(file)
                elif kind in _SIZES:
                    file.seek(_SIZES[kind], 1)
                else:  # the first array: the general part, which the licence belongs to, is over
                    break
        except (struct.error, UnicodeDecodeError):
            pass
    return ""


def _read_text(file: BinaryIO) -> str:
    length = struct.unpack("<Q", file.read(8))[0]
    if length > 1 << 20:
        raise struct.error("no text is that long")
    text = file.read(length)
    if len(text) < length:
        raise struct.error("the file ends within a text")
    return text.decode("utf-8")
