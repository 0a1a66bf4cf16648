"""The models directory as a catalogue: what lies there, and what is known of each artifact.

One chain leads from a file to a model: manifest, its signature, its own digest, whether it can serve here,
the artifact's size and SHA-256, and only then deserialising. A refusal is remembered until the files
or the directory's owner change, so a bad artifact is read once and not on every look. Never chooses which
model serves. Used by `model_registry`, and by the commands that list, verify and sign models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from app.ai.artifact_files import (
    FileIdentity,
    FoundArtifact,
    open_model_dir,
    read_card_file,
    read_manifest_file,
    read_model_dir,
    read_signature_file,
    read_verified_artifact,
)
from app.ai.domain import Progress
from app.ai.library_versions import verify_library_versions
from app.ai.model_bundle import ModelBundle, load_bundle
from app.ai.model_manifest import CardForm, ModelManifest, read_manifest
from app.ai.model_signature import verify_manifest
from app.errors import ArtifactError

ModelState = Literal["active", "verified", "refused", "incompatible", "unverified"]
SignatureState = Literal["valid", "invalid", "missing", "unchecked"]
Incompatible = Callable[[ModelManifest], str | None]
LoadBundle = Callable[[ModelManifest, bytes], ModelBundle]
_Result = TypeVar("_Result")

_PASSING_REASONS = frozenset({"incompatible", "missing"})
_PASSING_CAUSES = (MemoryError, OSError)
"""What may go away although the files stay as they are."""


@dataclass(frozen=True, slots=True)
class AvailableModel:
    """One artifact in the models directory; `file` is relative to it.

    `state`: `active` it serves; `verified` it could; `refused` it cannot be trusted or loaded; `incompatible`
    it is sound but cannot serve this lead source; `unverified` there is nothing to verify it against.
    `reason` is the word of `ArtifactError`, or for an incompatible model a sentence. `signature`: `valid` of
    a trusted key, which `signed_by` names by its ID; `invalid`; `missing`; `unchecked` no key is trusted, or
    it was refused before. `has_card` tells whether there is a model card to read.
    """

    file: str
    version: str
    model_type: str
    state: ModelState
    reason: str | None
    signature: SignatureState
    signed_by: str | None
    has_card: bool


class ModelCatalogue:
    """The artifacts of one directory whose file names match a pattern.

    `incompatible` tells why a sound model cannot serve here, None if it can. `trusted_keys` are Ed25519
    public keys, 32 bytes each; with any, a manifest that none of them signed is refused. `load` makes a model
    of a manifest and verified bytes. All methods read the disk and block; they may be called from several
    threads.
    """

    def __init__(
        self,
        model_dir: Path,
        pattern: str = "advanced_ml_*",
        *,
        incompatible: Incompatible = lambda _: None,
        trusted_keys: Sequence[bytes] = (),
        load: LoadBundle = load_bundle,
    ) -> None:
        self._model_dir = model_dir
        self._pattern = pattern
        self._incompatible = incompatible
        self._trusted_keys = trusted_keys
        self._load_bundle = load
        self._refusals: dict[FileIdentity, tuple[str, str]] = {}
        self._verified: dict[FileIdentity, ModelManifest] = {}
        self._signers: dict[FileIdentity, str] = {}

    def find(self) -> list[FoundArtifact]:
        """Returns what lies in the directory, newest version first.

        Raises:
            ArtifactError: `no_directory` or `writable_by_others`.
        """
        with open_model_dir(self._model_dir) as descriptor:
            found = read_model_dir(descriptor, self._pattern)
        self._forget_all_but({artifact.identity for artifact in found})
        return found

    def load(self, artifact: FoundArtifact) -> ModelBundle:
        """Verifies and loads one artifact; the bytes that are hashed are the bytes that are deserialised.

        Raises:
            ArtifactError: why not; `incompatible` has the sentence as its text.
        """
        return self._remembering(artifact, self._load)

    def read_sound_manifest(self, artifact: FoundArtifact) -> bytes:
        """Returns the bytes of a manifest whose artifact has the size and SHA-256 it states.

        Raises:
            ArtifactError: why not.
        """
        with open_model_dir(self._model_dir) as descriptor:
            data = self._read_signed(descriptor, artifact)
            read_verified_artifact(descriptor, _decode_manifest(data, artifact))
        return data

    def read_card(self, version: str, form: CardForm, active: FileIdentity | None = None) -> bytes:
        """Reads the model card of a version; where two models share it, that of the one that serves.

        Raises:
            ArtifactError: `missing`, or why the file is not opened (see `artifact_files`).
        """
        found = [artifact for artifact in self.find() if artifact.version == version]
        for artifact in sorted(found, key=lambda artifact: artifact.identity != active):
            if artifact.manifest_name is not None and artifact.has_card:
                with open_model_dir(self._model_dir) as descriptor:
                    return read_card_file(descriptor, artifact.manifest_name, form)
        raise ArtifactError("missing", "There is no model card of this version.")

    def list_models(self, active: FileIdentity | None = None) -> list[AvailableModel]:
        """Returns every artifact with its state, after verifying hashes; deserialises nothing."""
        return self._describe_all(lambda artifact: self._remembering(artifact, self._verify), active)

    def verify_models(self, progress: Progress = lambda *_: None) -> list[AvailableModel]:
        """Returns every artifact; `verified` means it was loaded and answered its golden inputs.

        `progress` is told the stage, how many are done, and how many there are.
        """
        return self._describe_all(lambda artifact: self._load(artifact).manifest, None, progress)

    def _describe_all(
        self,
        verify: Callable[[FoundArtifact], ModelManifest],
        active: FileIdentity | None,
        progress: Progress = lambda *_: None,
    ) -> list[AvailableModel]:
        try:
            found = self.find()
        except ArtifactError:
            return []
        described: list[AvailableModel] = []
        for artifact in found:
            progress("verify", len(described), len(found))
            described.append(self._describe(artifact, verify, active))
        progress("verify", len(found), len(found))
        return described

    def _describe(
        self,
        artifact: FoundArtifact,
        verify: Callable[[FoundArtifact], ModelManifest],
        active: FileIdentity | None,
    ) -> AvailableModel:
        state: ModelState = "active" if artifact.identity == active else "verified"
        reason = None
        if artifact.manifest_name is None:
            state, reason = "unverified", "no_manifest"
        elif state == "verified":
            try:
                verify(artifact)
            except ArtifactError as exc:
                sound = exc.reason == "incompatible"
                state, reason = ("incompatible", str(exc)) if sound else ("refused", exc.reason)
        return AvailableModel(
            file=artifact.artifact_name or artifact.manifest_name or "",
            version=artifact.version,
            model_type=artifact.model_type,
            state=state,
            reason=reason,
            signature=self._tell_signature(artifact, reason),
            signed_by=self._signers.get(artifact.identity),
            has_card=artifact.has_card,
        )

    def _tell_signature(self, artifact: FoundArtifact, reason: str | None) -> SignatureState:
        if not artifact.has_signature:
            return "missing"
        if artifact.identity in self._signers:
            return "valid"
        return "invalid" if reason == "signature_invalid" else "unchecked"

    def _remembering(self, artifact: FoundArtifact, act: Callable[[FoundArtifact], _Result]) -> _Result:
        if known := self._refusals.get(artifact.identity):
            raise ArtifactError(*known)
        try:
            return act(artifact)
        except ArtifactError as exc:
            if exc.reason not in _PASSING_REASONS and not isinstance(exc.__cause__, _PASSING_CAUSES):
                # Not the exception itself: its traceback would keep the artifact's bytes alive.
                self._refusals[artifact.identity] = (exc.reason, str(exc))
            raise

    def _load(self, artifact: FoundArtifact) -> ModelBundle:
        with open_model_dir(self._model_dir) as descriptor:
            manifest = self._read_manifest(descriptor, artifact)
            self._refuse_incompatible(manifest)
            data = read_verified_artifact(descriptor, manifest)
        return self._load_bundle(manifest, data)

    def _verify(self, artifact: FoundArtifact) -> ModelManifest:
        manifest = self._verified.get(artifact.identity)
        if manifest is None:
            with open_model_dir(self._model_dir) as descriptor:
                manifest = self._read_manifest(descriptor, artifact)
                verify_library_versions(manifest.library_versions, manifest.format)
                read_verified_artifact(descriptor, manifest)
            self._verified[artifact.identity] = manifest
        self._refuse_incompatible(manifest)
        return manifest

    def _read_manifest(self, descriptor: int, artifact: FoundArtifact) -> ModelManifest:
        return _decode_manifest(self._read_signed(descriptor, artifact), artifact)

    def _read_signed(self, descriptor: int, artifact: FoundArtifact) -> bytes:
        """Reads a manifest and, where keys are trusted, checks who signed it; decodes nothing of it."""
        if artifact.manifest_name is None:
            raise ArtifactError("no_manifest", "The artifact has no manifest.")
        data = read_manifest_file(descriptor, artifact.manifest_name)
        if self._trusted_keys:
            signature = read_signature_file(descriptor, artifact.manifest_name)
            self._signers[artifact.identity] = verify_manifest(data, signature, self._trusted_keys)
        return data

    def _refuse_incompatible(self, manifest: ModelManifest) -> None:
        why = self._incompatible(manifest)
        if why is not None:
            raise ArtifactError("incompatible", why)

    def _forget_all_but(self, identities: set[FileIdentity]) -> None:
        # Copies, because another thread may be adding; what it adds meanwhile is found out once more.
        refusals, verified, signers = self._refusals.copy(), self._verified.copy(), self._signers.copy()
        self._refusals = {key: value for key, value in refusals.items() if key in identities}
        self._verified = {key: value for key, value in verified.items() if key in identities}
        self._signers = {key: value for key, value in signers.items() if key in identities}


def _decode_manifest(data: bytes, artifact: FoundArtifact) -> ModelManifest:
    manifest = read_manifest(data)
    if (manifest.version, manifest.model_type) != (artifact.version, artifact.model_type):
        raise ArtifactError("manifest_misnamed", "The manifest describes another model than its name says.")
    return manifest
