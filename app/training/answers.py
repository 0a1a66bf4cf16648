"""What the service would answer of leads a model has not seen: probabilities, verdicts and intervals.

A model is measured by what it is answered with, so a lead it knows too little of counts with the base rate.
Pure; never fits. Called by `app.training.describe` for the manifest and by `held_out` for the card.
"""

from typing import NamedTuple

from app.ai.domain import VERDICTS, CodeArray, FloatArray
from app.ai.feature_safety import build_verdicts, check_features
from app.ai.features import FeatureMatrix
from app.ai.predictor import answer_scores
from app.ai.venn_abers import build_intervals
from app.training.fit import CalibratedModel
from app.training.verdict import VerdictRule

_MIN_COVERAGE = 0.6  # the default of ML_MIN_FEATURE_COVERAGE
_ABSTAIN = VERDICTS.index("abstain")


class Answers(NamedTuple):
    """What is said of `n` leads under the default settings.

    `raw` (n,) are the scores, `probability` (n,) is the number answered, `verdict` (n,) an index into
    `VERDICTS`, `intervals` (n, 2) are as `include=interval` gives them.
    """

    raw: FloatArray
    probability: FloatArray
    verdict: CodeArray
    intervals: FloatArray


def answer_leads(model: CalibratedModel, matrix: FeatureMatrix, rule: VerdictRule) -> Answers:
    """Answers the leads of built features as `predictor.score_leads` does once the model is published."""
    fitted, calibrator = model.fitted, model.calibrator
    checked = check_features(matrix, fitted.feature_set, fitted.statistics, rule.weights)
    verdict = build_verdicts(
        checked.weighted_coverage, checked.out_of_range, _MIN_COVERAGE, rule.abstain_below
    )
    raw = fitted.scorer(checked.values)
    probability = answer_scores(raw, verdict, calibrator, rule.base_rate)
    intervals = build_intervals(
        model.venn_abers,
        raw,
        probability,
        unknown=verdict == _ABSTAIN,
        bounds=(calibrator.lower, calibrator.upper),
    )
    return Answers(raw, probability, verdict, intervals)
