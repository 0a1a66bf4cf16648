"""What a training is asked for; made by the commands, by `shipped_model` and by tests."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from app.ai.model_manifest import ArtifactFormat
from app.errors import TrainingError

ModelType = Literal["auto", "random_forest", "logistic_regression", "hist_gradient_boosting"]
DEFAULT_SOURCE = "lead_training"


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """One training.

    Without `label` the source must have the column `outcome` (a time or NULL) and `as_of`, or else
    `created_at`, which is then the as-of time: a lead is positive when its outcome comes within
    `horizon_days` after its as-of time, and neither positive nor negative before these have passed. With
    `label` that 0/1 column is the outcome.

    `as_of` is the moment up to which anything is known (default: `now`); leads of a time after one that is
    named are left out. `exclude` never feeds the model; `allow_leaky` names columns the leakage guard lets
    pass. `order_by` names the column, a time or any number, that says in which order leads came to be
    (default: `as_of` or `created_at`, where the source has one); it never feeds the model either. `since`
    leaves out leads of an earlier time. `model` is the type to fit, or `auto` for the one that evidence
    favours. `base_rate` is the share of leads expected to reach the outcome, for as long as outcomes are few.
    With `signing_key` what is published is signed. The version is `now`.

    Raises:
        TrainingError: `as_of` is later than `now`.
    """

    url: str
    model_dir: Path
    source: str = DEFAULT_SOURCE
    label: str | None = None
    outcome: str = "outcome_at"
    horizon_days: int = 90
    as_of: datetime | None = None
    since: datetime | None = None
    order_by: str | None = None
    exclude: tuple[str, ...] = ()
    allow_leaky: tuple[str, ...] = ()
    model: ModelType = "auto"
    base_rate: float | None = None
    seed: int = 0
    fmt: ArtifactFormat = "skops"
    signing_key: Ed25519PrivateKey | None = None
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        """Refuses a moment of which nothing can be known."""
        if self.as_of and self.as_of > self.now:
            raise TrainingError(
                f"the as-of time {self.as_of:%Y-%m-%d} has not come yet: a lead whose outcome may still come "
                "would count as lost."
            )

    @property
    def known_until(self) -> float:
        """The moment up to which anything is known, in seconds UTC."""
        return (self.as_of or self.now).timestamp()

    @property
    def model_version(self) -> str:
        """The version to publish under (`YYYYMMDD_HHMMSS`)."""
        return self.now.astimezone(UTC).strftime("%Y%m%d_%H%M%S")

    @property
    def declared(self) -> bool:
        """Whether the declared feature set is used: of the default source, without a label."""
        return self.source == DEFAULT_SOURCE and self.label is None
