"""Sends many UUIDs to PostgreSQL as one `uuid[]` parameter, packed by NumPy.

The driver would build an object for each of them first, which takes longer than reading the leads. Called by
`app.db.leads`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

_UUID, _UUID_ARRAY = 2950, 2951  # type numbers, fixed by PostgreSQL
_HEADER = struct.Struct(">iiIii")  # dimensions, has NULLs, element type, length, first index


@dataclass(frozen=True, slots=True)
class UuidArray:
    """UUIDs as text of 8-4-4-4-12 hexadecimal digits."""

    uuids: Sequence[str]


class _UuidArrayDumper(Dumper):
    format = Format.BINARY
    oid = _UUID_ARRAY

    def dump(self, obj: UuidArray) -> Buffer:
        n = len(obj.uuids)
        elements = np.zeros((n, 20), dtype=np.uint8)
        elements[:, 3] = 16  # each element is its length, as four bytes, and the sixteen bytes of the UUID
        digits = "".join(obj.uuids).replace("-", "")
        elements[:, 4:] = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8).reshape(n, 16)
        return _HEADER.pack(1, 0, _UUID, n, 1) + elements.tobytes()


psycopg.adapters.register_dumper(UuidArray, _UuidArrayDumper)
