"""The model card: what a model is for, what it was made from, how good it is and where it is not.

The story of the card, section by section; the numbers come from the leaves beside it. It holds figures,
column names and values that many leads share, never anything that belongs to one lead. A model without
held-out leads has a shorter card. Pure. Called by `app.training.train`.
"""

from app.ai.model_manifest import CardForm, ModelManifest
from app.training.card_candidates import describe_candidates
from app.training.card_evidence import NO_CHARTS, Evidence, charts_available, collect_evidence
from app.training.card_limits import describe_data_limits, describe_held_out_limits
from app.training.card_page import Card, Section, Table, build_html, build_markdown
from app.training.card_sections import (
    describe_calibration,
    describe_features,
    describe_gain,
    describe_metrics,
    describe_ranking,
    describe_slices,
)
from app.training.held_out import HeldOut
from app.training.report import describe_data, measured_beside, orders_by_chance, rate_of_when


def build_cards(manifest: ModelManifest, held_out: HeldOut | None) -> dict[CardForm, str]:
    """Returns both forms of the card of a model that is about to be published."""
    card = build_card(manifest, held_out, charts=charts_available())
    return {"markdown": build_markdown(card), "html": build_html(card)}


def build_card(manifest: ModelManifest, held_out: HeldOut | None, *, charts: bool) -> Card:
    """Returns the card of a published model; `held_out` is None where no leads were set aside for it."""
    evidence = None if held_out is None else collect_evidence(manifest, held_out, charts=charts)
    sections = [*_purpose(manifest), _data(manifest), *describe_candidates(manifest)]
    if manifest.metrics:
        sections.append(describe_metrics(manifest))
    if evidence is not None:
        sections += [
            describe_calibration(manifest, evidence),
            describe_ranking(evidence),
            describe_gain(evidence),
            describe_features(manifest, evidence),
            *describe_slices(evidence),
        ]
    sections.append(_limits(manifest, evidence, charts=charts))
    return Card(_title(manifest), _glance(manifest), [*sections, *_left_out(manifest)])


def _title(manifest: ModelManifest) -> str:
    return f"Model card: {manifest.model_id} ({manifest.model_type.replace('_', ' ')})"


def _glance(manifest: ModelManifest) -> list[tuple[str, str, str]]:
    training, metrics = manifest.training, manifest.metrics
    tiles = [
        ("Version", manifest.version, f"made {manifest.created_at}"),
        ("Learnt from", f"{training.train_rows:,} leads", _outcomes(manifest)),
    ]
    if "roc_auc" in metrics:
        remark = "of two leads with different outcomes, how often it puts the right one first"
        tiles.append(("Ranks right", f"{metrics['roc_auc']:.1%}", remark))
    if "ece" in metrics:
        remark = f"a perfect model would show {metrics['ece_floor']:.1%} by chance"
        tiles.append(("Probabilities are off by", f"{metrics['ece']:.1%}", remark))
    return tiles


def _outcomes(manifest: ModelManifest) -> str:
    if "day_one" in manifest.report:
        seen = f"{manifest.training.positives:,} of them reached the outcome"
        return f"{seen}, {manifest.base_rate:.1%} are expected to"
    return f"{manifest.base_rate:.1%} reached the outcome{rate_of_when(manifest)}"


def _purpose(manifest: ModelManifest) -> list[Section]:
    within = f" within {manifest.horizon_days} days" if manifest.horizon_days else ""
    _, intervals, _ = measured_beside(manifest)
    makes_order = not (manifest.learnt_nothing or orders_by_chance(intervals))
    estimate = f"It estimates how likely a lead of {manifest.source} is to reach {manifest.label}{within}."
    return [
        Section(
            "What it is for",
            (
                estimate,
                "A probability of 30% means: of 100 such leads about 30 do.",
            ),
            points=(
                *(["Deciding whom to call first."] if makes_order else []),
                "Planning how many calls a team will make.",
                "Adding up: the sum of the probabilities is how many outcomes to expect from these leads.",
                "Seeing of which leads too little is known to say anything (the verdict).",
            ),
        ),
        Section(
            "What it is not for",
            points=(
                "Deciding who is admitted: it knows how leads behaved, not who deserves what.",
                "Saying why somebody decides, or how to change their mind: it only knows what goes together.",
                f"Leads of another kind than those of {manifest.source}.",
            ),
        ),
    ]


def _data(manifest: ModelManifest) -> Section:
    facts = [(heading, text) for heading, text in describe_data(manifest) if text]
    return Section("Data and window", tables=(Table(("what", "value"), facts),))


def _limits(manifest: ModelManifest, evidence: Evidence | None, *, charts: bool) -> Section:
    points = describe_data_limits(manifest)
    if evidence is None:
        points.append(
            "No leads were set aside to test it on: how good it is on leads it has not seen is not measured."
        )
    else:
        points += describe_held_out_limits(manifest, evidence.held_out, evidence.bins, evidence.divisions)
        points += [] if charts else [NO_CHARTS]
    return Section("Known limits", points=points)


def _left_out(manifest: ModelManifest) -> list[Section]:
    report = manifest.report
    excluded = [(name, "excluded by hand") for name in report.get("excluded", ())]
    rows = [*report.get("dropped", {}).items(), *excluded]
    return [Section("Columns left out", tables=(Table(("column", "why"), rows),))] if rows else []
