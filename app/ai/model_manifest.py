"""The manifest: what is known of an artifact before a byte of it is read, and how that is checked.

A manifest carries a digest over its own canonical content, so a manifest that was damaged or edited by hand
is refused before anything is deserialised. The digest guards against accidents, not attackers: whoever can
write a manifest can also recompute it. Against an attacker stand its signature (`model_signature`) and the
exact allow-list the artifact is deserialised under.

Pure: never reads a file, never imports what it describes. `training.publish` writes manifests, `model_bundle`
turns them into models, `model_registry` decides which of them serves.
"""

import hashlib
import hmac
import math
import re
from typing import Annotated, Any, Literal

import msgspec

from app.errors import ArtifactError

ArtifactFormat = Literal["skops", "joblib"]
MANIFEST_SUFFIX = ".manifest.json"
SIGNATURE_SUFFIX = ".manifest.sig"
CardForm = Literal["html", "markdown"]
CARD_SUFFIXES: dict[CardForm, str] = {"html": ".card.html", "markdown": ".card.md"}
MAX_MANIFEST_BYTES = 8 * 1024 * 1024
MAX_ARTIFACT_BYTES = 512 * 1024 * 1024

_ARTIFACT_NAME = re.compile(r"advanced_ml_(?P<model_type>[a-z0-9_]{1,40})_(?P<version>[0-9]{8}_[0-9]{6})\Z")

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{8}_[0-9]{6}\Z")]
ModelType = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]{1,40}\Z")]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
FeatureRow = list[float | None]


class TrainingFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a model was trained on: the as-of window (RFC 3339) it has learnt from, row counts, the seed.

    `calibrate_rows` are those of `train_rows` that calibrate, and `positives` those with the outcome of all.
    """

    as_of_from: str | None
    as_of_to: str | None
    train_rows: Count
    calibrate_rows: Count
    test_rows: Count
    positives: Count
    seed: int


class ModelDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What training knows of a model; publishing adds the facts of the file.

    `feature_set`, `statistics` and `calibrator` are the `to_json()` of their classes, in feature order.
    `golden_inputs` are rows of built feature values before feature safety, None where a value is missing.
    `created_at` is RFC 3339 UTC; `report` is free for figures that only people read. `venn_abers` is the
    `to_json()` of the table intervals are looked up in; a model where it is unset has no intervals.
    `feature_weights`, which sum to 1, say what each feature is worth to the model; unset, all are worth the
    same; all 0, the model goes by none of them and abstains from every lead. `abstain_below` is the coverage,
    so weighted, below which the base rate is the better answer.
    """

    model_type: ModelType
    version: Version
    feature_set: list[dict[str, Any]]
    statistics: list[dict[str, Any]]
    calibrator: dict[str, Any]
    threshold: Share
    base_rate: Share
    horizon_days: int | None
    source: str
    label: str
    training: TrainingFacts
    metrics: dict[str, float]
    golden_inputs: list[FeatureRow]
    created_at: str
    report: dict[str, Any] = {}
    venn_abers: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    feature_weights: list[Share] | msgspec.UnsetType = msgspec.UNSET
    abstain_below: Share | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        width = len(self.feature_set)
        if width == 0 or len(self.statistics) != width:
            raise ValueError("needs at least one feature, and statistics for every one of them")
        if not self.golden_inputs or any(len(row) != width for row in self.golden_inputs):
            raise ValueError("needs golden inputs, each with one value for every feature")
        weights = self.feature_weights
        if weights is not msgspec.UNSET and (
            len(weights) != width or (any(weights) and abs(math.fsum(weights) - 1) > 1e-6)
        ):
            raise ValueError("the feature weights are one for every feature, and sum to 1 or are all 0")
        numbers = [value for row in self.golden_inputs for value in row if value is not None]
        if not all(map(math.isfinite, [self.threshold, self.base_rate, *self.metrics.values(), *numbers])):
            raise ValueError("a number is not finite")

    @property
    def learnt_nothing(self) -> bool:
        """Whether too few outcomes were known to tell leads apart: all are answered the base rate."""
        weights = self.feature_weights or None
        return weights is not None and not any(weights)


