"""The model card: what it shows comes from held-out leads, is honest about noise, and names nobody."""

import re
import subprocess
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from app.ai.domain import VERDICTS, Column
from app.ai.features import FeatureSet, FeatureSpec
from app.ai.model_manifest import ModelManifest, read_manifest
from app.training.card_evidence import NO_CHARTS, collect_evidence
from app.training.card_figures import (
    build_gain,
    build_precision_recall,
    build_roc,
    build_thresholds,
)
from app.training.card_page import build_html, build_markdown
from app.training.card_slices import MIN_SLICE_ROWS, OTHERS, UNKNOWN, build_divisions, find_off_slices
from app.training.held_out import HeldOut
from app.training.model_card import build_card
from app.training.model_metrics import evaluate
from app.training.reliability import build_reliability_bins
from app.training.report import describe_day_one
from tests.builders import spec
from tests.model_files import V1, manifest_of, publish

ROWS = 3000
CHOICE = {
    "order": "time",
    "folds": 5,
    "candidates": [
        {"name": "boosting, small", "model_type": "hist_gradient_boosting", "params": {}, "log_loss": 0.4181,
         "log_loss_sd": 0.0112, "roc_auc": 0.8803, "brier": 0.1327, "folds": 5},
        {"name": "forest, deep", "model_type": "random_forest", "params": {}, "log_loss": 0.4243,
         "log_loss_sd": 0.0131, "roc_auc": 0.8771, "brier": 0.1349, "folds": 5},
    ],
    "chosen": "boosting, small",
    "runner_up": "forest, deep",
    "calibrators": [
        {"method": "sigmoid", "log_loss": 0.4182, "calibration_error": 0.0121, "noise_floor": 0.0101},
        {"method": "isotonic", "log_loss": 0.4179, "calibration_error": 0.0093, "noise_floor": 0.0101},
    ],
    "calibrator": "isotonic",
}  # fmt: skip


def build_held_out(seed: int = 0, rows: int = ROWS, **changes: Any) -> HeldOut:
    """Leads of which the probabilities are true, with a text, a boolean and a creation time."""
    random = np.random.default_rng(seed)
    probability = random.beta(1.2, 2.2, rows)
    sources = random.choice(np.array(["Website", " website", "fair", "referral"], object), rows)
    sources[:5] = "canary-Vantablack"
    known = random.random(rows) < 0.9
    opted = (random.random(rows) < 0.5).astype(np.float64)
    fields: dict[str, Any] = {
        "outcome": (random.random(rows) < probability).astype(np.int64),
        "probability": probability,
        "verdict": random.choice(3, rows, p=[0.9, 0.08, 0.02]).astype(np.uint8),
        "order": np.arange(rows, dtype=np.float64),
        "columns": {
            "source": Column("text", np.where(known, sources, ""), known),
            "opted_in": Column("boolean", opted, np.ones(rows, np.bool_)),
        },
        "importance": {
            "source": (0.05, 0.04, 0.06),
            "opted_in": (0.01, -0.01, 0.0),
            "idle": (0.0, -0.1, 0.0),
        },
        "drift": {"source": "stable", "opted_in": "stable", "idle": "stable"},
    }
    return HeldOut(**{**fields, **changes})


def build_manifest(folder: Path, held_out: HeldOut | None, **report: Any) -> ModelManifest:
    """The manifest of a small model whose metrics are those of these leads."""
    metrics = {} if held_out is None else evaluate(held_out.probability, held_out.outcome, 0.5)
    manifest = read_manifest(manifest_of(publish(folder, V1, metrics=metrics, report=report)).read_bytes())
    training = msgspec.structs.replace(manifest.training, test_rows=ROWS, train_rows=4 * ROWS)
    base_rate = 0.5 if held_out is None else float(held_out.outcome.mean())
    return msgspec.structs.replace(manifest, training=training, base_rate=base_rate)


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return build_held_out()


@pytest.fixture(scope="module")
def manifest(held_out: HeldOut, tmp_path_factory: pytest.TempPathFactory) -> ModelManifest:
    return build_manifest(tmp_path_factory.mktemp("card"), held_out)


