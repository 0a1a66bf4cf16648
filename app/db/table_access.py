"""Gives one table the owner and the grants of another, so that it can take the other's place.

What each role may read or write is the same afterwards, also by column; every grant then comes from the
owner, whoever had made it. Default privileges, which a new table starts with, do not add to it. Called by the
CSV import.
"""

from typing import Any

import psycopg
from psycopg import sql

_GRANTS = """
SELECT DISTINCT acl.privilege_type, granted.attribute, acl.is_grantable,
    CASE WHEN acl.grantee <> 0 THEN pg_get_userbyid(acl.grantee) END
FROM (
    SELECT NULL AS attribute, coalesce(relacl, acldefault('r', relowner)) AS acl
    FROM pg_class WHERE oid = %(table)s::regclass
    UNION ALL
    SELECT attname, attacl FROM pg_attribute WHERE attrelid = %(table)s::regclass AND NOT attisdropped
) granted, aclexplode(granted.acl) acl
"""
_OWNER = "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s::regclass"
_ATTRIBUTES = "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND NOT attisdropped"


def write_access(cursor: psycopg.Cursor[Any], source: sql.Identifier, target: sql.Identifier) -> None:
    """Gives `target` the owner and the grants of `source`, but for those on a column it does not have."""
    old, new = source.as_string(cursor), target.as_string(cursor)
    owner, new_owner = (cursor.execute(_OWNER, [table]).fetchone() for table in (old, new))
    if owner and owner != new_owner:
        cursor.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(target, sql.Identifier(owner[0])))
    for role in {role for *_, role in cursor.execute(_GRANTS, {"table": new})}:
        cursor.execute(sql.SQL("REVOKE ALL ON {} FROM {}").format(target, _grantee(role)))
    attributes = {name for (name,) in cursor.execute(_ATTRIBUTES, [new])}
    for privilege, attribute, grantable, role in cursor.execute(_GRANTS, {"table": old}).fetchall():
        if attribute is None or attribute in attributes:
            column = sql.SQL("({})").format(sql.Identifier(attribute)) if attribute else sql.SQL("")
            statement = sql.SQL("GRANT {}{} ON {} TO {}{}").format(
                sql.SQL(privilege), column, target, _grantee(role),
                sql.SQL(" WITH GRANT OPTION" if grantable else ""),
            )  # fmt: skip
            cursor.execute(statement)


def _grantee(role: str | None) -> sql.Composable:
    return sql.SQL("PUBLIC") if role is None else sql.Identifier(role)
