"""The people of a demo CRM at the moment they enquire, drawn at random.

Behind every lead stands an interest nobody can see, and a moment at which it is lost. What the lead does
afterwards follows from these and from the attributes drawn here; what is recorded of the attributes has gaps,
the truth has not. Pure: all draws come from the generator handed in, times are whole seconds since 1970 UTC.
Called by the other parts of the demo CRM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from app.db import demo_words as words

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DAY = 86_400
HISTORY_DAYS = 540
NEVER = -1

_STRIDE = 2 - 3**0.5
"""Successive leads lie this share of the history apart: irrational, so any few in a row differ in age."""

_FILLED = {
    "phone": 0.05, "programme": 0.13, "country": 0.10, "education": 0.05, "gpa": -0.12, "intake": -0.02,
    "newsletter": 0.02,
}  # fmt: skip
"""How much likelier than average this field of a form is filled."""


@dataclass(frozen=True, slots=True, eq=False)
class Leads:
    """`n` leads at their enquiry; every array has n entries, choices are indices into `demo_words`.

    `interest` (standard normal) and `lost` (when it ends) are hidden. `answer_seconds` is how long the first
    answer takes, or `NEVER`. `known` tells for each optional field whether it made it into the CRM.
    """

    created: Ints
    source: Ints
    programme: Ints
    country: Ints
    education: Ints
    gpa: Floats
    intake: Ints
    newsletter: Bools
    prior_applications: Ints
    answer_seconds: Ints
    interest: Floats
    lost: Ints
    known: Mapping[str, Bools]


def draw_leads(rng: Generator, first: int, n: int, until: int) -> Leads:
    """Draws leads number `first` to `first + n - 1`, who enquired in the days before `until`."""
    created = _draw_moments(rng, first, n, until)
    source = _draw_choices(rng, n, [source.share for source in words.SOURCES])
    interest = rng.normal(size=n)
    # Who fills in one field fills in the next one too, and forms differ in what they ask.
    diligence = np.array([source.fills for source in words.SOURCES])[source] + rng.normal(0, 0.08, n)
    lasts = rng.lognormal(np.log(80) + 0.7 * interest, 0.9) * DAY
    return Leads(
        created=created,
        source=source,
        programme=_draw_choices(rng, n, [programme.share for programme in words.PROGRAMMES]),
        country=_draw_choices(rng, n, [country.share for country in words.COUNTRIES]),
        education=_draw_choices(rng, n, [education.share for education in words.EDUCATION]),
        gpa=np.clip(np.round(rng.normal(3.0, 0.45, n) + 0.05 * interest, 2), 1.5, 4.0),
        intake=_draw_intakes(rng, created),
        newsletter=rng.random(n) < chance(0.5 * interest - 0.1),
        prior_applications=np.where(rng.random(n) < 0.06, rng.choice([1, 2, 3], n, p=[0.75, 0.2, 0.05]), 0),
        answer_seconds=_draw_answers(rng, source),
        interest=interest,
        lost=created + lasts.astype(np.int64),
        known={name: rng.random(n) < diligence + extra for name, extra in _FILLED.items()},
    )


def propensity(leads: Leads) -> Floats:
    """Returns the log-odds (n,) that a lead would apply if nothing came in between."""
    campus = np.array([words.CAMPUS_EFFECTS[programme.campus] for programme in words.PROGRAMMES])
    answer_hours = np.where(leads.answer_seconds == NEVER, 14 * 24, leads.answer_seconds / 3600)
    days_until_intake = (leads.intake - leads.created) / DAY
    return np.asarray(
        0.8
        + _effects(words.SOURCES)[leads.source]
        + (_effects(words.PROGRAMMES) + campus)[leads.programme]
        + _effects(words.COUNTRIES)[leads.country]
        + _effects(words.EDUCATION)[leads.education]
        + 0.5 * (leads.gpa - 3.0)
        + 0.3 * leads.known["phone"]
        + 0.7 * np.minimum(leads.prior_applications, 2)
        - 0.22 * np.log1p(answer_hours)
        - 0.25 * (days_until_intake - 200) / 100
        + 2.6 * leads.interest
    )


def chance(log_odds: Floats) -> Floats:
    """Returns the probability at these log-odds: `1 / (1 + exp(-x))`."""
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def _effects(choices: Sequence[words.Source | words.Programme | words.Choice]) -> Floats:
    return np.array([choice.effect for choice in choices])


def _draw_choices(rng: Generator, n: int, shares: Sequence[float]) -> Ints:
    weights = np.array(shares)
    return rng.choice(weights.size, n, p=weights / weights.sum())


def _draw_moments(rng: Generator, first: int, n: int, until: int) -> Ints:
    """Draws moments before `until` that follow the calendar and become a little more frequent towards it."""
    midnights = until // DAY * DAY - DAY * np.arange(HISTORY_DAYS)
    months = midnights.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64) % 12
    weekdays = (midnights // DAY + 3) % 7  # 1970-01-01 was a Thursday
    growth = np.linspace(1.25, 0.75, HISTORY_DAYS)
    share = np.cumsum(np.array(words.MONTHS)[months] * np.array(words.WEEKDAYS)[weekdays] * growth)
    place = (rng.uniform(0, 0.04, n) + _STRIDE * np.arange(first, first + n)) % 1
    moments = midnights[np.searchsorted(share / share[-1], place, side="right")]
    moments = moments + 3600 * _draw_choices(rng, n, words.HOURS) + rng.integers(0, 3600, n)
    return np.where(moments < until, moments, moments - DAY)


def _draw_intakes(rng: Generator, created: Ints) -> Ints:
    """Draws the intake asked for: one of the next four, mostly the next, each on 1 February or 1 September.

    A month before an intake its applications are closed and the one after it is offered.
    """
    month = created.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
    of_year = month % 12
    following = month + np.select([of_year == 0, of_year < 7], [8, 8 - of_year], 13 - of_year)
    skipped = rng.choice(4, created.size, p=[0.62, 0.22, 0.11, 0.05])
    half_year = np.where(following % 12 == 1, 7, 5)
    intake = following + 12 * (skipped // 2) + skipped % 2 * half_year
    return np.asarray(intake.astype("datetime64[M]").astype("datetime64[s]").astype(np.int64))


def _draw_answers(rng: Generator, source: Ints) -> Ints:
    """Draws seconds until staff first answer: log-normal round each source's usual, or `NEVER` for some."""
    usual = 60 * np.array([source.answer_minutes for source in words.SOURCES])[source]
    seconds = usual * rng.lognormal(0, 1.1, source.size)
    return np.where(rng.random(source.size) < 0.07, NEVER, seconds.astype(np.int64))
