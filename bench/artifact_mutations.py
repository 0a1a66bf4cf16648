"""What can be done to a published, signed model by somebody who holds no trusted key: one function each.

A mutation changes the files of the candidate it is given and of the model that serves, and nothing outside
their directory. Used by `bench.prove_artifacts`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.ai.model_signature import build_key_id
from tests.model_files import forge, manifest_of, sign, signature_of

ANOTHER_KEY = Ed25519PrivateKey.generate()
STRANGER = 54321


@dataclass(frozen=True)
class Candidate:
    """A signed model that lies in the registry's directory, newer than the one that serves.

    `key` is the trusted one, for what its holder might sign by mistake; `serving` is the artifact that
    serves; `older` is one of an older version, signed as well, in a directory of its own.
    """

    artifact: Path
    serving: Path
    older: Path
    key: Ed25519PrivateKey

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """Artifact, manifest and signature."""
        return files_of(self.artifact)


def files_of(artifact: Path) -> tuple[Path, Path, Path]:
    """Returns artifact, manifest and signature of a published model."""
    return artifact, manifest_of(artifact), signature_of(artifact)


Mutation = Callable[[Candidate, np.random.Generator], None]


def _change_bytes(data: bytes, how: str, random: np.random.Generator) -> bytes:
    start, end = sorted(random.choice(len(data) + 1, 2, replace=False).tolist())
    changed = bytearray(data)
    if how == "one bit flipped":
        changed[start] ^= 1 << int(random.integers(8))
    elif how == "one byte replaced":
        changed[start] ^= int(random.integers(1, 256))
    elif how == "bytes at random":
        changed[start:end] = random.bytes(end - start + 1)
    elif how == "truncated":
        del changed[start:]
    elif how == "zero length":
        changed.clear()
    elif how == "a piece missing":
        del changed[start:end]
    elif how == "a piece twice":
        changed[end:end] = data[start:end]
    else:
        changed += random.bytes(8)
    return bytes(changed)


CONTENTS = ("one bit flipped", "one byte replaced", "bytes at random", "truncated", "zero length",
            "a piece missing", "a piece twice", "bytes at the end")  # fmt: skip


def _aside(path: Path) -> Path:
    real = path.with_name("real")
    path.rename(real)
    return real


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _make_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


FILES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "a symbolic link": lambda path: path.symlink_to(_aside(path).name),
    "a link to nothing": lambda path: _make_link(path, "nothing"),
    "a link to a device": lambda path: _make_link(path, "/dev/zero"),
    "a link out of the directory": lambda path: _make_link(path, "../../../../etc/hostname"),
    "a hard link": lambda path: os.link(path, path.with_name("second")),
    "a FIFO": _make_fifo,
    "a directory": _make_directory,
    "writable by everybody": lambda path: path.chmod(0o666),
    "of a stranger's group that may write": lambda path: (os.chown(path, -1, STRANGER), path.chmod(0o664))[1],
    "owned by a stranger": lambda path: os.chown(path, STRANGER, -1),
}
if os.geteuid() != 0:  # only root can give a file away
    del FILES["owned by a stranger"], FILES["of a stranger's group that may write"]


def _forge(candidate: Candidate, random: np.random.Generator) -> None:
    data = _change_bytes(candidate.artifact.read_bytes(), "bytes at random", random)
    forge(candidate.artifact, data=data)


def _forge_and_sign(candidate: Candidate, random: np.random.Generator) -> None:
    _forge(candidate, random)
    sign(candidate.artifact, ANOTHER_KEY)


def _sign_in_the_trusted_name(candidate: Candidate, random: np.random.Generator) -> None:
    _forge_and_sign(candidate, random)
    names = [build_key_id(key.public_key().public_bytes_raw()) for key in (ANOTHER_KEY, candidate.key)]
    signature = signature_of(candidate.artifact)
    signature.write_text(signature.read_text().replace(*names))


def _lead_out(candidate: Candidate, _: np.random.Generator) -> None:
    manifest = manifest_of(candidate.artifact)
    name = candidate.artifact.name.encode()
    manifest.write_bytes(manifest.read_bytes().replace(name, b"../" + name))
    sign(candidate.artifact, candidate.key)


def _exchange(candidate: Candidate, random: np.random.Generator) -> None:
    first, second = (candidate.files[at] for at in random.choice(3, 2, replace=False))
    first_data, second_data = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_data)
    second.write_bytes(first_data)


def _take_from_serving(candidate: Candidate, which: tuple[int, ...]) -> None:
    for at in which:
        candidate.files[at].write_bytes(files_of(candidate.serving)[at].read_bytes())


def put_older_in_place(candidate: Candidate, _: np.random.Generator) -> None:
    """Leaves nothing but an older model, with its good signature."""
    for path in (*candidate.files, *files_of(candidate.serving)):
        path.unlink()
    for path in files_of(candidate.older):
        shutil.copy(path, candidate.artifact.with_name(path.name))


FORGERIES: dict[str, Mutation] = {
    "file and hash replaced": _forge,
    "file and hash replaced, signed with another key": _forge_and_sign,
    "the same in the name of the trusted key": _sign_in_the_trusted_name,
    "signed with another key": lambda candidate, _: sign(candidate.artifact, ANOTHER_KEY),
    "the threshold changed": lambda candidate, random: forge(
        candidate.artifact, threshold=float(random.random())),
    "golden outputs changed": lambda candidate, random: forge(
        candidate.artifact, golden_outputs=random.random(9).tolist()),
    "libraries changed": lambda candidate, _: forge(candidate.artifact, library_versions={"numpy": "1.0"}),
    "a name that leads out, signed": _lead_out,
    "two of the files exchanged": _exchange,
    "the artifact of the serving model": lambda candidate, _: _take_from_serving(candidate, (0,)),
    "the manifest of the serving model": lambda candidate, _: _take_from_serving(candidate, (1,)),
    "the signature of the serving model": lambda candidate, _: _take_from_serving(candidate, (2,)),
    "all of the serving model under another name": lambda candidate, _: _take_from_serving(
        candidate, (0, 1, 2)),
    "a directory that everybody may write": lambda candidate, _: candidate.artifact.parent.chmod(0o777),
    "an older model in place of all": put_older_in_place,
}  # fmt: skip


def _mutate_content(at: int, how: str) -> Mutation:
    def mutate(candidate: Candidate, random: np.random.Generator) -> None:
        path = candidate.files[at]
        data = path.read_bytes()
        while (changed := _change_bytes(data, how, random)) == data:
            pass
        path.write_bytes(changed)

    return mutate


def list_mutations() -> dict[str, Mutation]:
    """Returns every mutation by name: contents and kinds of all three files, and forgeries."""
    mutations = dict(FORGERIES)
    for at, file in enumerate(("artifact", "manifest", "signature")):
        for how in CONTENTS:
            mutations[f"{file}: {how}"] = _mutate_content(at, how)
        for kind, act in FILES.items():
            mutations[f"{file}: {kind}"] = lambda candidate, _, at=at, act=act: act(candidate.files[at])
    return mutations
