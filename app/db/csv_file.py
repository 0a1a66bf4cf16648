"""Reads a CSV file strictly: every defect is an error that names the line, never a guess.

Knows lines, fields and quotes, not what they mean, and never repeats a value in a message. Constant memory.
Called by `app.db.csv_inspection` and `app.db.csv_import`.
"""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from app.ai.domain import Progress
from app.errors import ImportFileError

_DELIMITERS = ",;\t|"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_LINE = 16_777_216
_WORKBOOK = b"PK\x03\x04"  # how a ZIP archive begins
_is_separator_line = re.compile(rb'"?sep=.?"?\s*', re.IGNORECASE).fullmatch


class Record(NamedTuple):
    """One record: the line it starts in, and its fields without surrounding space."""

    line: int
    fields: list[str]


class CsvFile:
    """An open CSV file whose header has been read; `records` may be read again and again."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        first_line = next(self._lines(), "")
        self.delimiter = max(_DELIMITERS, key=lambda mark: _count_fields(first_line, mark))
        header = next(self._parse(), None)
        if header is None:
            raise ImportFileError("line 1: the file is empty; its first line must name the columns")
        self.header = header.fields

    def records(self, stage: str, progress: Progress = lambda *_: None) -> Iterator[Record]:
        """Yields the records below the header, as many fields each; blank lines are skipped.

        `progress` is told the stage, the bytes read and the bytes there are, now and then.

        Raises:
            ImportFileError: bad UTF-8, bad quoting, or another number of fields than the header.
        """
        records = self._parse()
        next(records)
        for number, record in enumerate(records):
            if len(record.fields) != len(self.header):
                counts = f"{len(record.fields)} fields, but the header names {len(self.header)}"
                raise ImportFileError(f"line {record.line}: {counts}")
            if number % 2000 == 0:
                progress(stage, self._file.tell(), self._size)
            yield record
        progress(stage, self._size, self._size)

    def _parse(self) -> Iterator[Record]:
        reader = csv.reader(self._lines(), delimiter=self.delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as exc:
                raise ImportFileError(_explain(str(exc), line, reader.line_num)) from exc
            if fields is None:
                return
            if fields:
                yield Record(line, [field.strip() for field in fields])

    def _lines(self) -> Iterator[str]:
        # Line by line, because a decoder that reads ahead could not tell where a bad byte stands.
        self._file.seek(0)
        number = 0
        while raw := self._file.readline(_LONGEST_LINE):
            number += 1
            text = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
            if number == 1 and text.startswith(_WORKBOOK):
                raise ImportFileError("line 1: this is an Excel workbook; save it as CSV UTF-8")
            if number == 1 and _is_separator_line(text):
                raise ImportFileError("line 1: this is Excel's sep= line, not the header; delete it")
            if len(raw) == _LONGEST_LINE:
                raise ImportFileError(
                    f"line {number}: longer than {_LONGEST_LINE:,} bytes; is this a CSV file?"
                )
            if b"\0" in raw:
                raise ImportFileError(f"line {number}: a NUL character; is this a text file in UTF-8?")
            try:
                yield text.decode()
            except UnicodeDecodeError as exc:
                raise ImportFileError(f"line {number}: not valid UTF-8; save the file as UTF-8") from exc


def _count_fields(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter), []))
    except csv.Error:
        return 0  # parsing the header tells what is wrong with it


def _explain(reason: str, first_line: int, last_line: int) -> str:
    if "unexpected end" in reason:
        return f"line {first_line}: a quote is opened here and never closed"
    if "field limit" in reason:
        longest = csv.field_size_limit()
        return f"line {first_line}: a field is longer than {longest:,} characters; is a quote left open?"
    if "new-line" in reason:
        return (
            f"line {last_line}: a carriage return stands outside quotes; save the file with the line ends of"
            " Windows or Unix, not of the old Macintosh"
        )
    return f"line {last_line}: a closing quote is followed by something else than a separator"


@contextmanager
def open_csv(path: Path) -> Iterator[CsvFile]:
    """Opens the file and reads its header; the separator (comma, semicolon, tab or bar) is the header's.

    Raises:
        ImportFileError: the file cannot be read, is empty, or its header is broken.
    """
    try:
        file, size = path.open("rb"), path.stat().st_size
    except OSError as exc:
        raise ImportFileError(f"the file cannot be read: {exc.strerror}") from exc
    with file:
        yield CsvFile(file, size)