class Page(HTMLParser):
    """Reads a page and complains about what is not closed."""

    VOID = frozenset({"meta", "path", "use", "rect"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data


def render(manifest: ModelManifest, held_out: HeldOut | None, *, charts: bool = True) -> tuple[str, str]:
    card = build_card(manifest, held_out, charts=charts)
    return build_html(card), build_markdown(card)


def limits_of(manifest: ModelManifest, held_out: HeldOut) -> str:
    return render(manifest, held_out, charts=False)[1].split("## Known limits")[1]


# Figures


def test_the_noise_band_holds_a_perfect_model_95_times_in_100_and_another_one_not() -> None:
    random = np.random.default_rng(1)
    inside = {"perfect": 0, "too sure": 0}
    for _ in range(150):
        truth = random.beta(1, 2, 900)
        outcome = (random.random(900) < truth).astype(np.int64)
        sure = truth**2 / (truth**2 + (1 - truth) ** 2)
        for name, probability in (("perfect", truth), ("too sure", sure)):
            bins = build_reliability_bins(probability, outcome)
            assert (len(bins), sum(entry.leads for entry in bins)) == (15, 900)
            inside[name] += sum(entry.inside for entry in bins)
    assert 0.945 < inside["perfect"] / (150 * 15) < 0.985
    assert inside["too sure"] / (150 * 15) < 0.75


def test_the_curves_have_the_areas_the_metrics_say(held_out: HeldOut) -> None:
    probability, outcome = held_out.probability, held_out.outcome
    roc, curve = build_roc(probability, outcome), build_precision_recall(probability, outcome)
    assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(roc_auc_score(outcome, probability), abs=3e-3)
    area = np.trapezoid(curve[:, 1], curve[:, 0])
    assert area == pytest.approx(average_precision_score(outcome, probability), abs=0.02)
    for points in (roc, curve):
        assert len(points) <= 200
        assert points[0, 0] == 0
        assert points[-1, 0] == 1
        assert (np.diff(points[:, 0]) >= 0).all()


def test_the_gain_counts_the_outcomes_among_the_first_and_shares_ties_evenly(held_out: HeldOut) -> None:
    gain = build_gain(held_out.probability, held_out.outcome)
    ranked = held_out.outcome[np.argsort(-held_out.probability)]
    for share in (10, 33, 100):
        first = ranked[: ROWS * share // 100].sum() / ranked.sum()
        assert gain[share] == pytest.approx((share / 100, first), abs=2e-3)
    tied = build_gain(np.full(ROWS, 0.5), held_out.outcome)
    assert tied[:, 1] == pytest.approx(tied[:, 0])


def test_the_row_of_the_decision_threshold_says_what_the_metrics_say(held_out: HeldOut) -> None:
    metrics = evaluate(held_out.probability, held_out.outcome, 0.37)
    rows = build_thresholds(held_out.probability, held_out.outcome, 0.37)
    assert [row.probability for row in rows] == [0.1, 0.25, 0.37, 0.5, 0.75, 0.9]
    assert (rows[2].precision, rows[2].found) == pytest.approx((metrics["precision"], metrics["recall"]))
    assert rows[0].called > rows[0].false_alarms
    assert build_thresholds(np.full(ROWS, 0.3), held_out.outcome, 0.37) != rows


# Charts


CHARTS = ("reliability", "roc", "precision_recall", "gain", "importance")


def test_every_chart_is_drawn_from_the_held_out_leads_the_same_way_each_time(
    manifest: ModelManifest, held_out: HeldOut
) -> None:
    charts = collect_evidence(manifest, held_out, charts=True).charts
    assert tuple(charts) == CHARTS
    assert collect_evidence(manifest, held_out, charts=True).charts == charts
    other = collect_evidence(
        manifest, build_held_out(7, importance={"source": (0.1, 0.2, 0.3)}), charts=True
    ).charts
    assert [name for name in CHARTS if other[name] == charts[name]] == []


def test_the_dots_of_the_reliability_diagram_lie_where_the_groups_are(
    manifest: ModelManifest, held_out: HeldOut
) -> None:
    evidence = collect_evidence(manifest, held_out, charts=True)
    svg = evidence.charts["reliability"]
    (frame,) = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    left, top, width, height = map(float, frame)
    dots = re.findall(r'<use href="#[\w-]+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--accent\)', svg)
    drawn = [((float(x) - left) / width, 1.02 * (top + height - float(y)) / height) for x, y in dots]
    # The last one is that of the legend.
    assert len(drawn) == 16
    for (across, up), group in zip(drawn, evidence.bins, strict=False):
        assert (across, up) == pytest.approx((group.predicted, group.observed), abs=1e-3)


def test_a_column_name_is_never_markup_and_never_mathematics(held_out: HeldOut, tmp_path: Path) -> None:
    name = r'x$\frac{1}$<script>alert(1)</script>"|*'
    odd = replace(
        held_out,
        columns={name: held_out.columns["source"]},
        importance={name: (0.5, 0.4, 0.6)},
        drift={name: "drifting"},
    )
    html, markdown = render(build_manifest(tmp_path, held_out, dropped={name: "constant"}), odd)
    assert not [tag for tag, _ in Page(html).tags if tag == "script"]
    assert r"x$\frac{1}$&lt;script&gt;" in html
    assert "<script>" not in markdown.replace("\\<script>", "")


# Slices


def test_the_parts_of_each_division_are_all_held_out_leads(held_out: HeldOut) -> None:
    divisions = build_divisions(held_out)
    assert [division.title for division in divisions] == ["verdict", "time", "source", "opted_in"]
    for division in divisions:
        assert sum(part.leads for part in division.slices) == ROWS
        reached = sum(part.observed * part.leads for part in division.slices)
        assert reached == pytest.approx(held_out.outcome.sum())
    verdict, time, source, opted = divisions
    assert [part.name for part in verdict.slices] == list(VERDICTS)
    assert [part.name for part in time.slices] == ["earlier half", "later half"]
    assert next(part.name for part in source.slices) == "website"
    assert {part.name for part in source.slices} == {"website", "fair", "referral", OTHERS, UNKNOWN}
    assert {part.name for part in opted.slices} == {"yes", "no"}
    chosen = held_out.verdict == 0
    assert verdict.slices[0].roc_auc == roc_auc_score(held_out.outcome[chosen], held_out.probability[chosen])


def test_a_slice_says_nothing_without_leads_enough_and_no_area_without_both_outcomes() -> None:
    few = build_held_out(verdict=np.r_[np.full(ROWS - 5, 0), np.full(5, 2)].astype(np.uint8))
    small = build_divisions(few)[0].slices[1]
    assert (small.name, small.leads, small.told) == ("abstain", 5, False)
    one = build_held_out(outcome=np.r_[np.zeros(ROWS // 2), np.ones(ROWS // 2)].astype(np.int64))
    assert [part.roc_auc for part in build_divisions(one)[1].slices] == [None, None]


def test_a_rare_value_is_named_nowhere(manifest: ModelManifest, held_out: HeldOut) -> None:
    for text in render(manifest, held_out):
        assert "vantablack" not in text.casefold()
        assert "website" in text
    texts = np.full(ROWS, "Usual", object)
    texts[: MIN_SLICE_ROWS - 1] = "Scarce"
    alone = replace(held_out, columns={"source": Column("text", texts, np.ones(ROWS, np.bool_))})
    assert [division.title for division in build_divisions(alone)] == ["verdict", "time"]
    values = held_out.columns["source"].values.copy()
    values[: MIN_SLICE_ROWS - 1] = "Scarce"
    values[100 : 100 + MIN_SLICE_ROWS] = "Plenty"
    named = build_divisions(
        replace(held_out, columns={"source": Column("text", values, np.ones(ROWS, np.bool_))})
    )[2]
    assert {"scarce", "plenty"} & {part.name for part in named.slices} == {"plenty"}


def test_a_part_the_model_is_wrong_about_is_found_and_others_are_not(held_out: HeldOut) -> None:
    assert find_off_slices(build_divisions(held_out)) == []
    fair = held_out.columns["source"].values == "fair"
    wrong = replace(held_out, probability=np.where(fair, held_out.probability / 2, held_out.probability))
    assert find_off_slices(build_divisions(wrong))[0][0] == "source"
    assert find_off_slices(build_divisions(wrong))[0][1].name == "fair"


@pytest.mark.parametrize(("half_life", "intercept"), [(None, False), (0.5, False), (None, True)])
def test_a_rate_that_recency_has_moved_is_not_told_as_that_of_all_leads(
    half_life: float | None, intercept: bool, manifest: ModelManifest, held_out: HeldOut
) -> None:
    recency = {"half_life": half_life, "intercept": intercept, "tried": []}
    told = msgspec.structs.replace(
        manifest, report={**manifest.report, "choice": {**CHOICE, "recency": recency}}
    )
    page = render(told, held_out, charts=False)[1]
    late = " of late" if half_life or intercept else ""
    assert f"{told.base_rate:.1%} reached the outcome{late}\n" in page
    assert f"| outcome rate{late} | {told.base_rate:.1%} |" in page


@pytest.mark.parametrize(("outcomes", "positives", "expected"), [(0, 0, 0.1), (20, 0, 0.023), (10, 1, 0.3)])
def test_a_day_one_card_tells_what_was_seen_from_what_is_expected(
    outcomes: int, positives: int, expected: float, tmp_path: Path
) -> None:
    known = {
        "outcomes": outcomes,
        "positives": positives,
        "evidence": 0.2,
        "enough": 200,
        "enough_of_each": 40,
    }
    manifest = build_manifest(tmp_path, None, day_one=known)
    training = msgspec.structs.replace(
        manifest.training,
        train_rows=outcomes,
        test_rows=0,
        positives=positives,
        as_of_from=None,
        as_of_to=None,
    )
    manifest = msgspec.structs.replace(manifest, training=training, base_rate=expected)
    page = build_markdown(build_card(manifest, None, charts=False))
    assert (
        f"**{outcomes} leads** {positives} of them reached the outcome, {expected:.1%} are expected to"
        in page
    )
    assert f"| expected rate | {expected:.1%} |" in page
    assert "outcome rate" not in page
    assert "when it came" not in page, "nobody asked: there is nothing to measure in order"


@pytest.mark.parametrize(
    ("outcomes", "positives", "said"),
    [
        (199, 0, "Train again at 200 outcomes, 40 of each kind."),
        (5000, 39, "Train again at 40 leads with the outcome; 39 of 5,000 are known."),
        (5000, 4961, "Train again at 40 leads without the outcome; 39 of 5,000 are known."),
        (500, 0, "40 leads with the outcome; 0 of 500 are known. Or is this not the label, or --positive of"),
        (
            500,
            500,
            "40 leads without the outcome; 0 of 500 are known. Or is this not the label, or --positive",
        ),
    ],
)
def test_a_day_one_model_asks_for_what_is_missing(outcomes: int, positives: int, said: str) -> None:
    known = {"outcomes": outcomes, "positives": positives, "evidence": 0, "enough": 200, "enough_of_each": 40}
    assert said in describe_day_one(known)
    assert ("--positive" in describe_day_one(known)) is ("--positive" in said)


@pytest.mark.parametrize("learnt", [True, False])
def test_a_card_promises_an_order_only_where_the_model_makes_one(learnt: bool, tmp_path: Path) -> None:
    manifest = build_manifest(tmp_path, None)
    weights = [1.0 if learnt else 0.0, *[0.0] * (len(manifest.feature_set) - 1)]
    page = build_markdown(
        build_card(msgspec.structs.replace(manifest, feature_weights=weights), None, charts=False)
    )
    assert ("whom to call first" in page) is learnt
    assert ("cannot put them in an order" in page) is not learnt


# Limits


def test_limits_are_those_of_this_model(manifest: ModelManifest, held_out: HeldOut) -> None:
    calm = limits_of(manifest, held_out)
    assert "tell it nothing that the others do not (shuffling them costs nothing): idle" in calm
    assert re.search(r"held-out ones \d\.\d% caution, \d\.\d% abstain", calm)
    for unfounded in (
        "rate moved",
        "predictions are too",
        "values changed",
        "Suspicious",
        "undecided",
        "open",
    ):
        assert unfounded not in calm
    assert "No column as_of or created_at tells of every lead when it came" in calm
    training = msgspec.structs.replace(
        manifest.training, as_of_from="2025-01-01T00:00:00Z", as_of_to="2025-09-30T00:00:00Z"
    )
    dated = msgspec.structs.replace(manifest, training=training, report={**manifest.report, "split": "time"})
    assert "learnt from leads of 2025-01-01 to 2025-09-30; what changed" in limits_of(dated, held_out)
    tested = msgspec.structs.replace(
        dated, report={**dated.report, "tested": ["2025-10-01T00:00:00Z", "2025-12-30T00:00:00Z"]}
    )
    assert "2025-09-30, and was tested on leads of 2025-10-01 to 2025-12-30;" in limits_of(tested, held_out)
    assert "when it came" not in limits_of(dated, held_out)
    assert "nothing was learnt from, the most recent ones." in render(dated, held_out, charts=False)[1]
    moved = msgspec.structs.replace(dated, base_rate=manifest.base_rate + 0.1)
    assert "The outcome rate moved" in limits_of(moved, held_out)
    assert f"it goes by {moved.base_rate:.1%}" in limits_of(moved, held_out)
    drifting = replace(held_out, drift={"source": "drifting", "opted_in": "stable"})
    assert "the values changed in: source." in limits_of(dated, drifting)
    drawn = limits_of(msgspec.structs.replace(moved, report={**moved.report, "split": "random"}), drifting)
    assert "moved" not in drawn, "leads that were drawn at random differ by the draw, not by the time"
    assert "changed in" not in drawn
    fair = held_out.columns["source"].values == "fair"
    wrong = replace(held_out, probability=np.where(fair, held_out.probability / 2, held_out.probability))
    assert "Where source is 'fair' the predictions are too low" in limits_of(manifest, wrong)
    sure = replace(held_out, probability=held_out.probability**2)
    assert "groups of the reliability diagram" in limits_of(manifest, sure)


def test_what_was_left_out_or_looks_odd_is_said(held_out: HeldOut, tmp_path: Path) -> None:
    report = {"undecided": 1234, "beforehand": 5678, "warnings": ["tags: separates 0.98"],
              "dropped": {"city": "constant"}, "excluded": ["owner"]}  # fmt: skip
    for text in render(build_manifest(tmp_path, held_out, **report), held_out, charts=False):
        assert "1,234 leads whose outcome was still open" in text
        assert "5,678 leads that had the outcome before their as-of time" in text
        assert "left out, outcome before the as-of time" in text
        assert "Suspicious column: tags: separates 0.98" in text
        assert all(word in text for word in ("Columns left out", "city", "constant", "owner", "by hand"))


# The page


def test_the_page_loads_nothing_runs_nothing_and_every_chart_has_words(
    held_out: HeldOut, tmp_path: Path
) -> None:
    html, _ = render(build_manifest(tmp_path, held_out, choice=CHOICE), held_out)
    assert len(html) < 400_000
    page = Page(html)
    assert "http" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [
        name for name in names if name.startswith("on") or name in {"src", "srcset", "data", "action"}
    ]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "form", "a"}
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= set(links)
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == len(CHARTS)
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    assert html.count("<figcaption>How to read it: ") == len(CHARTS)
    assert '<meta name="viewport"' in html
    assert "prefers-color-scheme:dark" in html


def test_markdown_has_every_row_of_the_page(held_out: HeldOut, tmp_path: Path) -> None:
    html, markdown = render(build_manifest(tmp_path, held_out, choice=CHOICE), held_out)
    lines = set(markdown.splitlines())
    rows = Page(html).rows
    assert len(rows) > 60
    assert not [row for row in rows if f"| {' | '.join(row)} |" not in lines]
    assert "How to read it" not in markdown  # there is nothing to look at
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert re.findall("^## (.*)$", markdown, re.MULTILINE) == headings
    assert [heading for heading in headings if "what it is" in heading.casefold()] == [
        "What it is for",
        "What it is not for",
    ]


def test_the_candidates_and_the_intervals_come_from_the_report(
    manifest: ModelManifest, held_out: HeldOut, tmp_path: Path
) -> None:
    compared = build_manifest(tmp_path, held_out, choice=CHOICE, intervals={"roc_auc": [0.81, 0.87]})
    _, markdown = render(compared, held_out, charts=False)
    assert "| boosting, small | 0.4181 ± 0.0112 | 0.8803 | 0.1327 | 5 | chosen |" in markdown
    assert "| forest, deep | 0.4243 ± 0.0131 | 0.8771 | 0.1349 | 5 | runner-up |" in markdown
    assert "| isotonic | 0.4179 | 0.0093 | 0.0101 | chosen |" in markdown
    assert "in the order of time" in markdown
    assert "recency" not in markdown
    assert "log-odds" not in markdown
    moving = {
        **CHOICE,
        "recency": {
            "half_life": 0.5,
            "intercept": True,
            "log_loss_without": 0.41791,
            "leads": 1200,
            "tried": [1],
        },
    }
    shifted = msgspec.structs.replace(
        compared,
        report={**compared.report, "choice": moving},
        calibrator={**compared.calibrator, "shift": -0.125},
    )
    _, markdown = render(shifted, held_out, charts=False)
    assert "moved all probabilities down by 0.125 in log-odds" in markdown
    assert "| weights that halve with age | after 50% of the training window |" in markdown
    assert "| level set anew to the latest leads | yes |" in markdown
    assert "| log-loss without | 0.4179 |" in markdown
    assert "| leads foretold | 1,200 |" in markdown
    assert "tried" not in markdown
    assert "confidence interval" not in markdown
    coverage = {"bins": 15, "covered": 14, "covered_without_width": 13, "mean_width": 0.0123}
    told = msgspec.structs.replace(shifted, report={**shifted.report, "interval_coverage": coverage})
    _, with_intervals = render(told, held_out, charts=False)
    assert "It is no confidence interval" in with_intervals
    assert "in 14 of 15 bins, the bare probabilities in 13; mean width 0.0123" in with_intervals
    assert re.search(r"\| ROC AUC \| 0\.\d{4} \| 0\.8100 to 0\.8700 \|", markdown)
    _, plain = render(manifest, held_out, charts=False)
    assert "Candidates compared" not in plain
    assert "interval" not in plain


def test_a_model_without_held_out_leads_has_a_card_that_says_so(tmp_path: Path) -> None:
    html, markdown = render(build_manifest(tmp_path, None), None)
    Page(html)
    assert "No leads were set aside to test it on" in markdown
    assert "What it is not for" in markdown
    assert "Reliability" not in markdown


def test_without_matplotlib_the_card_has_the_figures_and_says_how_to_get_the_charts(
    manifest: ModelManifest, held_out: HeldOut
) -> None:
    html, markdown = render(manifest, held_out, charts=False)
    assert "<svg" not in html
    assert escape(NO_CHARTS) in html
    assert NO_CHARTS.replace("`", "\\`").replace("[", "\\[") in markdown
    drawn, _ = render(manifest, held_out)
    assert NO_CHARTS not in drawn
    assert Page(html).rows == Page(drawn).rows


def test_training_imports_what_draws_only_when_it_draws() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import app.training.train\n"
        "from app.training.card_evidence import charts_available\n"
        "print(charts_available())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def with_features(manifest: ModelManifest, *specs: FeatureSpec) -> ModelManifest:
    return msgspec.structs.replace(
        manifest,
        feature_set=FeatureSet(specs).to_json(),
        statistics=[manifest.statistics[0]] * len(specs),
        golden_inputs=[[None] * len(specs)] * len(manifest.golden_outputs),
    )


def test_what_a_feature_means_is_said_for_the_column_as_a_whole(
    manifest: ModelManifest, held_out: HeldOut
) -> None:
    column, moment, number = ("source", "text"), ("called", "timestamp"), ("gpa", "number")
    levels = [
        spec("one_of", column, name=f"source={level}", params={"values": [level]}, missing="zero",
             description=f"source is {level}")
        for level in ("website", "fair")
    ]  # fmt: skip
    other = spec("level", column, name="source", description="source is none of the usual ones",
                 params={"levels": {"website": 0.0, "fair": 0.0}, "unseen": 1.0, "missing": 0.0})  # fmt: skip
    called = spec("age_days", moment, name="called", description="last call")
    gpa = [spec("value", number, name="gpa", description="grade"),
           spec("is_present", number, name="gpa__present", description="whether grade is known")]  # fmt: skip
    many = with_features(manifest, other, *levels, called, *gpa)
    losses = (0.05, 0.04, 0.06)
    shown = replace(held_out, importance=dict.fromkeys(("source", "called", "gpa"), losses))
    lines = render(many, shown, charts=False)[1].splitlines()
    assert [line.split(" | ")[-1] for line in lines if "0.0400 to 0.0600" in line] == [
        "which of 2 usual values it is, none of them, or not known |",
        "days since last call |",
        "grade, and whether it is known |",
    ]
