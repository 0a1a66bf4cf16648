"""The demo CRM's rows as columns of text, ready for COPY.

Turns what was drawn into names, addresses and timestamps; made-up personal data is drawn here, and
nothing else depends on it. Knows no database. Called by `app.db.demo_crm`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from app.db import demo_words as words
from app.db.bulk_copy import CopyColumn
from app.db.demo_history import KINDS, Applications, Touchpoints
from app.db.demo_leads import DAY, NEVER, Bools, Ints, Leads


def draw_ids(rng: Generator, n: int) -> list[str]:
    """Draws random UUIDs (version 4)."""
    octets = np.frombuffer(rng.bytes(16 * n), dtype=np.uint8).reshape(n, 16).copy()
    octets[:, 6] = octets[:, 6] & 0x0F | 0x40
    octets[:, 8] = octets[:, 8] & 0x3F | 0x80
    digits = octets.tobytes().hex()
    whole = (digits[at : at + 32] for at in range(0, 32 * n, 32))
    return [f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}" for h in whole]


def draw_personal_columns(rng: Generator, leads: Leads, first: int) -> dict[str, CopyColumn]:
    """Draws made-up names, reserved addresses and numbers for leads number `first` and on."""
    n = leads.created.size
    given = _choose(rng, words.FIRST_NAMES, n)
    family = _choose(rng, words.LAST_NAMES, n)
    parts = zip(given, family, range(first, first + n), _choose(rng, words.MAIL_DOMAINS, n), strict=True)
    phones = zip(_choose(rng, words.PHONE_PREFIXES, n), rng.integers(0, 1000, n), strict=True)
    born = leads.created - (DAY * 365.25 * np.clip(rng.gamma(2.0, 4.0, n) + 17, 17, 70)).astype(np.int64)
    dates = np.datetime_as_string(born.astype("datetime64[s]"), unit="D").tolist()
    return {
        "full_name": [f"{a} {b}" for a, b in zip(given, family, strict=True)],
        "email": [f"{a}.{b}.{number}@{domain}".lower() for a, b, number, domain in parts],
        "phone": _where(leads.known["phone"], [f"{prefix}{digits:03d}" for prefix, digits in phones]),
        "birth_date": _where(rng.random(n) < 0.55, dates),
        "notes": _where(rng.random(n) < 0.5, _choose(rng, words.NOTES, n)),
    }


def build_attribute_columns(leads: Leads, programme_ids: list[str]) -> dict[str, CopyColumn]:
    """Returns what a lead said at the enquiry, as far as it is known."""
    known = leads.known
    newsletter = np.where(leads.newsletter, "t", "f").tolist()
    return {
        "source": _pick([source.name for source in words.SOURCES], leads.source),
        "country": _where(known["country"], _pick([c.name for c in words.COUNTRIES], leads.country)),
        "education_level": _where(
            known["education"], _pick([e.name for e in words.EDUCATION], leads.education)
        ),
        "gpa": _where(known["gpa"], [f"{gpa:.2f}" for gpa in leads.gpa]),
        "programme_id": _where(known["programme"], _pick(programme_ids, leads.programme)),
        "intake_at": _where(known["intake"], _moments(leads.intake)),
        "newsletter_opt_in": _where(known["newsletter"], newsletter),
        "created_at": _moments(leads.created),
    }


def draw_standing_columns(
    rng: Generator, leads: Leads, applications: Applications, touchpoints: Touchpoints, until: int
) -> dict[str, CopyColumn]:
    """Returns what the CRM says of each lead at the end. It knows the outcome, so no view shows any of it."""
    n = leads.created.size
    applied = np.bincount(applications.owner[~applications.returning], minlength=n) > 0
    touches = np.bincount(touchpoints.owner, minlength=n)
    cold = until - leads.created > 180 * DAY
    engagement = np.clip(12 * np.log1p(touches) + rng.normal(0, 6, n), 0, 100).astype(np.int64)
    score = np.clip(0.6 * engagement + 35 * applied + rng.normal(5, 8, n), 0, 100).astype(np.int64)
    stages = {"applied": applied, "lost": cold, "engaged": touches > 5, "contacted": touches > 0}
    states = np.select(list(stages.values()), list(stages), "new")
    return {
        "lead_score": _texts(score),
        "engagement_score": _texts(engagement),
        "touchpoint_count": _texts(touches),
        "lifecycle_state": states.tolist(),
        "status": np.where(applied | cold, "closed", "open").tolist(),
    }


def build_touchpoint_columns(touchpoints: Touchpoints, ids: list[str], written: int) -> dict[str, CopyColumn]:
    """Returns touchpoints numbered from `written + 1`."""
    n = touchpoints.owner.size
    return {
        "id": _texts(np.arange(written + 1, written + n + 1)),
        "person_id": _pick(ids, touchpoints.owner),
        "kind": _pick([kind for kind, _ in KINDS], touchpoints.kind),
        "direction": _pick([direction for _, direction in KINDS], touchpoints.kind),
        "occurred_at": _moments(touchpoints.occurred),
        "duration_seconds": _where(touchpoints.seconds != NEVER, _texts(touchpoints.seconds)),
    }


def build_application_columns(
    applications: Applications, leads: Leads, ids: list[str], programme_ids: list[str], written: int
) -> dict[str, CopyColumn]:
    """Returns applications numbered from `written + 1`."""
    n = applications.owner.size
    return {
        "id": _texts(np.arange(written + 1, written + n + 1)),
        "person_id": _pick(ids, applications.owner),
        "programme_id": _pick(programme_ids, applications.programme),
        "source": _pick([source.name for source in words.SOURCES], leads.source[applications.owner]),
        "submitted_at": _moments(applications.submitted),
    }


def _choose(rng: Generator, values: Sequence[str], n: int) -> list[str]:
    return _pick(values, rng.integers(0, len(values), n))


def _pick(values: Sequence[str], indices: Ints) -> list[str]:
    picked: list[str] = np.array(values, dtype=object)[indices].tolist()
    return picked


def _where(known: Bools, values: Sequence[str]) -> CopyColumn:
    return [value if there else None for there, value in zip(known.tolist(), values, strict=True)]


def _texts(numbers: NDArray[Any]) -> list[str]:
    return list(map(str, numbers.tolist()))


def _moments(seconds: Ints) -> list[str]:
    texts: list[str] = np.datetime_as_string(seconds.astype("datetime64[s]"), timezone="UTC").tolist()
    return texts
