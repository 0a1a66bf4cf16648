"""The registry: which model serves, loaded once however many requests wait for it.

The newest version wins, unless one is pinned; a bad one is reported and the next older one is tried, but
never one older than has served before: going back takes a pin. What serves is replaced by one assignment,
never by nothing. Looking at the disk happens on a thread of its own: a request waits for it only while
there is no model at all. Never decides what a model answers. Made by `wiring` after the worker process has
started, used by the predictor and the operations endpoints.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import structlog

from app.ai.artifact_files import FileIdentity, FoundArtifact
from app.ai.model_bundle import ModelBundle
from app.ai.model_catalogue import AvailableModel, ModelCatalogue
from app.ai.model_manifest import CardForm
from app.ai.served_versions import ServedVersions
from app.errors import ArtifactError, ModelNotReadyError
from app.metrics import observe_model_look

CacheStatus = Literal["hit", "miss", "expired", "error"]

_MAX_BACKOFF = 6
"""Looks with nothing to serve are at most this many times `retry_seconds` apart."""

CLOSE_SECONDS = 1.0
"""A look that is under way, on a disk that hangs, is not waited for any longer."""

REMEDIES = {
    "no_directory": "set ML_MODEL_DIR to the directory of the models, or publish one with `leadscore train`",
    "no_artifact": "publish one with `leadscore train`, or look at ML_MODEL_PATTERN and ML_MODEL_VERSION",
    "rollback_refused": "name the older version in ML_MODEL_VERSION to go back to it, or publish a newer one",
    "signature_missing": "sign it with `leadscore models sign`",
    "signature_invalid": "sign it with a key whose public half is in ML_TRUSTED_KEYS",
    "served_unknown": "let the service read and write served_models under VAR_DIR",
}
"""What an operator does where it is not an artifact that is to be mended."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One artifact was loaded (`bundle`), or it was not (`reason`, the word of `ArtifactError`)."""

    version: str
    model_type: str
    bundle: ModelBundle | None
    reason: str | None
    duration_ms: float


@dataclass(frozen=True, slots=True)
class RegistryStatus:
    """What the registry holds, for the operations endpoints; it costs nothing to ask.

    `cache_status`: `hit` a model within its TTL, `expired` a model past it, `miss` nothing was looked for
    yet, `error` nothing could be loaded. `reason` is why the newest artifact does not serve, as of the last
    look.
    """

    bundle: ModelBundle | None
    loaded_at: datetime | None
    loaded_since_seconds: float | None
    cache_status: CacheStatus
    reason: str | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    bundle: ModelBundle
    identity: FileIdentity
    at: datetime
    at_monotonic: float
    suits: bool  # known to suit the lead source


