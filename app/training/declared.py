"""The declared feature set of the shipped model: 20 features over the columns of the view `lead_source`.

The list is the decision of people; only the numbers behind the levels are learnt, on training rows. A
relation with other columns is trained on derived features instead.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from app.ai.domain import ColumnKind, InputColumn, IntArray, LeadColumns
from app.ai.features import FeatureSet, FeatureSpec
from app.errors import TrainingError
from app.training.levels import learn_levels

_COLUMNS_OF_KIND: Mapping[ColumnKind, tuple[str, ...]] = {
    "timestamp": ("created_at", "intake_at", "last_touch_at"),
    "text": ("source", "programme", "study_mode", "country", "education_level"),
    "number": (
        "tuition_fee", "gpa", "first_response_minutes", "touchpoint_count", "inbound_count", "emails_opened",
        "calls_answered", "events_attended", "minutes_on_site", "prior_applications",
    ),
    "boolean": ("has_phone", "newsletter_opt_in"),
}  # fmt: skip
_KINDS = {column: kind for kind, columns in _COLUMNS_OF_KIND.items() for column in columns}


class _Feature(NamedTuple):
    name: str
    transform: str
    columns: tuple[str, ...]
    description: str


_FEATURES = (
    _Feature("lead_age_days", "age_days", ("created_at",), "enquiry"),
    _Feature("days_since_last_touch", "age_days", ("last_touch_at",), "last contact"),
    _Feature("days_until_intake", "days_until", ("intake_at",), "intake asked for"),
    _Feature("source", "level", ("source",), "how the lead found us"),
    _Feature("programme", "level", ("programme",), "programme asked for"),
    _Feature("study_mode", "level", ("study_mode",), "how the programme is taught"),
    _Feature("country", "level", ("country",), "country of residence"),
    _Feature("education_level", "level", ("education_level",), "highest education so far"),
    _Feature("tuition_fee", "value", ("tuition_fee",), "tuition fee of the programme"),
    _Feature("gpa", "value", ("gpa",), "grade point average as the lead stated it"),
    _Feature("first_response", "log1p", ("first_response_minutes",), "minutes until we answered"),
    _Feature("has_phone", "flag", ("has_phone",), "phone number left"),
    _Feature("newsletter_opt_in", "flag", ("newsletter_opt_in",), "newsletter asked for"),
    _Feature("touchpoints", "log1p", ("touchpoint_count",), "contacts of any kind"),
    _Feature(
        "inbound_share", "ratio", ("inbound_count", "touchpoint_count"), "share of contacts by the lead"
    ),
    _Feature("emails_opened", "log1p", ("emails_opened",), "e-mails opened"),
    _Feature("calls_answered", "log1p", ("calls_answered",), "calls answered"),
    _Feature("events_attended", "value", ("events_attended",), "open days and webinars attended"),
    _Feature("minutes_on_site", "log1p", ("minutes_on_site",), "minutes spent on our site"),
    _Feature("prior_applications", "value", ("prior_applications",), "applications before this enquiry"),
)
"""A level becomes the log-odds of an application among the training rows that have it. Descriptions say what
a number is of, as a salesperson would: "last contact", of which the reasons say that it was 41 days ago."""

DECLARED_COLUMNS: tuple[InputColumn, ...] = tuple(InputColumn(name, kind) for name, kind in _KINDS.items())


def build_declared_features(leads: LeadColumns, outcome: IntArray) -> FeatureSet:
    """Returns the declared features, their levels learnt from these training rows and 0/1 outcomes (n,).

    Raises:
        TrainingError: a text column is empty in all of these rows.
    """
    return FeatureSet(
        tuple(
            FeatureSpec(
                name=feature.name,
                transform=feature.transform,
                inputs=tuple(InputColumn(column, _KINDS[column]) for column in feature.columns),
                params=_params(feature, leads, outcome),
                description=feature.description,
            )
            for feature in _FEATURES
        )
    )


def _params(feature: _Feature, leads: LeadColumns, outcome: IntArray) -> Mapping[str, Any]:
    if feature.transform == "level":
        try:
            return learn_levels(leads.columns[feature.columns[0]], outcome)
        except ValueError as exc:
            raise TrainingError(f"{feature.columns[0]}: {exc}; train on derived features instead.") from exc
    if feature.transform == "ratio":
        # Of no contacts at all, nothing came from the lead.
        return {"zero_over_zero": 0.0}
    return {}
