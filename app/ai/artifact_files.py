"""The models directory on disk: what lies in it, and reading one file of it without being fooled.

A file is opened relative to the directory, never through a link, and only if it is a regular file with one
name that no stranger owns or can write; it is read once, into memory. Never interprets what it read, never
follows a path. Called by `model_catalogue`, for manifests, signatures, artifacts and model cards alike.
"""

import errno
import hashlib
import hmac
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from app.ai.model_manifest import (
    MANIFEST_SUFFIX,
    MAX_MANIFEST_BYTES,
    SIGNATURE_SUFFIX,
    CardForm,
    ModelManifest,
    build_card_name,
    build_signature_name,
    parse_stem,
)
from app.ai.model_signature import MAX_SIGNATURE_BYTES
from app.errors import ArtifactError

MAX_CARD_BYTES = 2 * 1024 * 1024
_ARTIFACT_SUFFIXES = (".skops", ".joblib")
# O_NONBLOCK: opening a FIFO that nobody writes to would otherwise wait for ever.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

FileIdentity = tuple[int, ...]
"""Changes whenever a file is written, replaced, linked or given other permissions."""


@dataclass(frozen=True, slots=True)
class FoundArtifact:
    """One model in the directory, by its file names alone.

    `manifest_name` and `artifact_name` are None where there is no such file; one of them is there. `identity`
    is that of all its files together and of the directory's owner: what was found out about the artifact
    holds for as long as it stays the same. `has_signature` and `has_card` tell what else lies beside the
    manifest.
    """

    version: str
    model_type: str
    manifest_name: str | None
    artifact_name: str | None
    identity: FileIdentity
    has_signature: bool
    has_card: bool


