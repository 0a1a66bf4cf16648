"""The declared feature set of the shipped model: 20 features over the columns of the view `lead_source`.

The list is the decision of people; only the numbers behind the levels are learnt, on training rows. A relation with
other columns is trained on derived features instead. Called by `app.training.train`.
"""

from collections.abc import Mapping
from typing import Any

from app.ai.domain import ColumnKind, InputColumn, IntArray, LeadColumns
from app.ai.features import FeatureSet, FeatureSpec
from app.training.levels import learn_levels

_KINDS: Mapping[str, ColumnKind] = {
    "created_at": "timestamp", "intake_at": "timestamp", "last_touch_at": "timestamp",
    "source": "text", "programme": "text", "study_mode": "text", "country": "text", "education_level": "text",
    "tuition_fee": "number", "gpa": "number", "first_response_minutes": "number", "touchpoint_count": "number",
    "inbound_count": "number", "emails_opened": "number", "calls_answered": "number", "events_attended": "number",
    "minutes_on_site": "number", "prior_applications": "number",
    "has_phone": "boolean", "newsletter_opt_in": "boolean",
}  # fmt: skip

_FEATURES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("lead_age_days", "age_days", ("created_at",), "days since the enquiry"),
    ("days_since_last_touch", "age_days", ("last_touch_at",), "days since anything last happened with this lead"),
    ("days_until_intake", "days_until", ("intake_at",), "days until the intake the lead asked for"),
    ("source", "level", ("source",), "how the lead found us, as log-odds of an application"),
    ("programme", "level", ("programme",), "the programme asked for, as log-odds of an application"),
    ("study_mode", "level", ("study_mode",), "full time, part time or online, as log-odds of an application"),
    ("country", "level", ("country",), "country of residence, as log-odds of an application"),
    ("education_level", "level", ("education_level",), "highest education so far, as log-odds of an application"),
    ("tuition_fee", "value", ("tuition_fee",), "yearly tuition fee of the programme"),
    ("gpa", "value", ("gpa",), "grade point average as stated by the lead"),
    ("first_response", "log1p", ("first_response_minutes",), "log(1 + minutes until we first answered)"),
    ("has_phone", "flag", ("has_phone",), "a phone number was left"),
    ("newsletter_opt_in", "flag", ("newsletter_opt_in",), "the newsletter was asked for"),
    ("touchpoints", "log1p", ("touchpoint_count",), "log(1 + contacts of any kind)"),
    ("inbound_share", "ratio", ("inbound_count", "touchpoint_count"), "share of contacts that came from the lead"),
    ("emails_opened", "log1p", ("emails_opened",), "log(1 + e-mails opened)"),
    ("calls_answered", "log1p", ("calls_answered",), "log(1 + calls answered)"),
    ("events_attended", "value", ("events_attended",), "open days and webinars attended"),
    ("minutes_on_site", "log1p", ("minutes_on_site",), "log(1 + minutes spent on our site)"),
    ("prior_applications", "value", ("prior_applications",), "applications before this enquiry"),
)

DECLARED_COLUMNS: tuple[InputColumn, ...] = tuple(InputColumn(name, kind) for name, kind in _KINDS.items())


def build_declared_features(leads: LeadColumns, outcome: IntArray) -> FeatureSet:
    """Returns the declared features with their levels learnt from these training rows and 0/1 outcomes (n,)."""
    return FeatureSet(tuple(_spec(*entry, leads, outcome) for entry in _FEATURES))


def _spec(
    name: str, transform: str, columns: tuple[str, ...], description: str, leads: LeadColumns, outcome: IntArray
) -> FeatureSpec:
    params: dict[str, Any] = learn_levels(leads.columns[columns[0]], outcome) if transform == "level" else {}
    if transform == "ratio":
        # A share of no contacts at all: nothing came from the lead.
        params = {"zero_over_zero": 0.0}
    inputs = tuple(InputColumn(column, _KINDS[column]) for column in columns)
    return FeatureSpec(name=name, transform=transform, inputs=inputs, params=params, description=description)
