"""Every environment variable the service reads: typed, frozen, checked once at start.

Only `main`, `cli`, `serve` and `wiring` import this module; everything else is handed plain values.
A wrong value raises `SettingsError`, whose text is one line that names the variable.
"""

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from dotenv.parser import parse_stream
from pydantic import Field, HttpUrl, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    SettingsConfigDict,
)

from app.errors import SettingsError

UNIX_PREFIX = "unix:"
"""What `HOST` begins with when the rest of it is the path of a Unix socket."""

_YEAR_SECONDS = 31_536_000

_match_origin = re.compile(
    r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?"
).fullmatch
_match_moment = re.compile(
    r"[0-9]{4}(-[0-9]{2}){2}([Tt ][0-9]{2}(:[0-9]{2}){2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})?)?"
).fullmatch
_DEFAULT_PORTS = {"http": 80, "https": 443}

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

_OWN_PREFIXES = ("ai_", "auth_", "ml_")

_EXPECTED = {
    "AUTH_KEY_PEPPER": "expected 32 characters or more",
    "AI_RATE_LIMIT": "expected a rate such as 100/second or 6000/minute",
    "ML_MODEL_VERSION": "expected a version, YYYYMMDD_HHMMSS",
}
"""What is said of a wrong value where the library would quote its own rule."""

_DEVELOPMENT_ORIGINS = tuple(
    f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in (3000, 4200, 5173, 8080)
)


