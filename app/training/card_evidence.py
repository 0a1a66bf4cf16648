"""Everything a model card shows of the held-out leads, computed once: figures, slices and drawn charts.

Pure. `card_sections` and `card_limits` put it into words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from app.ai.domain import FloatArray
from app.ai.model_manifest import ModelManifest
from app.training.card_figures import (
    Threshold,
    build_gain,
    build_precision_recall,
    build_roc,
    build_thresholds,
)
from app.training.card_slices import Division, build_divisions
from app.training.held_out import HeldOut
from app.training.reliability import ReliabilityBin, build_reliability_bins

NO_CHARTS = (
    "The model card has no charts, only their figures: matplotlib is not installed. `make model` installs "
    "it, and so does pip install 'lead-scoring[training]'."
)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What the held-out leads show; `charts` has an SVG for each name, and none where none can be drawn."""

    held_out: HeldOut
    bins: Sequence[ReliabilityBin]
    gain: FloatArray
    thresholds: Sequence[Threshold]
    divisions: Sequence[Division]
    importance: Mapping[str, tuple[float, ...]]
    charts: Mapping[str, str]


def charts_available() -> bool:
    """Tells whether charts can be drawn here."""
    return find_spec("matplotlib") is not None


def collect_evidence(manifest: ModelManifest, held_out: HeldOut, *, charts: bool) -> Evidence:
    """Returns the evidence; `importance` has the most important first."""
    probability, outcome = held_out.probability, held_out.outcome
    ranked = sorted(held_out.importance.items(), key=lambda entry: -sum(entry[1]))
    evidence = Evidence(
        held_out=held_out,
        bins=build_reliability_bins(probability, outcome),
        gain=build_gain(probability, outcome),
        thresholds=build_thresholds(probability, outcome, manifest.threshold),
        divisions=build_divisions(held_out),
        importance=dict(ranked),
        charts={},
    )
    return evidence if not charts else replace(evidence, charts=_draw(evidence))


def _draw(evidence: Evidence) -> dict[str, str]:
    # Only here, so that a training without matplotlib writes a card all the same.
    from app.training import card_charts as draw  # noqa: PLC0415

    probability, outcome = evidence.held_out.probability, evidence.held_out.outcome
    rate = float(outcome.mean())
    inside = sum(entry.inside for entry in evidence.bins)
    return {
        "reliability": draw.draw_reliability(
            evidence.bins,
            f"Reliability diagram: {inside} of {len(evidence.bins)} groups lie within the noise band.",
        ),
        "roc": draw.draw_roc(
            build_roc(probability, outcome), "ROC curve: outcomes found against others called in vain."
        ),
        "precision_recall": draw.draw_precision_recall(
            build_precision_recall(probability, outcome),
            rate,
            "Precision-recall curve: outcomes among those called against outcomes found.",
        ),
        "gain": draw.draw_gain(
            evidence.gain,
            rate,
            f"Gain chart: the first tenth of the leads holds {evidence.gain[10, 1]:.0%} of the outcomes.",
        ),
        "importance": draw.draw_importance(
            evidence.importance, "Bar chart of what shuffling each feature costs; the table has the figures."
        ),
    }
