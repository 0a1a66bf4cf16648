"""Packs many IDs as one array parameter in PostgreSQL's binary format.

The driver would build an object for each UUID first, which takes longer than reading the leads, and call
a few functions for each text. Called by `app.db.leads` and `app.db.ai_events`.
"""

import struct
from collections.abc import Sequence
from itertools import chain

import numpy as np

_UUID, _TEXT = 2950, 25  # type numbers, fixed by PostgreSQL
_HEADER = struct.Struct(">iiIii")  # dimensions, has NULLs, element type, length, first index
_LENGTH = struct.Struct(">i")
_FEW = 8

UUID_BYTES = 16


def join_uuids(uuids: Sequence[str]) -> bytes:
    """Returns UUIDs in the form 8-4-4-4-12 as PostgreSQL has them, sixteen bytes each."""
    return bytes.fromhex("".join(uuids).replace("-", ""))


def pack_uuids(content: bytes) -> bytes:
    """Returns a `uuid[]` of joined UUIDs; there is at least one.

    Each element is its length, as four bytes, and the sixteen bytes of the UUID.
    """
    n = len(content) // UUID_BYTES
    header = _HEADER.pack(1, 0, _UUID, n, 1)
    if n <= _FEW:
        length = _LENGTH.pack(16)
        return header + b"".join(length + content[at : at + 16] for at in range(0, len(content), 16))
    elements = np.zeros((n, 20), dtype=np.uint8)
    elements[:, 3] = 16
    elements[:, 4:] = np.frombuffer(content, dtype=np.uint8).reshape(n, 16)
    return header + elements.tobytes()


def pack_texts(texts: Sequence[str | None]) -> bytes:
    """Returns a `text[]`, of texts without a NUL character, or None for NULL."""
    encoded = [b"" if text is None else text.encode() for text in texts]
    lengths = [-1 if text is None else len(content) for text, content in zip(texts, encoded, strict=True)]
    elements = chain.from_iterable(zip(map(_LENGTH.pack, lengths), encoded, strict=True))
    return _HEADER.pack(1, None in texts, _TEXT, len(encoded), 1) + b"".join(elements)
