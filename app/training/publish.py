"""Publishing: a fitted estimator and its description become an artifact and a manifest on disk.

What is published has been proved first: the bytes were deserialised under the registry's own allow-list and
answer the golden inputs as the estimator in memory does. A reader sees the old state or the new one, never
a mix: temporary name, fsync, rename; the artifact first, then the model card and the signature, the manifest
last. Never chooses which model serves. Called by training.
"""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.ai.artifact_loading import dump_estimator
from app.ai.estimators import build_scorer
from app.ai.library_versions import library_versions
from app.ai.model_bundle import build_parts, load_bundle, score_rows
from app.ai.model_manifest import (
    ArtifactFormat,
    CardForm,
    ModelDescription,
    ModelManifest,
    build_card_name,
    build_file_name,
    build_manifest_name,
    build_model_id,
    build_signature_name,
    encode_manifest,
    read_manifest,
    seal_manifest,
)
from app.ai.model_signature import sign_manifest
from app.ai.served_versions import sync_directory
from app.errors import ArtifactError

_TRIAL_BYTES = 1 << 20
"""Room for a small model; a disk that has no more is told of before the training rather than after it."""


def publish_model(
    model_dir: Path,
    estimator: object,
    description: ModelDescription,
    fmt: ArtifactFormat = "skops",
    signing_key: Ed25519PrivateKey | None = None,
    *,
    build_cards: Callable[[ModelManifest], Mapping[CardForm, str]] = lambda _: {},
) -> Path:
    """Writes artifact, cards and manifest, signed if there is a key, and returns the path of the manifest.

    `description.golden_inputs` must be rows that feature safety does not reject; their outputs are computed
    here. `build_cards` words the model card of the manifest. The directory is made when it is missing. When
    a file cannot be written, those before it are removed.

    Raises:
        ArtifactError: `already_published` (this version exists), `not_writable`, or the reason for which the
            registry would refuse the artifact.
    """
    data = dump_estimator(estimator, fmt)
    manifest = build_manifest(estimator, description, data, fmt)
    load_bundle(manifest, data)
    check_writable(model_dir)
    name = build_manifest_name(manifest.model_type, manifest.version)
    if (model_dir / name).exists() or (model_dir / manifest.file_name).exists():
        raise ArtifactError(
            "already_published", f"Version {manifest.version} of this model type already exists."
        )
    encoded = encode_manifest(manifest)
    files = {manifest.file_name: data}
    cards = build_cards(read_manifest(encoded))
    files |= {build_card_name(name, form): text.encode() for form, text in cards.items()}
    if signing_key:
        files[build_signature_name(name)] = sign_manifest(encoded, signing_key)
    files[name] = encoded
    try:
        for file_name, content in files.items():
            write_durably(model_dir / file_name, content)
    except ArtifactError:
        for file_name in reversed(files):
            with suppress(OSError):
                (model_dir / file_name).unlink()
        raise
    return model_dir / name


def check_writable(model_dir: Path) -> None:
    """Makes the directory if it is missing, and writes and removes a file in it that has no name.

    Raises:
        ArtifactError: `not_writable`.
    """
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=model_dir) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
    except OSError as exc:
        raise _not_writable(model_dir, exc) from exc


def build_manifest(
    estimator: object, description: ModelDescription, data: bytes, fmt: ArtifactFormat
) -> ModelManifest:
    """Returns the sealed manifest of an estimator whose artifact has the bytes `data`.

    Raises:
        ArtifactError: `manifest_invalid`.
    """
    parts = build_parts(description)
    try:
        # By scikit-learn: the self-test at each load compares whatever scores there with it.
        outputs = score_rows(parts, build_scorer(estimator, lambda: None), description.golden_inputs)
        manifest = ModelManifest(
            **msgspec.structs.asdict(description),
            manifest_version=1,
            model_id=build_model_id(description.version),
            file_name=build_file_name(description.model_type, description.version, fmt),
            file_size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            format=fmt,
            library_versions=library_versions(fmt),
            feature_fingerprint=parts.feature_set.fingerprint,
            golden_outputs=outputs.tolist(),
        )
        return seal_manifest(manifest)
    except ValueError as exc:
        raise ArtifactError("manifest_invalid", f"The model cannot be described: {exc}.") from exc


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file that others may read but not write; a reader sees all of it or what was there before.

    Raises:
        ArtifactError: `not_writable`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write_file(temporary, data)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as exc:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise _not_writable(path, exc) from exc


def _write_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as file:  # noqa: PTH123  opened by descriptor, with its permissions
        file.write(data)
        file.flush()
        # Whatever the umask of whoever trains: readable by the service, writable by nobody else.
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())


def _not_writable(path: Path, exc: OSError) -> ArtifactError:
    return ArtifactError("not_writable", f"{path} cannot be written: {os.strerror(exc.errno or 0).lower()}.")
