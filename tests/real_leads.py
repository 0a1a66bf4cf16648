"""Where the real leads lie, and which of their columns know the outcome.

The file may not be redistributed, so it lies outside the repository, where `REAL_LEADS` says or beside it; CI
has it and must run these tests.
"""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "x_education_leads.csv"
CSV = Path(os.environ.get("REAL_LEADS") or _BESIDE).resolve()
TRAPS = (
    "tags",
    "lead_quality",
    "lead_profile",
    "asymmetrique_activity_index",
    "asymmetrique_profile_index",
    "asymmetrique_activity_score",
    "asymmetrique_profile_score",
    "last_activity",
    "last_notable_activity",
)

needs_real_leads = pytest.mark.skipif(
    not CSV.exists() and os.environ.get("CI") != "true",
    reason=f"the real leads are not at {CSV}; REAL_LEADS says where else",
)
