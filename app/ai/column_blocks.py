"""Columns as the database sends them: all numbers in one block, all texts in one string, NULL as a mark.

A feature set is built from blocks, so a batch that comes as blocks in its order goes through untouched; the
columns of anybody else are stacked. Pure.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from app.ai.domain import Column, ColumnKind, FloatArray, InputColumn, LeadColumns

NULL_NUMBER = np.uint64(0x7FF8_0000_0000_0001)
"""The bits that stand for no number: a quiet NaN with a payload. Neither Python's NaN nor PostgreSQL's has
one, so a stored NaN stays apart from NULL."""
NULL_TEXT = b"\xff"
"""Stands for no text: a byte that UTF-8 never has."""


class ColumnBlocks(Mapping[str, Column]):
    """The `a` columns of numbers, then the `b` of text, of `n` leads; a `Column` is made when asked for.

    `numbers` are float64 (a, n), C-contiguous, `texts` (b, n) one string of UTF-8, column after column, in
    which each text ends with a NUL; both have marks for NULL.
    """

    __slots__ = ("inputs", "numbers", "texts")

    def __init__(self, inputs: tuple[InputColumn, ...], numbers: FloatArray, texts: bytes) -> None:
        self.inputs = inputs
        self.numbers = numbers
        self.texts = texts

    def __getitem__(self, name: str) -> Column:
        for row, (found, kind) in enumerate(self.inputs):
            if found == name:
                return self._column(row, kind)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (column.name for column in self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def _column(self, row: int, kind: ColumnKind) -> Column:
        if kind == "text":
            first = (row - len(self.numbers)) * self.numbers.shape[1]
            return text_column(self.texts.split(b"\0")[first : first + self.numbers.shape[1]])
        numbers = self.numbers[row]
        return Column(kind, numbers, numbers.view(np.uint64) != NULL_NUMBER)


def text_column(texts: Sequence[bytes]) -> Column:
    """Returns texts (n,) in UTF-8, with marks for NULL, as a column."""
    present = np.array([text != NULL_TEXT for text in texts], dtype=np.bool_)
    values = np.array(["" if text == NULL_TEXT else decode_text(text) for text in texts], dtype=object)
    return Column("text", values, present)


def encode_text(text: str) -> bytes:
    """Returns a text in UTF-8; one that is no database's may have half a surrogate pair."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(text: bytes) -> str:
    """Undoes `encode_text`."""
    return text.decode("utf-8", "surrogatepass")


def join_texts(texts: Sequence[str]) -> bytes:
    """Returns texts as one string, in which each ends with a NUL.

    Raises:
        ValueError: a text has a NUL in it.
    """
    joined = "\0".join([*texts, ""])
    if joined.count("\0") > len(texts):
        raise ValueError("a text has a NUL in it")
    return encode_text(joined)


def stack_columns(leads: LeadColumns, inputs: tuple[InputColumn, ...]) -> ColumnBlocks:
    """Returns these columns, those of numbers first, as blocks.

    Raises:
        ValueError: a column is absent or of another kind, or a text has a NUL in it.
    """
    if isinstance(leads.columns, ColumnBlocks) and leads.columns.inputs == inputs:
        return leads.columns
    columns = [_find_column(leads, wanted) for wanted in inputs]
    numbers = [column for column in columns if column.kind != "text"]
    block = np.array([column.values for column in numbers], dtype=np.float64).reshape(len(numbers), leads.n)
    absent = ~np.array([column.present for column in numbers], dtype=np.bool_).reshape(block.shape)
    block.view(np.uint64)[absent] = NULL_NUMBER
    texts = [text for column in columns[len(numbers) :] for text in column.values.tolist()]
    return ColumnBlocks(inputs, block, join_texts(texts))


def _find_column(leads: LeadColumns, wanted: InputColumn) -> Column:
    column = leads.columns.get(wanted.name)
    if column is None:
        raise ValueError(f"column {wanted.name!r} is absent")
    if column.kind != wanted.kind:
        raise ValueError(f"column {wanted.name!r} is not a {wanted.kind}")
    return column
