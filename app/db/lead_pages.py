"""Reads a whole relation page by page in the order of `lead_id`, in the columnar form of the request path.

Each page is one statement and one row, a value for each column, with the cells a request would read, bit for
bit. It starts after the last ID of the page before: nothing is held open between two pages, and a reader can
go on anywhere. That takes an index on `lead_id`, which requests need as well. Called by bulk scoring.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from app.ai.domain import BoolArray, InputColumn, LeadColumns
from app.db.command_connection import open_reader
from app.db.lead_cells import decode_batch, page_statement, split_texts
from app.db.leads import fetch_types, require_columns

PAGE_LEADS = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class LeadPage:
    """`n` leads in the order of their IDs.

    `ids` (n,) are the 16 bytes of each, `repeated` (n,) says whether another row has the same one, and
    `external_refs` (n) are UTF-8, None for NULL and everywhere if the relation has none.
    """

    ids: NDArray[np.void]
    repeated: BoolArray
    external_refs: Sequence[bytes | None]
    leads: LeadColumns

    @property
    def last_id(self) -> UUID:
        """The ID the next page starts after."""
        return UUID(bytes=self.ids[-1].tobytes())


def read_pages(
    url: str,
    relation: str,
    columns: Sequence[InputColumn],
    *,
    after: UUID | None,
    page_leads: int = PAGE_LEADS,
) -> Generator[LeadPage, None, None]:
    """Yields the leads whose ID is larger than `after`, or all of them, about `page_leads` at a time.

    Raises:
        DatabaseUnavailableError: the connection failed.
        CommandError: the relation is not there, lacks one of the columns, or cannot be read.
    """
    with open_reader(url, relation, autocommit=True) as connection:
        # The same session settings as serving.
        connection.execute("SET TimeZone = 'UTC'; SET jit = off")
        types = fetch_types(connection, relation)
        require_columns(relation, types, columns)
        while True:
            statement = page_statement(relation, types, columns, after=after, leads=page_leads)
            with connection.cursor(binary=True) as cursor:
                row = cursor.execute(statement).fetchone()
            if row is None or row[0] is None:
                return
            page = _decode(row, columns)
            yield page
            after = page.last_id


def _decode(row: Sequence[Any], columns: Sequence[InputColumn]) -> LeadPage:
    ids = np.frombuffer(row[0], "V16")
    halves = np.frombuffer(row[0], ">u8").reshape(-1, 2)
    same = (halves[1:] == halves[:-1]).all(axis=1)
    repeated = np.zeros(len(ids), np.bool_)
    repeated[1:] |= same
    repeated[:-1] |= same
    refs = [None] * len(ids) if row[1] is None else split_texts(row[1])
    return LeadPage(ids, repeated, refs, decode_batch(columns, row[2:], len(ids)))