class ModelManifest(ModelDescription, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The verified description of one artifact.

    `golden_outputs` are the calibrated probabilities of `golden_inputs`; `library_versions` are the exact
    versions the artifact was written with; `manifest_sha256` is the digest over all the other fields.
    """

    manifest_version: Literal[1]
    model_id: str
    file_name: str
    file_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_ARTIFACT_BYTES)]
    sha256: Digest
    format: ArtifactFormat
    library_versions: dict[str, str]
    feature_fingerprint: Digest
    golden_outputs: list[Share]
    manifest_sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""

    def __post_init__(self) -> None:
        ModelDescription.__post_init__(self)
        if self.model_id != build_model_id(self.version):
            raise ValueError("the model ID does not belong to the version")
        if self.file_name != build_file_name(self.model_type, self.version, self.format):
            raise ValueError("the file name does not belong to model type, version and format")
        if len(self.golden_outputs) != len(self.golden_inputs):
            raise ValueError("needs one golden output for every golden input")


def build_model_id(version: str) -> str:
    """Returns the model ID of a version."""
    return f"advanced_ml_{version}"


def build_file_name(model_type: str, version: str, fmt: ArtifactFormat) -> str:
    """Returns the name of the artifact file."""
    return f"advanced_ml_{model_type}_{version}.{fmt}"


def build_manifest_name(model_type: str, version: str) -> str:
    """Returns the name of the manifest file."""
    return f"advanced_ml_{model_type}_{version}{MANIFEST_SUFFIX}"


def build_signature_name(manifest_name: str) -> str:
    """Returns the name of the signature file that belongs to a manifest file."""
    return manifest_name.removesuffix(MANIFEST_SUFFIX) + SIGNATURE_SUFFIX


def build_card_name(manifest_name: str, form: CardForm) -> str:
    """Returns the name of the model card that belongs to a manifest file."""
    return manifest_name.removesuffix(MANIFEST_SUFFIX) + CARD_SUFFIXES[form]


def parse_stem(stem: str) -> tuple[str, str] | None:
    """Returns model type and version of a file name without its suffix, None for any other name."""
    match = _ARTIFACT_NAME.match(stem)
    return (match["model_type"], match["version"]) if match else None


def seal_manifest(manifest: ModelManifest) -> ModelManifest:
    """Returns the manifest as it will be read back, with its own digest filled in.

    Raises:
        msgspec.ValidationError: a field does not follow the schema.
    """
    # An int in a float field is written as 1 and read back as 1.0: the digest is taken over what is read.
    as_read = msgspec.json.decode(msgspec.json.encode(manifest), type=ModelManifest)
    return msgspec.structs.replace(as_read, manifest_sha256=_content_digest(as_read))


def encode_manifest(manifest: ModelManifest) -> bytes:
    """Returns the manifest as the bytes of its file, one field a line for people who compare two of them."""
    content = msgspec.to_builtins(manifest)
    lines = (f"{_canonical(name).decode()}: {_canonical(value).decode()}" for name, value in content.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_manifest(data: bytes) -> ModelManifest:
    """Decodes a manifest strictly and verifies its own digest.

    Only the bytes that `encode_manifest` writes are a manifest: of two equal keys, say, another reader might
    believe the other one.

    Raises:
        ArtifactError: `manifest_too_large`, `manifest_invalid` (not JSON, an unknown or missing field, a
            value outside its bounds) or `manifest_changed` (written otherwise, or the digest does not match
            the content).
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtifactError("manifest_too_large", "The manifest is larger than a manifest can be.")
    try:
        manifest = msgspec.json.decode(data, type=ModelManifest)
        canonical, digest = encode_manifest(manifest), _content_digest(manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ArtifactError("manifest_invalid", "The manifest does not follow its schema.") from exc
    if data != canonical:
        raise ArtifactError("manifest_changed", "The manifest is not written as it was published.")
    if not hmac.compare_digest(manifest.manifest_sha256, digest):
        raise ArtifactError("manifest_changed", "The manifest's content does not match its own digest.")
    return manifest


def manifest_fingerprint(manifest: ModelManifest) -> str:
    """Returns the SHA-256 over everything that determines predictions.

    File facts, version, times and metrics are left out: two trainings with the same seed on the same data
    give the same fingerprint. The estimator is represented by its golden outputs.
    """
    names = ("model_type", "feature_set", "statistics", "calibrator", "threshold", "base_rate",
             "feature_weights", "abstain_below", "venn_abers", "library_versions", "golden_inputs",
             "golden_outputs")  # fmt: skip
    content = msgspec.to_builtins(manifest)
    return _digest({name: content[name] for name in names if name in content})


def _content_digest(manifest: ModelManifest) -> str:
    content = msgspec.to_builtins(manifest)
    del content["manifest_sha256"]
    return _digest(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(value: object) -> bytes:
    return msgspec.json.encode(value, order="deterministic")
