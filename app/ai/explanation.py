"""The receipt of a probability: the base rate, what each column adds, calibration, bounds, and the sentences.

    base rate + contributions + calibration + bounds = probability

The contributions are Shapley values of the raw score (`score_shapley`). Calibration is the step from there to
what the calibrator says, the difference between the base rate and the mean raw score included; bounds is the
step into the bounds every probability is kept in. Pure. Called by the predictor, on its thread.
"""

from dataclasses import replace

import numpy as np

from app.ai.calibration import calibrate
from app.ai.domain import VERDICTS, AnswerArray, Contribution, Explanation, LeadColumns, Receipt
from app.ai.feature_safety import apply_rules
from app.ai.features import build_features
from app.ai.model_bundle import ModelBundle
from app.ai.reasons import ABSTAINED, NOTHING_LEARNT, put_into_words, write_reasons

_ABSTAIN = VERDICTS.index("abstain")


def explain_leads(
    bundle: ModelBundle, leads: LeadColumns, as_of: float, answers: AnswerArray
) -> list[Explanation]:
    """Explains the answers (n,) that `score_leads` gave these `n` leads as of the same moment.

    A lead of which too little is known was not scored but given the base rate: nothing contributes to it. The
    explanation of a lead that feature safety rejects means nothing.
    """
    matrix = build_features(leads, bundle.feature_set, as_of)
    checked = apply_rules(matrix, bundle.safety)
    scored = np.flatnonzero((answers["verdict"] != _ABSTAIN) & ~checked.rejected)
    contributions = np.zeros((leads.n, len(bundle.feature_set.groups)))
    contributions[scored] = bundle.explainer().contributions(checked.values[scored])

    base_rate = bundle.manifest.base_rate
    unbounded = np.full(leads.n, base_rate)
    free = replace(bundle.calibrator, lower=0.0, upper=1.0, tie_break=0.0)
    unbounded[scored] = calibrate(answers["raw_score"][scored], free)
    bounds = np.clip(unbounded, bundle.calibrator.lower, bundle.calibrator.upper) - unbounded
    calibration = np.zeros(leads.n)
    calibration[scored] = (answers["probability"] - bounds - base_rate - contributions.sum(axis=1))[scored]

    groups = put_into_words(leads, matrix, bundle.feature_set, bundle.statistics)
    names = bundle.feature_set.group_names
    told, totals = set(scored.tolist()), (answers["probability"] - base_rate).tolist()
    unsaid = NOTHING_LEARNT if bundle.manifest.learnt_nothing else ABSTAINED
    known = matrix.values.astype(object)
    known[np.isnan(matrix.values)] = None
    explanations = []
    for row, added in enumerate(contributions.tolist()):
        lines = tuple(
            Contribution(name, group.classes[row], contribution)
            for name, group, contribution in zip(names, groups, added, strict=True)
        )
        receipt = Receipt(base_rate, lines, float(calibration[row]), float(bounds[row]))
        reasons = write_reasons(groups, row, added, totals[row]) if row in told else [unsaid]
        features = dict(zip(bundle.feature_set.names, known[row].tolist(), strict=True))
        explanations.append(Explanation(receipt, tuple(reasons), features))
    return explanations