@contextmanager
def open_model_dir(path: Path) -> Iterator[int]:
    """Yields a descriptor of the models directory.

    Raises:
        ArtifactError: `no_directory`, or `writable_by_others`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise ArtifactError("no_directory", "The models directory cannot be opened.") from exc
    try:
        _refuse_writable_by_others(os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def read_model_dir(descriptor: int, pattern: str) -> list[FoundArtifact]:
    """Returns the models whose file names match the pattern, newest version first."""
    suffixes = (MANIFEST_SUFFIX, SIGNATURE_SUFFIX, *_ARTIFACT_SUFFIXES)
    identities: dict[tuple[str, str], dict[str, FileIdentity]] = {}
    names: set[str] = set()
    with os.scandir(descriptor) as entries:
        for entry in entries:
            names.add(entry.name)
            suffix = next((end for end in suffixes if entry.name.endswith(end)), "")
            parsed = parse_stem(entry.name.removesuffix(suffix)) if suffix else None
            if parsed and fnmatchcase(entry.name, pattern):
                try:
                    identity = _identify(os.stat(entry.name, dir_fd=descriptor, follow_symlinks=False))
                except FileNotFoundError:
                    continue
                identities.setdefault((parsed[1], parsed[0]), {})[entry.name] = identity
    owner = os.fstat(descriptor).st_uid
    found = (_describe(*key, files, names, owner) for key, files in sorted(identities.items(), reverse=True))
    return [artifact for artifact in found if artifact.manifest_name or artifact.artifact_name]


def _describe(
    version: str, model_type: str, files: dict[str, FileIdentity], beside: Collection[str], owner: int
) -> FoundArtifact:
    names = sorted(files)
    manifest = next((name for name in names if name.endswith(MANIFEST_SUFFIX)), None)
    artifact = next((name for name in names if name.endswith(_ARTIFACT_SUFFIXES)), None)
    # Whose a file may be depends on the directory.
    identity = (owner, *(number for name in names for number in files[name]))
    has_signature = manifest is not None and build_signature_name(manifest) in beside
    has_card = manifest is not None and build_card_name(manifest, "html") in beside
    return FoundArtifact(version, model_type, manifest, artifact, identity, has_signature, has_card)


def read_manifest_file(descriptor: int, name: str) -> bytes:
    """Returns the bytes of a manifest.

    Raises:
        ArtifactError: see `_read_file`.
    """
    return _read_file(descriptor, name, MAX_MANIFEST_BYTES)


def read_signature_file(descriptor: int, manifest_name: str) -> bytes:
    """Returns the bytes of the signature that belongs to a manifest file.

    Raises:
        ArtifactError: `signature_missing`, or see `_read_file`.
    """
    try:
        return _read_file(descriptor, build_signature_name(manifest_name), MAX_SIGNATURE_BYTES)
    except ArtifactError as exc:
        if exc.reason == "missing":
            raise ArtifactError("signature_missing", "The manifest is not signed.") from exc
        raise


def read_card_file(descriptor: int, manifest_name: str, form: CardForm) -> bytes:
    """Returns the bytes of the model card that belongs to a manifest file.

    Raises:
        ArtifactError: see `_read_file`.
    """
    return _read_file(descriptor, build_card_name(manifest_name, form), MAX_CARD_BYTES)


def read_verified_artifact(descriptor: int, manifest: ModelManifest) -> bytes:
    """Returns the bytes of the artifact a manifest describes, after their SHA-256 matched.

    Raises:
        ArtifactError: `size_mismatch`, `digest_mismatch`, or see `_read_file`.
    """
    data = _read_file(descriptor, manifest.file_name, manifest.file_size)
    if len(data) != manifest.file_size:
        raise ArtifactError("size_mismatch", "The artifact does not have the size its manifest states.")
    if not hmac.compare_digest(hashlib.sha256(data).hexdigest(), manifest.sha256):
        raise ArtifactError("digest_mismatch", "The artifact's SHA-256 is not the one its manifest states.")
    return data


def _read_file(directory: int, name: str, limit: int) -> bytes:
    """Reads a file of at most `limit` bytes, once.

    Raises:
        ArtifactError: `unsafe_name`, `missing`, `not_regular` (a link, directory, FIFO or device),
            `hard_linked`, `wrong_owner`, `writable_by_others`, `size_mismatch` or `not_readable`.
    """
    if "/" in name or name in {"", ".", ".."}:
        raise ArtifactError("unsafe_name", "The file name leads out of the models directory.")
    try:
        descriptor = os.open(name, _OPEN_FLAGS, dir_fd=directory)
    except FileNotFoundError as exc:
        raise ArtifactError("missing", "The file is not there.") from exc
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise ArtifactError("not_regular", "The file is a symbolic link.") from exc
        raise ArtifactError("not_readable", "The file cannot be opened.") from exc
    try:
        _refuse_unsafe(os.fstat(descriptor), os.fstat(directory).st_uid, limit)
        return _read_at_most(descriptor, limit + 1)
    finally:
        os.close(descriptor)


def _read_at_most(descriptor: int, limit: int) -> bytes:
    chunks: list[bytes] = []
    try:
        while limit > 0 and (chunk := os.read(descriptor, min(limit, 1 << 24))):
            chunks.append(chunk)
            limit -= len(chunk)
    except OSError as exc:
        raise ArtifactError("not_readable", "The file cannot be read.") from exc
    return b"".join(chunks)


def _refuse_unsafe(status: os.stat_result, directory_owner: int, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError("not_regular", "The file is not a regular file.")
    if status.st_nlink == 0:
        raise ArtifactError("missing", "The file was replaced while it was being opened.")
    if status.st_nlink > 1:
        raise ArtifactError("hard_linked", "The file has a second name that could change it.")
    # Whoever owns the directory could replace the file anyway; any other stranger must not own it.
    if status.st_uid not in {0, os.geteuid(), directory_owner}:
        raise ArtifactError("wrong_owner", "The file belongs to somebody who does not own the directory.")
    _refuse_writable_by_others(status)
    if status.st_size > limit:
        raise ArtifactError("size_mismatch", "The file is larger than it may be.")


def _refuse_writable_by_others(status: os.stat_result) -> None:
    # A checkout under umask 002 is group-writable: harmless while the group is the owner's own, or ours.
    shared_group = status.st_gid not in {status.st_uid, os.getegid()}
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and shared_group):
        raise ArtifactError("writable_by_others", "Others may write the file or its directory.")


def _identify(status: os.stat_result) -> FileIdentity:
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid,
    )  # fmt: skip
