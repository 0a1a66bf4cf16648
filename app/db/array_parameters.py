"""Packs many IDs as one array parameter in PostgreSQL's binary format.

The driver would build an object for each UUID first, which takes longer than reading the leads. Called by
`app.db.leads`.
"""

import struct
from collections.abc import Sequence

import numpy as np

_UUID, _TEXT = 2950, 25  # type numbers, fixed by PostgreSQL
_HEADER = struct.Struct(">iiIii")  # dimensions, has NULLs, element type, length, first index
_LENGTH = struct.Struct(">i")
_FEW = 8


def pack_uuids(uuids: Sequence[str]) -> bytes:
    """Returns a `uuid[]` of UUIDs in the form 8-4-4-4-12; there is at least one.

    Each element is its length, as four bytes, and the sixteen bytes of the UUID.
    """
    n = len(uuids)
    content = bytes.fromhex("".join(uuids).replace("-", ""))
    header = _HEADER.pack(1, 0, _UUID, n, 1)
    if n <= _FEW:
        length = _LENGTH.pack(16)
        return header + b"".join(length + content[at : at + 16] for at in range(0, len(content), 16))
    elements = np.zeros((n, 20), dtype=np.uint8)
    elements[:, 3] = 16
    elements[:, 4:] = np.frombuffer(content, dtype=np.uint8).reshape(n, 16)
    return header + elements.tobytes()


def pack_texts(texts: Sequence[str]) -> bytes:
    """Returns a `text[]`; there is at least one text, and none has a NUL character."""
    encoded = [text.encode() for text in texts]
    elements = b"".join(_LENGTH.pack(len(text)) + text for text in encoded)
    return _HEADER.pack(1, 0, _TEXT, len(encoded), 1) + elements
