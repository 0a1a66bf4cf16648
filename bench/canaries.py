"""Canaries: values nobody could guess, and a search for them in the forms in which data leak.

A form is what a careless line of code makes of a value: upper case, JSON, base64 beside something else, a
hash (an unsalted hash of an e-mail address is still personal). What was compressed is looked at unpacked. For
`prove_personal_data` and `tests/test_personal_data.py`.
"""

import base64
import hashlib
import html
import json
import unicodedata
import urllib.parse
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

_WINDOW = 8
"""Bytes a search begins with; no form of a canary may be shorter."""


def encode(canary: str) -> dict[str, bytes]:
    """Returns the forms a value may leak in."""
    forms = {
        "raw": canary,
        "lower case": canary.lower(),
        "upper case": canary.upper(),
        "NFC": unicodedata.normalize("NFC", canary),
        "NFD": unicodedata.normalize("NFD", canary),
        "JSON": json.dumps(canary)[1:-1],
        "repr": ascii(canary)[1:-1],
        "URL": urllib.parse.quote(canary),
        "URL form": urllib.parse.quote_plus(canary),
        "HTML": html.escape(canary),
        "HTML, numbered": canary.encode("ascii", "xmlcharrefreplace").decode(),
        "reversed": canary[::-1],
    }
    raw = canary.encode()
    encoded = {name: form.encode() for name, form in forms.items()}
    encoded |= {
        "hex": raw.hex().encode(),
        "UTF-16": canary.encode("utf-16-le"),
        "UTF-16, big end first": canary.encode("utf-16-be"),
        "latin-1": canary.encode("latin-1", "replace"),
    }
    for offset in range(3):
        # Without its ends, which depend on what stands beside it.
        encoded[f"base64 at {offset}"] = base64.b64encode(b"\0" * offset + raw)[4:-4]
    for algorithm in ("md5", "sha1", "sha256"):
        encoded[algorithm] = hashlib.new(algorithm, raw).hexdigest().encode()
        # E-mail addresses are customarily lowered before they are hashed.
        encoded[f"{algorithm} of lower case"] = (
            hashlib.new(algorithm, canary.lower().encode()).hexdigest().encode()
        )
    return encoded


class Hit(NamedTuple):
    """Which canary was found, and in which form."""

    canary: str
    form: str


class Scanner:
    """Looks for every form of named canaries at once."""

    def __init__(self, canaries: Mapping[str, str]) -> None:
        forms: dict[bytes, Hit] = {}
        for name, canary in canaries.items():
            for form, needle in encode(canary).items():
                assert len(needle) >= _WINDOW, "a canary must be longer"
                forms.setdefault(needle, Hit(name, form))
        self._by_start: dict[bytes, list[tuple[bytes, Hit]]] = {}
        for needle, hit in forms.items():
            self._by_start.setdefault(needle[:_WINDOW], []).append((needle, hit))
        self._starts = np.unique(np.frombuffer(b"".join(self._by_start), np.uint64))
        self.forms = len(encode("x" * 20)) + 1  # and inflated

    def scan(self, content: bytes) -> set[Hit]:
        """Returns what is in the content, or in what is compressed in it."""
        found: set[Hit] = set()
        for piece in (content, *_inflate(content)):
            for offset in range(_WINDOW):
                whole = (len(piece) - offset) // _WINDOW
                if whole <= 0:
                    continue
                windows = np.frombuffer(piece, np.uint64, whole, offset)
                for index in np.flatnonzero(np.isin(windows, self._starts)).tolist():
                    found |= self._match(piece, offset + index * _WINDOW)
        return found

    def _match(self, piece: bytes, place: int) -> Iterable[Hit]:
        candidates = self._by_start.get(piece[place : place + _WINDOW], ())
        return {hit for needle, hit in candidates if piece.startswith(needle, place)}


def _inflate(content: bytes) -> Iterable[bytes]:
    """Yields what the gzip and zlib streams in the content unpack to."""
    for start in (b"\x1f\x8b\x08", b"\x78\x01", b"\x78\x9c", b"\x78\xda"):
        place = -1
        while (place := content.find(start, place + 1)) >= 0:
            try:
                yield zlib.decompressobj(wbits=47).decompress(content[place:], 64 * 1024 * 1024)
            except zlib.error:
                continue