class Settings(BaseSettings):
    """The service's settings. Field names are the environment variables in lower case."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    app_env: Literal["development", "production"] = "development"
    """`production` turns every unsafe convenience into a refusal to start."""
    host: str = "127.0.0.1"
    """Address the service listens on, or `unix:` and the path of a Unix socket."""
    port: int = Field(8000, ge=0, le=65535)
    """TCP port the service listens on; 0 takes any free one and says which. A Unix socket has none."""
    workers: int = Field(1, ge=1, le=64)
    """Processes that serve requests; each holds the model and runs one inference thread."""
    var_dir: Path = Path("var")
    """Everything the running service writes: embedded database, telemetry log, versions served. Never
    shared by services with different databases; kept when a container is replaced. What several workers
    count together is in `/dev/shm`, where there is room."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is written to the log (JSON lines on standard error)."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = _DEVELOPMENT_ORIGINS
    """Comma-separated origins a browser may call from (`https://crm.example`)."""

    auth_mode: Literal["none", "api_key", "jwt", "api_key,jwt"] = "none"
    """Which credentials are accepted: `api_key`, `jwt` or `api_key,jwt`; with `none` nobody is asked for
    any."""
    auth_key_pepper: SecretStr | None = Field(None, min_length=32)
    """Secret that API keys are hashed with, 32 characters or more, the same for all processes; another one
    voids every key."""
    auth_jwks_url: HttpUrl | None = Field(None, repr=False)
    """Where the token issuer publishes its public keys (a JSON Web Key Set); `https` in production."""
    auth_jwt_issuer: str | None = None
    """The `iss` that a token must carry."""
    auth_jwt_audience: str | None = None
    """The `aud` that a token must carry."""
    auth_jwt_algorithm: Literal["RS256", "PS256", "ES256", "EdDSA"] = "RS256"
    """The one algorithm that tokens may be signed with: `RS256`, `PS256`, `ES256` or `EdDSA`."""

    database_url: str | None = Field(None, repr=False)
    """The CRM's PostgreSQL (`postgresql://user@host/name`); unset: an embedded one under `VAR_DIR`."""
    database_deadline_seconds: float = Field(1.0, gt=0, le=60)
    """Longest any caller waits for the database, connecting included."""
    database_pool_size: int = Field(8, ge=1, le=200)
    """Connections a worker may hold for reading leads."""
    lead_source: str = "lead_source"
    """Table or view that leads are read from, optionally with its schema (`crm.leads`)."""

    ai_telemetry_enabled: bool = True
    """Record a structured event for every scoring request, before its answer leaves."""
    ai_enable_legacy_advanced_ml: bool = True
    """Mount the legacy router."""
    ai_legacy_sunset: datetime | None = None
    """Date the legacy router ends (RFC 3339; UTC unless it says otherwise); sent as its `Sunset` header."""
    ai_breaker_failures: int = Field(5, ge=1, le=1000)
    """Service failures in a row that open the legacy router's circuit breaker."""
    ai_breaker_open_seconds: float = Field(30.0, gt=0, le=3600)
    """How long the breaker stays open before it lets one probe through."""
    ai_max_body_bytes: int = Field(262_144, ge=1024, le=16_777_216)
    """Largest request body that is read."""
    ai_max_requests_in_flight: int = Field(256, ge=1, le=100_000)
    """Scoring requests a worker answers at once; more are refused with 503 `OVERLOADED`."""
    ai_client_deadline_seconds: float = Field(10.0, gt=0, le=600)
    """Longest a client may take to send a request, and again to take its answer."""
    ai_request_deadline_seconds: float = Field(5.0, gt=1, le=600)
    """Longest the service may take over a request that has arrived; the last second is for its event."""
    drain_seconds: float = Field(2.0, ge=0, le=60)
    """How long a service that got SIGTERM answers on, not ready any more, before it stops listening."""

    ai_rate_limit: str | None = Field(None, pattern=r"^[1-9][0-9]{0,5}/(second|minute|hour)$")
    """Scoring requests one client may send to a worker (`100/second`, `6000/minute`); unset: any number."""

    ml_model_dir: Path = Path("models")
    """Directory of model artifacts and their manifests."""
    ml_model_pattern: str = "advanced_ml_*"
    """Which files in it are candidates."""
    ml_model_version: str | None = Field(None, pattern=r"^[0-9]{8}_[0-9]{6}$")
    """Serve this version (`YYYYMMDD_HHMMSS`) instead of the newest."""
    ml_trusted_keys: Annotated[tuple[bytes, ...], NoDecode] = ()
    """Comma-separated public keys (`leadscore models keygen`); only models signed with one of them serve.
    Unset: unsigned ones do too, which production refuses."""
    ml_cache_ttl_seconds: float = Field(3600.0, gt=0, le=_YEAR_SECONDS)
    """How long a loaded model is trusted before the registry looks again."""
    ml_prediction_cache_ttl_seconds: float = Field(300.0, ge=0, le=_YEAR_SECONDS)
    """How long a prediction of a lead that does not change may be answered from the cache; 0 turns the
    cache off."""
    ml_prediction_cache_size: int = Field(100_000, ge=1, le=10_000_000)
    """Most predictions a worker remembers, at 100 bytes each."""
    ml_degraded_answers: bool = True
    """While the database is away, answer leads whose last prediction is remembered, marked `degraded`."""
    ml_prewarm_leads: int = Field(0, ge=0, le=1_000_000)
    """The newest leads are kept scored ahead of being asked, this many of them; 0: none."""
    ml_min_feature_coverage: float = Field(0.6, ge=0, le=1)
    """Below this share of really present features, each weighed by what it is worth, a prediction says
    `caution`."""
    ml_max_batch_size: int = Field(2000, ge=1, le=2000)
    """Lead IDs in one request."""
    ml_max_reasons_batch: int = Field(100, ge=1, le=2000)
    """Lead IDs in one request that includes reasons or features."""
    ml_confidence_method: Literal["max_probability", "margin", "entropy", "interval"] = "max_probability"
    """How `confidence` is derived: from the probability (`max_probability`, `margin` or `entropy`) or from
    its interval (`interval`)."""

    @field_validator("host")
    @classmethod
    def _path_of_socket(cls, value: str) -> str:
        if value == UNIX_PREFIX:
            raise ValueError(f"the path of the socket is missing after {UNIX_PREFIX}")
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("cors_origins")
    @classmethod
    def _whole_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("'*' is refused because requests may carry credentials; list the origins")
        if not value or not all(map(_is_origin, value)):
            raise ValueError(
                "expected origins as browsers send them, such as https://crm.example or http://localhost:3000:"
                " in lower case, without a path or the scheme's own port"
            )
        return value

    @field_validator("ai_legacy_sunset", mode="before")
    @classmethod
    def _read_moment(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        with suppress(ValueError, OverflowError):
            if _match_moment(value):  # the library reads numbers as well, as seconds since 1970
                moment = datetime.fromisoformat(value.upper())
                return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
        raise ValueError("expected a date such as 2027-03-01 or 2027-03-01T00:00:00Z")

    @field_validator("ml_trusted_keys", mode="before")
    @classmethod
    def _decode_keys(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            keys = tuple(
                base64.b64decode(part.strip(), validate=True) for part in value.split(",") if part.strip()
            )
        except binascii.Error:
            keys = (b"",)
        if not keys or any(len(key) != 32 for key in keys):
            raise ValueError("expected public keys as `leadscore models keygen` prints them, comma-separated")
        return keys

    @field_validator("database_url")
    @classmethod
    def _libpq_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, _, rest = value.partition("://")
        # SQLAlchemy's spelling (postgresql+psycopg://) names a driver, which is no part of the address.
        url = f"postgresql://{rest}"
        if not re.fullmatch(r"postgres(ql)?(\+[a-z0-9]+)?", scheme) or not _can_be_connected_to(url):
            raise ValueError(
                "expected an address such as postgresql://user:password@host:5432/name,"
                " with special characters percent-encoded, a port up to 65535, and of sslmode one of "
                + ", ".join(_SSL_MODES)
            )
        return url

    @field_validator("lead_source")
    @classmethod
    def _plain_relation(cls, value: str) -> str:
        parts = value.split(".")
        if len(parts) > 2 or not all(part.isidentifier() and part.isascii() for part in parts):
            raise ValueError("expected a relation name such as lead_source or crm.leads")
        return value

    @model_validator(mode="after")
    def _room_for_prewarmed_leads(self) -> Self:
        if self.ml_prewarm_leads and not self.ml_prediction_cache_ttl_seconds:
            raise ValueError(
                "ML_PREWARM_LEADS needs the cache that ML_PREDICTION_CACHE_TTL_SECONDS=0 turns off"
            )
        if 4 * self.ml_prewarm_leads > self.ml_prediction_cache_size:
            raise ValueError(
                "ML_PREWARM_LEADS may be a quarter of ML_PREDICTION_CACHE_SIZE at most: a lead has two IDs,"
                " and its next answers are made before its last ones expire"
            )
        return self

    @model_validator(mode="after")
    def _time_to_ask_the_database(self) -> Self:
        if self.database_deadline_seconds + 1 > self.ai_request_deadline_seconds:
            raise ValueError(
                "AI_REQUEST_DEADLINE_SECONDS must be DATABASE_DEADLINE_SECONDS and a second at least:"
                " the event has to be recorded as well"
            )
        return self

    @model_validator(mode="after")
    def _whole_authentication(self) -> Self:
        needed = {
            "api_key": ["auth_key_pepper"],
            "jwt": ["auth_jwks_url", "auth_jwt_issuer", "auth_jwt_audience"],
        }
        for kind in self.auth_mode.split(","):
            for name in needed.get(kind, ()):
                if getattr(self, name) is None:
                    raise ValueError(f"{name.upper()} must be set when AUTH_MODE has {kind}")
        return self

    @model_validator(mode="after")
    def _refuse_conveniences_in_production(self) -> Self:
        if self.app_env == "production":
            if self.database_url is None:
                raise ValueError(
                    "DATABASE_URL must be set when APP_ENV=production: the embedded one is for development"
                )
            if self.cors_origins == _DEVELOPMENT_ORIGINS:
                raise ValueError(
                    "CORS_ORIGINS must be set when APP_ENV=production: the default allows localhost only"
                )
            if self.auth_mode == "none" and not _is_local(self.host):
                raise ValueError(
                    "AUTH_MODE must be set when APP_ENV=production and HOST is neither a loopback address nor"
                    " a Unix socket"
                )
            keys_at = self.auth_jwks_url
            if keys_at is not None and keys_at.scheme != "https" and not _is_local(keys_at.host or ""):
                raise ValueError("AUTH_JWKS_URL must be https when APP_ENV=production")
            if not self.ml_trusted_keys:
                raise ValueError(
                    "ML_TRUSTED_KEYS must be set when APP_ENV=production: only signed models may serve there"
                )
        return self


def _is_origin(text: str) -> bool:
    parts = _match_origin(text)
    if parts is None:
        return False
    scheme, port = parts.groups()
    return port is None or (int(port) <= 65535 and int(port) != _DEFAULT_PORTS.get(scheme))


def _can_be_connected_to(url: str) -> bool:
    """Tells whether the driver understands every part; its own words would quote the one it does not."""
    import psycopg.conninfo  # noqa: PLC0415 - takes longer to import than all else here

    try:
        parts = psycopg.conninfo.conninfo_to_dict(url)
        psycopg.conninfo.timeout_from_conninfo(parts)
    except psycopg.Error:
        return False
    ports = str(parts.get("port", "")).split(",")
    # An @ that is not encoded ends the password: what follows it would be looked up as a host.
    return (
        all(port.isdecimal() and 0 < int(port) <= 65535 for port in ports if port)
        and "@" not in str(parts.get("host", ""))
        and parts.get("sslmode", "prefer") in _SSL_MODES
    )


def _is_local(host: str) -> bool:
    if host.startswith(UNIX_PREFIX):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def find_misspelt(names: Iterable[str]) -> list[str]:
    """Returns those that begin with `AI_`, `AUTH_` or `ML_`, as no other program's do, and are no setting."""
    known = Settings.model_fields.keys()
    return [name for name in names if name.lower().startswith(_OWN_PREFIXES) and name.lower() not in known]


def _check_env_file(path: Path) -> None:
    """Refuses what the library skips: it may be the very line that asks for authentication."""
    try:
        if not path.is_file():  # a virtual environment may have this name
            return
        with path.open(encoding="utf-8") as file:
            bindings = list(parse_stream(file))
    except UnicodeDecodeError as exc:
        raise SettingsError(".env: it is not a text in UTF-8; save it as one") from exc
    except OSError as exc:
        raise SettingsError(f".env: it cannot be read ({(exc.strerror or '').lower()})") from exc
    for binding in bindings:
        text = binding.original.string
        line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
        if binding.error or (binding.key is not None and binding.value is None):
            raise SettingsError(f".env: line {line} is not of the form NAME=value")
        for name in find_misspelt([binding.key or ""]):
            raise SettingsError(f".env: line {line}: there is no setting {name}; .env.example has them all")


def load_settings() -> Settings:
    """Reads the environment and `.env`.

    Raises:
        SettingsError: a value is missing or wrong; the message is one line that names the variable.
    """
    _check_env_file(Path(".env"))
    # Empty counts as not set; of these two that would be what is unsafe, where somebody has set another.
    for source in (EnvSettingsSource, DotEnvSettingsSource):
        given = source(Settings, env_ignore_empty=False).env_vars
        for name in ("app_env", "auth_mode"):
            if given.get(name) == "":
                raise SettingsError(f"{name.upper()}: it is empty; give it a value, or do not set it")
    try:
        return Settings()
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"][:1]).upper()
        message = _EXPECTED.get(name) or first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{name}: {message}" if name else message) from None