class ModelRegistry:
    """Holds the active model of this process.

    `served` remembers across processes which versions have served; without it only this process's own is
    known. While `source_is_known` says no, nobody can tell which models suit the lead source: the newest
    serves for the time being, is not remembered for it, and is looked at again. A request waits at most
    `longest_wait_seconds` for the first model; the other seconds are those of `monotonic`. `on_load` is told
    of every load and of every refusal that is news, on the registry's own thread. `interrupt` breaks off the
    load that is under way when the registry is closed.
    """

    def __init__(
        self,
        catalogue: ModelCatalogue,
        *,
        served: ServedVersions | None = None,
        source_is_known: Callable[[], bool] = lambda: True,
        pinned_version: str | None = None,
        ttl_seconds: float = 3600.0,
        retry_seconds: float = 5.0,
        longest_wait_seconds: float = 1.0,
        monotonic: Callable[[], float] = time.monotonic,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
        on_load: Callable[[LoadReport], None] = lambda _: None,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._catalogue = catalogue
        self._served = served
        self._source_is_known = source_is_known
        self._pinned = pinned_version
        self._ttl = ttl_seconds
        self._retry = retry_seconds
        self._longest_wait = longest_wait_seconds
        self._monotonic = monotonic
        self._utc_now = utc_now
        self._on_load = on_load
        self._interrupt = interrupt
        self._loaded: _Loaded | None = None
        self._reason: str | None = None
        self._reported: dict[str | None, tuple[FileIdentity, str]] = {}
        self._failures = 0
        self._next_look = -math.inf
        self._closed = False
        self._look: Future[None] | None = None
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-registry")

    async def active(self) -> ModelBundle:
        """Returns the model that serves, from memory whenever there is one.

        Raises:
            ModelNotReadyError: no verified model is loaded; says when the registry looks again.
        """
        loaded = self._loaded
        if loaded is not None and self._monotonic() < self._next_look:
            return loaded.bundle
        look = self._begin_look_when_due()
        if loaded is None and look is not None:
            # Shielded: a caller that gives up must not take the others' load with it.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._longest_wait):
                    await asyncio.shield(asyncio.wrap_future(look))
        return self._require()

    def load(self) -> ModelBundle:
        """Looks at the disk now and returns the model that serves after that; blocks, for start-up.

        Raises:
            ModelNotReadyError: nothing could be loaded.
        """
        with self._lock:
            look = self._begin_look()
        look.result()
        return self._require()

    def status(self) -> RegistryStatus:
        """Tells what is loaded, and how the last look went."""
        loaded, now = self._loaded, self._monotonic()
        if loaded is None:
            looked = self._next_look != -math.inf
            return RegistryStatus(None, None, None, "error" if looked else "miss", self._reason)
        fresh: CacheStatus = "hit" if now < self._next_look else "expired"
        return RegistryStatus(loaded.bundle, loaded.at, now - loaded.at_monotonic, fresh, self._reason)

    def available(self) -> list[AvailableModel]:
        """Returns every artifact with its verification state, newest first; reads the disk, so it blocks."""
        loaded = self._loaded
        return self._catalogue.list_models(loaded.identity if loaded else None)

    def read_card(self, version: str, form: CardForm) -> bytes:
        """Returns the model card of any version in the directory; reads the disk, so it blocks.

        Raises:
            ArtifactError: `missing`, or why the file is not opened.
        """
        loaded = self._loaded
        return self._catalogue.read_card(version, form, loaded.identity if loaded else None)

    def close(self) -> None:
        """Breaks off a look that is under way and never looks again; what is loaded goes on serving.

        Blocks for a second at most: what waits for a disk that hangs is left behind.
        """
        with self._lock:
            self._closed = True
        self._interrupt()
        ending = threading.Thread(target=self._executor.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)
        self._next_look = math.inf

    def _require(self) -> ModelBundle:
        loaded = self._loaded
        if loaded is None:
            wait = self._next_look - self._monotonic()
            raise ModelNotReadyError(
                retry_after=math.ceil(min(max(wait, 1.0), self._retry * _MAX_BACKOFF + 1.0))
            )
        return loaded.bundle

    def _begin_look_when_due(self) -> "Future[None] | None":
        with self._lock:
            # A look sets the time of the next one before it ends, so one that has just ended is not repeated.
            due = self._monotonic() >= self._next_look or (self._look and not self._look.done())
            if due and not self._closed:
                return self._begin_look()
        return None

    def _begin_look(self) -> "Future[None]":
        if self._look is None or self._look.done():
            self._look = self._executor.submit(self._look_at_disk)
        return self._look

    def _look_at_disk(self) -> None:
        try:
            self._reason = self._choose()
        except ArtifactError as exc:
            self._reason = exc.reason
        except Exception:  # noqa: BLE001  whatever happens here, what is loaded serves on and a next look comes
            self._reason = "internal_error"
            _log.exception("model_look_failed")
        settled = self._loaded is not None and self._loaded.suits
        self._failures = 0 if settled else min(self._failures + 1, 10)
        pause = self._ttl if settled else self._retry * min(2 ** (self._failures - 1), _MAX_BACKOFF)
        self._next_look = self._monotonic() + pause
        observe_model_look(ready=self._loaded is not None, refused=self._reason is not None)

    def _choose(self) -> str | None:
        """Loads the newest artifact that can serve, and returns why the newest one does not."""
        found = [artifact for artifact in self._catalogue.find() if artifact.manifest_name]
        wanted = [artifact for artifact in found if self._pinned in {None, artifact.version}]
        reason: str | None = None if wanted else "no_artifact"
        for artifact in wanted:
            if self._closed:
                break
            loaded = self._loaded
            same = loaded if loaded and artifact.identity == loaded.identity else None
            if same and (same.suits or not self._source_is_known()):
                break
            refusal = self._try_to_load(artifact)
            if refusal is None:
                break
            reason = reason or refusal
            if same and refusal == "incompatible":
                self._loaded = None  # it was taken unseen, and can answer nothing
                continue
            # The file of what serves went bad: better the copy in memory than an older model. And where one
            # is too old, those that follow are older still.
            serves = loaded is not None and artifact.version == loaded.bundle.ref.version
            if serves or refusal == "rollback_refused":
                break
        return reason

    def _try_to_load(self, artifact: FoundArtifact) -> str | None:
        started = self._monotonic()
        bundle, reason = None, None
        try:
            self._refuse_rollback(artifact.version)
            suits = self._source_is_known()
            bundle = self._catalogue.load(artifact)
            if suits and self._served is not None:
                self._served.record(artifact.version)
            self._loaded = _Loaded(bundle, artifact.identity, self._utc_now(), self._monotonic(), suits)
        except ArtifactError as exc:
            bundle, reason = None, exc.reason
        except Exception:  # noqa: BLE001  a defect met in one artifact must not keep the next one from serving
            reason = "internal_error"
            _log.exception("model_load_failed", version=artifact.version)
        elapsed_ms = 1000 * (self._monotonic() - started)
        self._report(artifact, LoadReport(artifact.version, artifact.model_type, bundle, reason, elapsed_ms))
        return reason

    def _refuse_rollback(self, version: str) -> None:
        if self._pinned is not None:
            return
        serving = self._loaded.bundle.ref.version if self._loaded and self._loaded.suits else ""
        highest = self._served.highest() if self._served is not None else ""
        if version < max(serving, highest):
            raise ArtifactError("rollback_refused", "A newer version than this one has served here.")

    def _report(self, artifact: FoundArtifact, report: LoadReport) -> None:
        if self._closed:
            return  # what was broken off says nothing of the artifact
        if report.reason is None:
            _log.info("model_loaded", version=report.version, model_type=report.model_type)
        elif self._reported.get(artifact.manifest_name) == (artifact.identity, report.reason):
            return
        else:
            self._reported[artifact.manifest_name] = (artifact.identity, report.reason)
            remedy = {"remedy": REMEDIES[report.reason]} if report.reason in REMEDIES else {}
            _log.warning("model_refused", version=report.version, reason=report.reason, **remedy)
        try:
            self._on_load(report)
        except Exception:  # noqa: BLE001  a listener that fails must not cost the service its model
            _log.exception("model_report_failed")
