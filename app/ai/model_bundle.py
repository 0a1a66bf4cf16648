"""A model in memory: the estimator's scorer with everything that stands round it, all of one version.

A bundle is made in one order: library versions, then the manifest's own parts, then the artifact's bytes,
then the golden self-test. Never reads a file. Called by `model_catalogue`, and by `training.publish` to prove
what it is about to publish.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from app.ai.calibration import Calibrator, calibrate
from app.ai.domain import FloatArray, InputColumn, ModelRef
from app.ai.feature_safety import FeatureStatistics, SafetyRules, check_features
from app.ai.features import CellState, FeatureMatrix, FeatureSet
from app.ai.inference import Scorer
from app.ai.library_versions import verify_library_versions
from app.ai.loaded_model import LoadedModel, ReadModel, read_here
from app.ai.model_manifest import FeatureRow, ModelDescription, ModelManifest
from app.ai.score_shapley import ScoreExplainer, build_score_explainer
from app.ai.venn_abers import VennAbersTable
from app.errors import ArtifactError

GOLDEN_TOLERANCE = 1e-12
"""Largest difference from a golden output: room for the last bits of another processor's `exp`, no more."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelParts:
    """What a description says about a model's inputs and outputs, as the objects that do the work."""

    feature_set: FeatureSet
    statistics: tuple[FeatureStatistics, ...]
    calibrator: Calibrator
    venn_abers: VennAbersTable | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ModelBundle:
    """One verified model; a request holds on to the bundle it began with.

    `scorer` takes safe feature values (n, k) and gives raw scores (n,); `calibrator` turns those into
    probabilities. `venn_abers` has the intervals of raw scores, if the model was published with them.
    `explainer` gives what contributions to raw scores are computed with; made when it is first asked for.
    """

    ref: ModelRef
    manifest: ModelManifest
    feature_set: FeatureSet
    statistics: tuple[FeatureStatistics, ...]
    safety: SafetyRules
    calibrator: Calibrator
    scorer: Scorer
    explainer: Callable[[], ScoreExplainer]
    venn_abers: VennAbersTable | None = None

    @property
    def input_columns(self) -> tuple[InputColumn, ...]:
        """The columns of the lead source the features read, distinct and ordered."""
        return self.feature_set.input_columns

    @property
    def abstain_below(self) -> float | None:
        """The weighted coverage below which the base rate is the better answer, None if not measured."""
        below = self.manifest.abstain_below
        return None if below is msgspec.UNSET else below


def build_parts(description: ModelDescription) -> ModelParts:
    """Builds feature set, statistics, calibrator and Venn-Abers table of a description.

    Raises:
        ArtifactError: `manifest_invalid`, when one of them is not what it should be.
    """
    try:
        return ModelParts(
            FeatureSet.from_json(description.feature_set),
            tuple(FeatureStatistics.from_json(entry) for entry in description.statistics),
            Calibrator.from_json(description.calibrator),
            _build_venn_abers(description),
        )
    except Exception as exc:
        raise ArtifactError(
            "manifest_invalid", "The manifest's features or calibrator are not valid."
        ) from exc


def load_bundle(manifest: ModelManifest, data: bytes, read: ReadModel = read_here) -> ModelBundle:
    """Makes the bundle of a manifest and the verified bytes of its artifact, which `read` deserialises.

    Raises:
        ArtifactError: `library_mismatch`, `manifest_invalid`, `golden_mismatch`, or see `loaded_model`.
    """
    verify_library_versions(manifest.library_versions, manifest.format)
    parts = build_parts(manifest)
    if parts.feature_set.fingerprint != manifest.feature_fingerprint:
        raise ArtifactError("manifest_invalid", "The feature set does not match its fingerprint.")
    model = read(data, manifest.format)
    means = np.array([entry.mean for entry in parts.statistics])
    bundle = ModelBundle(
        ref=ModelRef(manifest.model_id, manifest.version, manifest.sha256, manifest.manifest_sha256),
        manifest=manifest,
        feature_set=parts.feature_set,
        statistics=parts.statistics,
        safety=SafetyRules.of(parts.feature_set, parts.statistics, manifest.feature_weights or None),
        calibrator=parts.calibrator,
        scorer=model.scorer,
        explainer=functools.cache(lambda: _build_explainer(model, manifest, parts.feature_set, means)),
        venn_abers=parts.venn_abers,
    )
    self_test(bundle)
    return bundle


def self_test(bundle: ModelBundle) -> None:
    """Scores the golden inputs once more: the last step of every load, which takes milliseconds.

    Raises:
        ArtifactError: `golden_mismatch`: the model does not answer as it did when it was published.
    """
    try:
        parts = ModelParts(bundle.feature_set, bundle.statistics, bundle.calibrator)
        outputs = score_rows(parts, bundle.scorer, bundle.manifest.golden_inputs)
    except Exception as exc:
        raise ArtifactError("golden_mismatch", "The model fails on its golden inputs.") from exc
    if not np.allclose(outputs, bundle.manifest.golden_outputs, rtol=0.0, atol=GOLDEN_TOLERANCE):
        raise ArtifactError("golden_mismatch", "The model does not answer its golden inputs as published.")


def score_rows(parts: ModelParts, scorer: Scorer, rows: Sequence[FeatureRow]) -> FloatArray:
    """Returns the calibrated probabilities (r,) of built feature rows, None where a value is missing.

    Raises:
        ValueError: feature safety rejects one of the rows.
    """
    values = np.array(rows, dtype=np.float64)
    states = np.where(np.isnan(values), CellState.MISSING, CellState.PRESENT).astype(np.uint8)
    checked = check_features(FeatureMatrix(values, states), parts.feature_set, parts.statistics)
    if checked.rejected.any():
        raise ValueError("a row is rejected by feature safety")
    return calibrate(scorer(checked.values), parts.calibrator)


def _build_venn_abers(description: ModelDescription) -> VennAbersTable | None:
    table = description.venn_abers
    return None if isinstance(table, msgspec.UnsetType) else VennAbersTable.from_json(table)


def _build_explainer(
    model: LoadedModel, manifest: ModelManifest, feature_set: FeatureSet, means: FloatArray
) -> ScoreExplainer:
    if model.fitted is None:
        raise ValueError(f"there are no exact contributions for {manifest.model_type}")
    return build_score_explainer(model.fitted, feature_set.groups, means)
