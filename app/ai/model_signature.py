"""Signatures: who vouches for a model, as Ed25519 over the exact bytes of its manifest.

The manifest names its artifact by SHA-256, so one signature covers both. It lies in a file of its own beside
the manifest and is checked before the manifest is even decoded. Only the raw bytes are signed, so any Ed25519
tool can check them. Pure: never reads a file, never holds a private key longer than a call. Called by
`model_catalogue`, which verifies, and by `training.signing` and `training.publish`, which sign.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from app.errors import ArtifactError

MAX_SIGNATURE_BYTES = 1024


class ManifestSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a signature file; `key_id` tells which key to check with and proves nothing."""

    key_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
    signature: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]


def build_key_id(public_key: bytes) -> str:
    """Returns the name of a public key (32 bytes): the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def sign_manifest(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """Returns the bytes of the signature file for the bytes of a manifest."""
    key_id = build_key_id(key.public_key().public_bytes_raw())
    return msgspec.json.encode(ManifestSignature(key_id, key.sign(manifest).hex()))


def verify_manifest(manifest: bytes, signature: bytes, trusted_keys: Iterable[bytes]) -> str:
    """Returns the ID of the trusted key (32 bytes each) that signed these very bytes of a manifest.

    Raises:
        ArtifactError: `signature_invalid`: not a signature, of a key that is not trusted, or of other bytes.
    """
    try:
        claimed = msgspec.json.decode(signature, type=ManifestSignature)
        public_key = {build_key_id(key): key for key in trusted_keys}[claimed.key_id]
        Ed25519PublicKey.from_public_bytes(public_key).verify(bytes.fromhex(claimed.signature), manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, InvalidSignature) as exc:
        raise ArtifactError("signature_invalid", "No trusted key has signed this manifest.") from exc
    return claimed.key_id
