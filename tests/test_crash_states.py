"""The model of a power cut keeps what was synchronised, may lose the rest, and makes nothing up."""

import random
from pathlib import Path

from bench.crash_states import Disk, RecordingFiles

ROOT = Path("/disk")
FOLDER, FILE = ROOT / "folder", ROOT / "folder" / "file"
SYNCED = [
    ("make_directory", FOLDER), ("sync_directory", ROOT), ("create", FILE), ("sync_directory", FOLDER),
    ("pwrite", FILE, b"a" * 1024, 0), ("fdatasync", FILE),
]  # fmt: skip


def draw_all(disk: Disk) -> list[dict[Path, bytes | None]]:
    rng = random.Random(1)  # noqa: S311 - repeatable
    return [disk.draw(rng, share) for share in (0.0, 1.0, *(0.5,) * 200)]


def make_disk(*operations: tuple[object, ...]) -> Disk:
    disk = Disk(ROOT)
    for operation in operations:
        disk.apply(operation)
    return disk


def test_what_was_synchronised_is_there() -> None:
    for entries in draw_all(make_disk(*SYNCED)):
        assert entries == {FOLDER: None, FILE: b"a" * 1024}


def test_each_sector_that_was_not_is_old_or_new() -> None:
    disk = make_disk(*SYNCED, ("pwrite", FILE, b"b" * 700, 300))
    contents = {entries[FILE] for entries in draw_all(disk)}
    assert contents == {
        b"a" * 1024,
        b"a" * 300 + b"b" * 212 + b"a" * 512,
        b"a" * 512 + b"b" * 488 + b"a" * 24,
        b"a" * 300 + b"b" * 700 + b"a" * 24,
    }


def test_a_name_that_was_not_may_be_missing_with_all_that_is_in_it() -> None:
    entries = draw_all(make_disk(*(operation for operation in SYNCED if operation[0] != "sync_directory")))
    assert {frozenset(found) for found in entries} == {
        frozenset(), frozenset({FOLDER}), frozenset({FOLDER, FILE})
    }  # fmt: skip


def test_a_renamed_file_has_one_name_and_an_unlinked_one_may_still_be_there() -> None:
    other = FOLDER / "other"
    renamed = draw_all(make_disk(*SYNCED, ("rename", FILE, other)))
    assert {frozenset(found) for found in renamed} == {frozenset({FOLDER, FILE}), frozenset({FOLDER, other})}
    unlinked = draw_all(make_disk(*SYNCED, ("unlink", FILE)))
    assert {frozenset(found) for found in unlinked} == {frozenset({FOLDER, FILE}), frozenset({FOLDER})}


def test_operations_are_recorded_by_the_name_a_file_was_made_with(tmp_path: Path) -> None:
    files, path = RecordingFiles(), tmp_path / "file"
    descriptor = files.create(path)
    files.pwrite(descriptor, b"content", 3)
    files.fdatasync(descriptor)
    assert files.pread(descriptor, 7, 3) == b"content"
    files.rename(path, tmp_path / "other")
    files.unlink(tmp_path / "other")
    assert files.operations == [
        ("create", path), ("pwrite", path, b"content", 3), ("fdatasync", path),
        ("rename", path, tmp_path / "other"), ("unlink", tmp_path / "other"),
    ]  # fmt: skip
