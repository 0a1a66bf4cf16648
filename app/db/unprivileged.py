"""The user PostgreSQL runs as when we are root, and the right to enter what it needs.

PostgreSQL refuses to run as root. A checkout often lies below a directory that only root may enter; such a
directory gets one entry in its access list that lets this one user pass through, and stays closed to
everybody else. Nothing here ever opens a private directory to others. Used by `app.db.embedded` and
`app.db.postgres_programs`.
"""

import contextlib
import errno
import os
import pwd
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import structlog

from app.errors import CommandError

_NAME = "pgserver"
_ACCESS_LIST = "system.posix_acl_access"
_VERSION, _ENTRY, _NOBODY_ID = 2, struct.Struct("<HHI"), 0xFFFFFFFF
_OWNER, _USER, _GROUP_OWNER, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_SEARCH = 0o1

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SystemUser:
    """A user of the operating system, by numbers."""

    name: str
    uid: int
    gid: int


def find_user(data: Path) -> SystemUser | None:
    """Returns the user PostgreSQL must run as, or None when that is the user we are.

    Root runs it as the owner of the data when there is data already, else as `pgserver`, which is made if
    need be.

    Raises:
        CommandError: the data belong to somebody else and we are not root.
    """
    owner = data.stat().st_uid if data.exists() else None
    if os.geteuid() != 0:
        if owner not in (None, os.geteuid()):
            raise CommandError(
                f"the embedded database in {data} belongs to another user; run as that user, or set VAR_DIR"
            )
        return None
    entry = pwd.getpwuid(owner) if owner else _dedicated_user()
    return SystemUser(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _dedicated_user() -> pwd.struct_passwd:
    """Returns `pgserver`, or `nobody` on systems that cannot make a user."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_NAME)
    make = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _NAME]
    with contextlib.suppress(OSError):
        subprocess.run(make, check=False, capture_output=True)  # noqa: S603 - the answer is looked up below
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_NAME)
    return pwd.getpwnam("nobody")


def open_installation(folder: Path) -> None:
    """Lets everybody read and run PostgreSQL's own programs, which a strict umask may have closed."""
    if (folder / "bin" / "postgres").stat().st_mode & stat.S_IXOTH:
        return
    for path in (folder, *folder.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | 0o444 | (0o111 if mode & stat.S_IXUSR else 0))


def grant_search(path: Path, user: SystemUser) -> None:
    """Lets `user` pass through every directory above `path`.

    Raises:
        CommandError: a directory is closed to the user and its file system keeps no access lists.
    """
    for folder in reversed(path.resolve().parents):
        facts = folder.stat()
        if facts.st_mode & stat.S_IXOTH or facts.st_uid == user.uid:
            continue
        try:
            if _add_entry(folder, facts.st_mode, user.uid):
                _log.info("embedded_database_search_granted", user=user.name, directory=str(folder))
        except OSError as exc:
            raise CommandError(
                f"PostgreSQL does not run as root, and its user {user.name} may not enter {folder}; "
                f"allow it with `chmod o+x {folder}`, or set VAR_DIR or DATABASE_URL"
            ) from exc


def _add_entry(folder: Path, mode: int, uid: int) -> bool:
    """Adds search permission for `uid` to the directory's access list; returns False if it has it already."""
    entries = _read_entries(folder) or {
        (_OWNER, _NOBODY_ID): mode >> 6 & 7,
        (_GROUP_OWNER, _NOBODY_ID): mode >> 3 & 7,
        (_OTHER, _NOBODY_ID): mode & 7,
    }
    mask = entries.get((_MASK, _NOBODY_ID), 7)
    if entries.get((_USER, uid), 0) & mask & _SEARCH:
        return False
    for tag, holder in entries:
        # The mask is about to get wider, which must give nobody else more than they had.
        if tag in (_USER, _GROUP_OWNER, _GROUP):
            entries[tag, holder] &= mask
    entries[_USER, uid] = entries.get((_USER, uid), 0) | _SEARCH
    masked = [bits for (tag, _), bits in entries.items() if tag in (_USER, _GROUP_OWNER, _GROUP)]
    entries[_MASK, _NOBODY_ID] = 0
    for bits in masked:
        entries[_MASK, _NOBODY_ID] |= bits
    packed = b"".join(_ENTRY.pack(tag, bits, holder) for (tag, holder), bits in sorted(entries.items()))
    os.setxattr(folder, _ACCESS_LIST, struct.pack("<I", _VERSION) + packed)
    return True


def _read_entries(folder: Path) -> dict[tuple[int, int], int]:
    """Returns the access list as permission bits by (tag, id), laid out as in Linux's `posix_acl_xattr.h`."""
    if not hasattr(os, "getxattr"):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    try:
        packed = os.getxattr(folder, _ACCESS_LIST)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return {}
        raise
    return {(tag, holder): bits for tag, bits, holder in _ENTRY.iter_unpack(packed[4:])}
