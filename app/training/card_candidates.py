"""Puts into words how a model was chosen: candidates, ways to calibrate, and what is done about change.

The evidence is the manifest's `report.choice`, which a model that nothing was compared for does not have.
Never computes a figure. Called by `model_card`.
"""

from collections.abc import Mapping
from typing import Any

from app.ai.model_manifest import ModelManifest
from app.training.card_page import Section, Table


def describe_candidates(manifest: ModelManifest) -> list[Section]:
    """Returns the section on how the model was chosen, none where nothing was compared."""
    choice: Mapping[str, Any] = manifest.report.get("choice") or {}
    if not choice.get("candidates"):
        return []
    order = "in the order of time" if choice.get("order") == "time" else "at random"
    compared = (
        f"Compared by cross-validation on the training leads, divided {order}; lower log-loss is better. The "
        "held-out leads had no part in it."
    )
    texts = [compared]
    if shift := manifest.calibrator.get("shift"):
        way = "up" if shift > 0 else "down"
        texts.append(f"Recent outcomes moved all probabilities {way} by {abs(shift):.3f} in log-odds.")
    tables = [_candidates(choice)]
    if choice.get("calibrators"):
        tables.append(_calibrators(choice))
    recency = choice.get("recency")
    if isinstance(recency, Mapping) and "log_loss_without" in recency:
        tables.append(_recency(recency))
    return [Section("Candidates compared", texts, tables=tables)]


def _candidates(choice: Mapping[str, Any]) -> Table:
    roles = {choice.get("runner_up"): "runner-up", choice.get("chosen"): "chosen"}
    rows = [
        (
            str(entry.get("name", "")),
            _with_spread(entry, "log_loss"),
            _with_spread(entry, "roc_auc"),
            _with_spread(entry, "brier"),
            _number(entry.get("folds"), ".0f"),
            roles.get(entry.get("name"), ""),
        )
        for entry in choice["candidates"]
    ]
    if alone := choice.get("base_rate_alone"):
        figures = _number(alone.get("log_loss"), ".4f"), "0.5000", _number(alone.get("brier"), ".4f")
        rows.append(("the base rate alone", *figures, "", "to be better than"))
    head = ("candidate", "log-loss", "ROC AUC", "Brier", "folds", "")
    return Table(head, rows, "Candidates (mean ± standard deviation over folds)")


def _calibrators(choice: Mapping[str, Any]) -> Table:
    rows = [
        (
            str(entry.get("method", "")),
            _number(entry.get("log_loss"), ".4f"),
            _number(entry.get("calibration_error"), ".4f"),
            _number(entry.get("noise_floor"), ".4f"),
            "chosen" if entry.get("method") == choice.get("calibrator") else "",
        )
        for entry in choice["calibrators"]
    ]
    head = ("calibrator", "log-loss", "calibration error", "of a perfect one", "")
    return Table(head, rows, "Ways to turn scores into probabilities")


def _recency(facts: Mapping[str, Any]) -> Table:
    half_life = _number(facts.get("half_life"), ".0%")
    rows = [
        ("weights that halve with age", f"after {half_life} of the training window" if half_life else "no"),
        ("level set anew to the latest leads", "yes" if facts.get("intercept") is True else "no"),
        ("log-loss with what is on", _number(facts.get("log_loss_with"), ".4f")),
        ("log-loss without", _number(facts.get("log_loss_without"), ".4f")),
        ("leads foretold", _number(facts.get("leads"), ",.0f")),
    ]
    return Table(("what", "value"), rows, "What is done about a base rate that moves")


def _with_spread(entry: Mapping[str, Any], name: str) -> str:
    spread = _number(entry.get(f"{name}_sd"), ".4f")
    return _number(entry.get(name), ".4f") + (f" ± {spread}" if spread else "")


def _number(value: object, fmt: str) -> str:
    return format(value, fmt) if isinstance(value, int | float) and not isinstance(value, bool) else ""
