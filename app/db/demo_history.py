"""What happens to the leads of a demo CRM after they enquire, drawn at random: touchpoints and applications.

Touchpoints hint at the outcome without knowing it. They follow the lead's hidden interest, are drawn without
looking at the application, and go on after it as before; only a lead who is still interested turns to us or
applies. Pure: all draws come from the generator handed in, times are whole seconds since 1970 UTC.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from app.db import demo_words as words
from app.db.demo_leads import DAY, NEVER, Bools, Floats, Ints, Leads, chance, propensity

KINDS = (
    ("site_visit", "inbound"), ("message", "inbound"), ("event", "inbound"), ("email_open", "inbound"),
    ("email", "outbound"), ("call", "outbound"),
)  # fmt: skip
SITE_VISIT, MESSAGE, EVENT, EMAIL_OPEN, EMAIL, CALL = range(len(KINDS))

_EMAILS = np.array([3.5, 5.5])
"""E-mails sent to a lead, on average: without and with the newsletter."""
_CALLS = np.array([0.0, 1.8])
"""Calls made to a lead, on average: without and with a telephone number."""

_Moments = tuple[Ints, Ints]
"""Whose (index of the lead) and when, as two arrays of the same length."""


@dataclass(frozen=True, slots=True, eq=False)
class Touchpoints:
    """Touchpoints in order of lead and time; `kind` is an index into `KINDS`, `seconds` may be `NEVER`."""

    owner: Ints
    kind: Ints
    occurred: Ints
    seconds: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Applications:
    """Applications in order of lead and time; `returning` marks those from before the enquiry."""

    owner: Ints
    programme: Ints
    submitted: Ints
    returning: Bools


def draw_applications(rng: Generator, leads: Leads, until: int) -> Applications:
    """Draws the applications up to `until`: those before the enquiry, the one after it, at times a second."""
    everyone = np.arange(leads.created.size)
    earlier = np.repeat(everyone, leads.prior_applications)
    earlier_at = leads.created[earlier] - rng.integers(60 * DAY, 600 * DAY, earlier.size)
    applied_at = _draw_decisions(rng, leads)
    applies = applied_at != NEVER
    again = applies & (rng.random(everyone.size) < 0.08)
    again_at = applied_at + rng.integers(DAY, 40 * DAY, everyone.size)
    changed = rng.random(everyone.size) < 0.12
    another = rng.integers(0, len(words.PROGRAMMES), everyone.size)
    chosen = np.where(changed, another, leads.programme)
    owner = np.concatenate([earlier, everyone[applies], everyone[again]])
    submitted = np.concatenate([earlier_at, applied_at[applies], again_at[again]])
    programme = np.concatenate([leads.programme[earlier], chosen[applies], another[again]])
    order = np.lexsort((submitted, owner))
    order = order[submitted[order] <= until]
    return Applications(owner[order], programme[order], submitted[order], order < earlier.size)


def _draw_decisions(rng: Generator, leads: Leads) -> Ints:
    """Draws when each lead applies, or `NEVER`.

    The delay is log-normal, days to weeks, shorter for the interested and when the intake is near; whoever
    has lost interest by then does not apply after all.
    """
    near = leads.intake - leads.created < 120 * DAY
    days = rng.lognormal(np.log(45) - 0.25 * leads.interest - 0.3 * near, 0.85)
    applied_at = leads.created + 3600 + (days * DAY).astype(np.int64)
    applies = (rng.random(applied_at.size) < chance(propensity(leads))) & (applied_at < leads.lost)
    return np.where(applies, applied_at, NEVER)


def draw_touchpoints(rng: Generator, leads: Leads, until: int) -> Touchpoints:
    """Draws the touchpoints up to `until`; interest shows in how many and for how long."""
    emails = _draw_outreach(rng, leads, _EMAILS[leads.newsletter.astype(np.int64)], days=60)
    streams = (
        *_draw_inbound(rng, leads),
        (EMAIL_OPEN, _draw_opens(rng, leads, emails)),
        (EMAIL, emails),
        (CALL, _draw_outreach(rng, leads, _CALLS[leads.known["phone"].astype(np.int64)], days=25)),
        *_draw_first_answers(rng, leads),
    )
    owner = np.concatenate([moments[0] for _, moments in streams])
    occurred = np.concatenate([moments[1] for _, moments in streams])
    kind = np.concatenate([np.full(moments[0].size, code) for code, moments in streams])
    seconds = _draw_durations(rng, kind, leads.interest[owner])
    order = np.lexsort((kind, occurred, owner))
    order = order[occurred[order] <= until]
    return Touchpoints(owner[order], kind[order], occurred[order], seconds[order])


def _draw_inbound(rng: Generator, leads: Leads) -> Sequence[tuple[int, _Moments]]:
    """Draws moments at which leads turn to us: dense at the enquiry, thinning out until interest is lost."""
    tracked = np.array([source.tracked for source in words.SOURCES])[leads.source]
    visitors = rng.random(tracked.size) < tracked
    lasts = leads.lost - leads.created
    rates = (
        (SITE_VISIT, 5.0 * visitors * np.exp(1.0 * leads.interest), -2),
        (MESSAGE, 1.2 * np.exp(1.0 * leads.interest), 0),
        (EVENT, 0.2 * np.exp(0.8 * leads.interest), 3),
    )
    streams = []
    for kind, rate, start_days in rates:
        owner = np.repeat(np.arange(lasts.size), rng.poisson(rate * np.sqrt(lasts / (80 * DAY))))
        offset = start_days * DAY + lasts[owner] * rng.random(owner.size) ** 1.7
        streams.append((kind, (owner, leads.created[owner] + offset.astype(np.int64))))
    return streams


def _draw_outreach(rng: Generator, leads: Leads, mean: Floats, *, days: float) -> _Moments:
    """Draws moments after the first answer when staff turn to leads, not knowing who lost interest."""
    answered = leads.answer_seconds != NEVER
    owner = np.repeat(np.arange(mean.size), rng.poisson(mean * answered))
    after = leads.answer_seconds[owner] + rng.exponential(days * DAY, owner.size).astype(np.int64)
    return owner, leads.created[owner] + after


def _draw_opens(rng: Generator, leads: Leads, emails: _Moments) -> _Moments:
    owner, sent = emails
    opened = (rng.random(owner.size) < chance(1.2 * leads.interest[owner] - 0.3)) & (sent < leads.lost[owner])
    delay = (3600 * rng.lognormal(2.0, 1.5, owner.size)).astype(np.int64)
    return owner[opened], (sent + delay)[opened]


def _draw_first_answers(rng: Generator, leads: Leads) -> Sequence[tuple[int, _Moments]]:
    """Draws how staff answer: half of those who left a number get a call, the others an e-mail."""
    called = leads.known["phone"] & (rng.random(leads.created.size) < 0.5)
    answered = leads.answer_seconds != NEVER
    calls, emails = np.flatnonzero(answered & called), np.flatnonzero(answered & ~called)
    at = leads.created + leads.answer_seconds
    return (CALL, (calls, at[calls])), (EMAIL, (emails, at[emails]))


def _draw_durations(rng: Generator, kind: Ints, interest: Floats) -> Ints:
    """Draws seconds: of a visit, a call (0 when nobody answers) or an event; other kinds have none."""
    visit = 60 + rng.lognormal(5.0 + 0.2 * interest, 0.8)
    answered = rng.random(kind.size) < chance(1.1 * interest - 0.2)
    call = np.where(answered, 30 + rng.lognormal(5.2, 0.7, kind.size), 0)
    seconds = np.select([kind == SITE_VISIT, kind == CALL, kind == EVENT], [visit, call, 5400.0], NEVER)
    return seconds.astype(np.int64)
