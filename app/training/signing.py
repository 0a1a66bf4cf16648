"""Signing keys and signing: what `leadscore models keygen` and `leadscore models sign` do.

A private key is a PKCS #8 file in PEM that only its owner can read. It belongs where models are trained,
never on a machine that serves: that one needs the public key alone. What is signed has been verified as far
as that goes without deserialising it. Called by `app.cli`.
"""

import base64
import os
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import build_signature_name
from app.ai.model_signature import sign_manifest
from app.errors import ArtifactError, SigningKeyError
from app.training.publish import write_durably


def make_key_file(path: Path) -> str:
    """Writes a new private key and returns its public key, base64, as `ML_TRUSTED_KEYS` takes it.

    Raises:
        SigningKeyError: the file exists already (it is never overwritten), or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise SigningKeyError(f"{path} cannot be made: {os.strerror(exc.errno or 0).lower()}.") from exc
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123  opened by descriptor, with its permissions
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        with suppress(OSError):
            path.unlink()
        raise SigningKeyError(f"{path} cannot be written: {os.strerror(exc.errno or 0).lower()}.") from exc
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def read_key_file(path: Path) -> Ed25519PrivateKey:
    """Reads a private key.

    Raises:
        SigningKeyError: others may read the file, or it holds no Ed25519 private key without a passphrase.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise SigningKeyError(f"{path} can be read by others; chmod 600 it.")
            key = load_pem_private_key(file.read(), None)
    except OSError as exc:
        raise SigningKeyError(f"{path} cannot be read: {os.strerror(exc.errno or 0).lower()}.") from exc
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise SigningKeyError(f"{path} holds no private key that can be read without a passphrase.") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyError(f"{path} holds another kind of key than Ed25519.")
    return key


def sign_models(model_dir: Path, pattern: str, version: str | None, key: Ed25519PrivateKey) -> list[str]:
    """Signs the manifests of a version, or of all with None; returns the names of the signature files.

    Every one of them is verified first: manifest, size and SHA-256 of its artifact. If one fails, none is
    signed. A signature that is there is replaced.

    Raises:
        ArtifactError: `missing` (no such version), the first reason for which a model is refused, or
            `not_writable`; what was signed before that stays.
    """
    catalogue = ModelCatalogue(model_dir, pattern)
    there = [(artifact.manifest_name, artifact) for artifact in catalogue.find() if artifact.manifest_name]
    found = [(name, artifact) for name, artifact in there if version in {None, artifact.version}]
    if not found:
        wanted = f"There is no manifest{f' of version {version}' if version else ''} to sign in {model_dir}"
        listed = ", ".join(artifact.version for _, artifact in there[:5])
        raise ArtifactError("missing", f"{wanted}; the newest there: {listed}." if listed else f"{wanted}.")
    signatures = {}
    for name, artifact in found:
        try:
            manifest = catalogue.read_sound_manifest(artifact)
        except ArtifactError as exc:
            raise ArtifactError(exc.reason, f"Nothing was signed: {name} ({exc.reason}): {exc}") from exc
        signatures[build_signature_name(name)] = sign_manifest(manifest, key)
    for name, signature in signatures.items():
        write_durably(model_dir / name, signature)
    return list(signatures)
