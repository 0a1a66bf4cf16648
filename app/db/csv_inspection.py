"""The first reading of a CSV file of leads: checks every line, and finds names, types, IDs and label.

After it nothing in the file can make the copying fail. Touches no database. Called by `app.db.csv_import`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.ai.domain import LEAD_ID_PATTERN, ColumnKind, Progress, canonical_lead_id
from app.db.csv_columns import TypeGuess, build_names, could_be_header, read_label
from app.db.csv_file import CsvFile, Record
from app.db.csv_hints import TextHints
from app.errors import ImportFileError

_is_askable = re.compile(LEAD_ID_PATTERN).fullmatch  # what a scoring request can carry
_LONGEST_ID = 500


@dataclass(slots=True)
class Inspection:
    """What the first reading found; `names`, `guesses` and `hints` have an entry for each column."""

    names: list[str]
    id_at: int
    label_at: int | None
    positive: str | None
    placeholders: frozenset[str]
    guesses: list[TypeGuess]
    hints: list[TextHints]
    rows: int = 0
    unaskable_ids: int = 0
    outcomes: set[str] = field(default_factory=set)
    line_of_id: dict[str, int] = field(default_factory=dict)

    def kind(self, at: int) -> ColumnKind:
        """Returns the type of the column at this place."""
        return "boolean" if at == self.label_at else self.guesses[at].kind

    def read_label(self, value: str) -> bool | None:
        """Returns the outcome a label stands for, or None."""
        return read_label(value) if self.positive is None else value.casefold() == self.positive

    def write_label(self, value: str) -> str:
        """Returns the outcome a label stands for, as it is written for COPY."""
        return "t" if self.read_label(value) else "f"


def inspect_csv(
    file: CsvFile,
    *,
    id_column: str,
    label_column: str | None,
    positive: str | None,
    missing: Sequence[str],
    progress: Progress,
) -> Inspection:
    """Reads the whole file; `missing` are texts that mean missing, beside the empty one.

    `positive` is the label that means yes, in any case; whatever else there is must then be one and the same.

    Raises:
        ImportFileError: a line is broken, an ID missing or used twice, a label neither yes nor no, or a
            column not there.
    """
    id_at = _find(file.header, id_column)
    label_at = None if label_column is None else _find(file.header, label_column)
    if id_at == label_at:
        raise ImportFileError("line 1: the id column cannot be the label as well")
    names = build_names(file.header, taken={"lead_id", "external_ref"})
    found = Inspection(
        names,
        id_at,
        label_at,
        None if positive is None else positive.strip().casefold(),
        frozenset(missing) | {""},
        [TypeGuess() for _ in names],
        [TextHints() for _ in names],
    )
    for record in file.records("check", progress):
        _take(found, record)
    if not found.rows:
        raise ImportFileError("line 1: the file has a header but no leads")
    if found.positive is not None and found.positive not in found.outcomes:
        raise ImportFileError(f"no lead has the label {positive!r}, which was to mean yes")
    return found


def _find(header: Sequence[str], wanted: str) -> int:
    """Returns the place of a column, named as in the file or as it will be named in the table."""
    matches = [at for at, name in enumerate(header) if name == wanted.strip()]
    matches = matches or [at for at, name in enumerate(build_names(header)) if name == wanted]
    if len(matches) != 1:
        problem = "more than one column is" if matches else "no column is"
        raise ImportFileError(f"line 1: {problem} called {wanted!r}; {_describe_header(header)}")
    return matches[0]


def _describe_header(header: Sequence[str]) -> str:
    # The first line of a file without a header is a lead, and what is personal stays in the file.
    if all(map(could_be_header, filter(None, header))):
        return f"the header names {' '.join(', '.join(header).split())[:500]}"
    return f"there are {len(header)} columns, and the first line does not look like their names"


def _take(found: Inspection, record: Record) -> None:
    found.rows += 1
    _check_id(found, record)
    if found.label_at is not None:
        _check_label(found, record, found.label_at)
    for guess, hints, value in zip(found.guesses, found.hints, record.fields, strict=True):
        if value not in found.placeholders:
            guess.see(value)
            if guess.is_word:
                hints.see(value, record.line)


def _check_label(found: Inspection, record: Record, at: int) -> None:
    label, where = record.fields[at], f"line {record.line}: the label in {found.names[at]}"
    if label in found.placeholders:
        return
    if found.read_label(label) is None:
        raise ImportFileError(
            f"{where} is none of yes/no, true/false, y/n, t/f, 1/0; name the word that means yes with"
            " --positive, or one that means not known with --missing"
        )
    if found.positive is not None:
        found.outcomes.add(label.casefold())
        if len(found.outcomes - {found.positive}) > 1:
            raise ImportFileError(
                f"{where} is a second word beside {found.positive!r}; name those that mean not known with"
                " --missing"
            )


def _check_id(found: Inspection, record: Record) -> None:
    lead_id = record.fields[found.id_at]
    if lead_id in found.placeholders:
        raise ImportFileError(f"line {record.line}: the id is missing")
    if len(lead_id) > _LONGEST_ID:
        raise ImportFileError(f"line {record.line}: the id is longer than {_LONGEST_ID} characters")
    first = found.line_of_id.setdefault(canonical_lead_id(lead_id), record.line)
    if first != record.line:
        raise ImportFileError(f"line {record.line}: the id is the same as in line {first}")
    found.unaskable_ids += _is_askable(lead_id) is None
