"""The story of one prediction, top to bottom: lead IDs in, calibrated numbers a person may act on out.

Both routers call the one `Predictor`. It knows no HTTP and no SQL. A batch that comes in parts is scored part
by part while the database works at the next one; no connection is held while anything else is computed. It
leaves the event loop for reasons, and for a large batch that comes as a whole. `score_leads` is the pure
part, from columns to answers; bulk scoring calls it too, so a score in a table and a score over HTTP come
from the same lines.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple, Protocol, Self

import numpy as np
import structlog
from msgspec.structs import replace

from app.ai.calibration import Calibrator, calibrate, confidence
from app.ai.domain import (
    AMBIGUOUS_LEAD,
    ANSWER,
    UNKNOWN_LEAD,
    VERDICTS,
    AnswerArray,
    BoolArray,
    CodeArray,
    ConfidenceMethod,
    Explanation,
    Extra,
    FetchedLeads,
    FloatArray,
    IntArray,
    LeadColumns,
    LeadSource,
    Predictions,
    Rejection,
    RequestContext,
    Stage,
    canonical_lead_ids,
)
from app.ai.drift_window import DriftWindow
from app.ai.explanation import explain_leads
from app.ai.feature_safety import apply_rules, build_verdicts
from app.ai.features import build_features
from app.ai.micro_batching import MicroBatching
from app.ai.model_bundle import ModelBundle
from app.ai.prediction_cache import AnswerCache, NullCache
from app.ai.venn_abers import build_intervals, widen
from app.errors import (
    DatabaseUnavailableError,
    InvalidParameterError,
    LeadScoringError,
    OverloadedError,
    PredictionFailedError,
)

_log = structlog.get_logger()

_CAUTION, _ABSTAIN = VERDICTS.index("caution"), VERDICTS.index("abstain")

_UNREAD, _FEATURES_REJECTED, _ANSWERED = -4, -3, 0
_REJECTIONS = {
    UNKNOWN_LEAD: ("LEAD_NOT_FOUND", "No lead has this ID."),
    AMBIGUOUS_LEAD: ("LEAD_AMBIGUOUS", "More than one lead has this external reference; ask by UUID."),
    _FEATURES_REJECTED: (
        "FEATURES_REJECTED",
        "The lead's data cannot be made safe to score with this model.",
    ),
    _UNREAD: (
        DatabaseUnavailableError.code,
        "The lead database did not answer in time; ask for this lead again shortly.",
    ),
}

_EXPLAINED: frozenset[Extra] = frozenset({"reasons", "features"})
"""Told of a lead only as it is now."""

INLINE_LEADS = 500
"""Up to this many leads are scored on the event loop itself, which they hold up for about 1.5 ms, and so are
the parts in which more are read. A thread would cost 0.06 ms more on an idle machine and three to eight on a
busy one, where processor and interpreter lock change hands; and the loop would wait for that lock all the
same."""

Lap = Callable[[Stage], None]

_World = tuple[ModelBundle, float]
"""What an answer depends on besides its lead: the model, and the as-of time."""


@dataclass(frozen=True, slots=True)
class ScoringPolicy:
    """What the service, not the model, decides of an answer: when to say `caution`, what confidence means."""

    min_coverage: float
    confidence_method: ConfidenceMethod


class ScoredLeads(NamedTuple):
    """`n` leads, scored: `answers` (n,), undefined where `rejected` (n,), and `features` (n, k) as built."""

    answers: AnswerArray
    rejected: BoolArray
    features: FloatArray


class _Found(NamedTuple):
    """What is found of IDs (m,) the cache does not know: answers, fates, and explanations by place.

    Answers and explanations are undefined where the fate is not `_ANSWERED`. `stages_ms` is what it took.
    """

    answers: AnswerArray
    fate: IntArray
    explanations: Mapping[int, Explanation]
    stages_ms: Mapping[Stage, float]

    def at(self, places: Sequence[int]) -> Self:
        """Returns what is found at these places, in this order."""
        told = enumerate(places) if self.explanations else ()
        return self._replace(
            answers=self.answers.take(places),
            fate=self.fate.take(places),
            explanations={at: self.explanations[place] for at, place in told if place in self.explanations},
        )


class _Outcome(NamedTuple):
    """What became of each position asked (m,), and the answers of those that are answered, in order.

    `age_seconds` is that of the oldest answer that was recalled, None while the lead source answers.
    """

    fate: IntArray
    kept: AnswerArray
    cache_hits: int
    age_seconds: float | None


class Stopwatch:
    """Wall time by stage, in milliseconds of `clock` (seconds)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self.stages_ms: dict[Stage, float] = {}

    def lap(self, stage: Stage) -> None:
        """Ends a stage, or a part of it, and begins the next."""
        now = self._clock()
        self.stages_ms[stage] = self.stages_ms.get(stage, 0.0) + (now - self._last) * 1000
        self._last = now


class Models(Protocol):
    """Where the model that serves comes from."""

    async def active(self) -> ModelBundle:
        """Returns it, or raises `ModelNotReadyError`."""
        ...


class Predictor:
    """Answers batches of lead IDs; one for each worker process, on its event loop.

    `executor` has one thread, which works out reasons, and scores what is many leads at once. With
    `degraded_answers`, leads that are remembered are answered while the lead source is away.
    """

    def __init__(
        self,
        models: Models,
        lead_source: LeadSource,
        cache: AnswerCache,
        drift: DriftWindow,
        *,
        executor: Executor,
        policy: ScoringPolicy,
        degraded_answers: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._models = models
        self._lead_source = lead_source
        self._cache = cache
        self._drift = drift
        self._executor = executor
        self._policy = policy
        self._degraded_answers = degraded_answers
        self._clock = clock
        self._look_ups = MicroBatching[_World, _Found](lambda world, lead_ids: self._answer(*world, lead_ids))

    async def predict(self, lead_ids: Sequence[str], context: RequestContext) -> Predictions:
        """Answers every position of `lead_ids`, which follow the ID rule; equal IDs get equal answers.

        Raises:
            ModelNotReadyError: no verified model is loaded.
            InvalidParameterError: intervals are asked for, and the model has none.
            DatabaseUnavailableError: the lead source does not answer, and none of the leads is remembered.
            OverloadedError: what is not remembered could not be found and scored by `context.answer_by`.
            PredictionFailedError: anything else went wrong; the cause is chained and logged.
        """
        try:
            return await self._predict(lead_ids, context)
        except LeadScoringError:
            raise
        except Exception as exc:
            _log.exception("prediction_failed")
            raise PredictionFailedError from exc

    async def refresh(self, lead_ids: Sequence[str], context: RequestContext) -> None:
        """Answers canonical, distinct IDs anew, for the cache alone.

        Raises:
            ModelNotReadyError, DatabaseUnavailableError: as for `predict`.
            PredictionFailedError: anything else went wrong; the cause is chained, for the caller to log.
        """
        bundle = await self._models.active()
        try:
            await self._answer(bundle, context.as_of, lead_ids)
        except LeadScoringError:
            raise
        except Exception as exc:
            raise PredictionFailedError from exc

    async def _predict(self, lead_ids: Sequence[str], context: RequestContext) -> Predictions:
        watch = Stopwatch(self._clock)
        bundle = await self._models.active()
        if "interval" in context.include and bundle.venn_abers is None:
            raise InvalidParameterError(
                "The model that serves was published without intervals; leave interval out of include."
            )
        watch.lap("model")
        canonical = canonical_lead_ids(lead_ids)
        # A receipt is for the data it was made from, and features are that data: read and scored afresh.
        cache: AnswerCache = NullCache() if context.include & _EXPLAINED else self._cache
        hit, answers = cache.find(bundle.ref, context.as_of, canonical)
        watch.lap("cache")
        fate = np.zeros(len(canonical), np.int64)  # _ANSWERED
        missing = (~hit).nonzero()[0]
        found: _Found | None = None
        age: float | None = None
        if missing.size:
            try:
                found = await self._look_up(bundle, context, _pick(canonical, missing))
                answers.put(missing, found.answers)
                fate.put(missing, found.fate)
                watch.stages_ms |= found.stages_ms
                cache.count("miss", missing.size)
            except DatabaseUnavailableError:
                if not self._degraded_answers:
                    raise
                asked = _pick(canonical, missing)
                recalled, last_known, ages = cache.recall(bundle.ref, context.as_of, asked)
                cache.count("recalled", int(np.count_nonzero(recalled)))
                hit.put(missing, recalled)
                if not hit.any():
                    raise
                last_known["verdict"] = np.maximum(last_known["verdict"], _CAUTION)
                answers.put(missing, last_known)
                fate.put(missing, np.where(recalled, _ANSWERED, _UNREAD))
                age = float(ages.max(initial=0.0, where=recalled))
        answered = (fate == _ANSWERED).nonzero()[0]
        kept = answers if len(answered) == len(answers) else answers.take(answered)
        outcome = _Outcome(fate, kept, int(np.count_nonzero(hit)), age)
        predictions = self._assemble(bundle, lead_ids, outcome, watch.stages_ms)
        if "interval" in context.include:
            intervals = widen(find_intervals(bundle, kept), age or 0.0, predictions.bounds)
            predictions = replace(predictions, intervals=intervals)
        if found is not None and context.include & _EXPLAINED:
            told = [found.explanations[index] for index in answered.tolist()]
            if "reasons" in context.include:
                predictions = replace(predictions, explanations=told)
            if "features" in context.include:
                predictions = replace(predictions, features=[explanation.features for explanation in told])
        return predictions

    async def _look_up(self, bundle: ModelBundle, context: RequestContext, lead_ids: Sequence[str]) -> _Found:
        """Whatever is waited for here (others, the database, the scoring thread) draws from one deadline."""
        left = None if context.answer_by is None else context.answer_by - time.monotonic()
        distinct = list(dict.fromkeys(lead_ids))
        try:
            async with asyncio.timeout(left):
                found = await self._share_look_up(bundle, context, distinct)
        except TimeoutError as exc:
            raise OverloadedError from exc
        if len(distinct) == len(lead_ids):
            return found
        place = {lead_id: index for index, lead_id in enumerate(distinct)}
        return found.at([place[lead_id] for lead_id in lead_ids])

    async def _share_look_up(
        self, bundle: ModelBundle, context: RequestContext, lead_ids: Sequence[str]
    ) -> _Found:
        if context.include & _EXPLAINED:
            return await self._answer(bundle, context.as_of, lead_ids, explain=True)
        found, places = await self._look_ups.look_up((bundle, context.as_of), lead_ids)
        return found if places is None else found.at(places)

    async def _answer(
        self, bundle: ModelBundle, as_of: float, lead_ids: Sequence[str], *, explain: bool = False
    ) -> _Found:
        """Reads and scores leads the cache does not know; a part of them while the next one is being read."""
        watch = Stopwatch(self._clock)
        since = self._cache.moment()
        # A lead that is explained is read even if it is remembered; drift counts it once all the same.
        seen = self._cache.recall(bundle.ref, as_of, lead_ids)[0] if explain else None
        parts: dict[int, tuple[FetchedLeads, ScoredLeads | None]] = {}

        def use_part(first: int, fetched: FetchedLeads) -> None:
            watch.lap("database")
            leads, scored = fetched.leads, None
            if 0 < leads.n <= INLINE_LEADS:
                scored = score_leads(bundle, leads, as_of, self._policy, watch.lap)
            parts[first] = fetched, scored

        await self._lead_source.fetch(lead_ids, bundle.input_columns, use_part)
        watch.lap("database")
        answers, fate = np.empty(len(lead_ids), ANSWER), np.empty(len(lead_ids), np.int64)
        uuid_of: list[str] = []
        explanations: dict[int, Explanation] = {}
        for first, (fetched, inline) in parts.items():
            row_of, leads = fetched.row_of, fetched.leads
            uuid_of += fetched.uuid_of
            fate[first : first + len(row_of)] = np.minimum(row_of, _ANSWERED)
            if not leads.n:
                continue
            scored = inline or await self._score_apart(bundle, leads, as_of, watch.lap)
            found = (row_of >= 0).nonzero()[0]
            features = scored.features
            if seen is not None:
                features = np.delete(features, row_of[found[seen[first + found]]], axis=0)
            self._drift.add(features, bundle.feature_set.fingerprint)
            rows, places = row_of.take(found), first + found
            answers.put(places, scored.answers.take(rows))
            fate.put(places, np.where(scored.rejected.take(rows), _FEATURES_REJECTED, _ANSWERED))
            if explain:
                told = await self._explain(bundle, leads, as_of, scored.answers)
                explanations |= zip(places.tolist(), map(told.__getitem__, rows.tolist()), strict=True)
                watch.lap("reasons")
        answered = (fate == _ANSWERED).nonzero()[0]
        self._cache.remember(
            bundle.ref,
            as_of,
            _pick(lead_ids, answered),
            answers.take(answered),
            uuids=_pick(uuid_of, answered),
            since=since,
        )
        return _Found(answers, fate, explanations, watch.stages_ms)

    async def _explain(
        self, bundle: ModelBundle, leads: LeadColumns, as_of: float, answers: AnswerArray
    ) -> list[Explanation]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, explain_leads, bundle, leads, as_of, answers)

    async def _score_apart(
        self, bundle: ModelBundle, leads: LeadColumns, as_of: float, lap: Lap
    ) -> ScoredLeads:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, score_leads, bundle, leads, as_of, self._policy, lap
        )

    def _assemble(
        self, bundle: ModelBundle, lead_ids: Sequence[str], outcome: _Outcome, stages_ms: dict[Stage, float]
    ) -> Predictions:
        fate, kept, cache_hits, age = outcome
        declined = (fate != _ANSWERED).nonzero()[0].tolist()
        return Predictions(
            asked=len(lead_ids),
            lead_ids=list(compress(lead_ids, (fate == _ANSWERED).tolist()) if declined else lead_ids),
            probability=kept["probability"],
            confidence=kept["confidence"],
            coverage=kept["coverage"],
            prediction=kept["prediction"],
            verdict=kept["verdict"],
            cache_hits=cache_hits,
            rejections=tuple(
                Rejection(lead_ids[position], position, *_REJECTIONS[int(fate[position])])
                for position in declined
            ),
            model=bundle.ref,
            calibration_method=bundle.calibrator.method,
            confidence_method=self._policy.confidence_method,
            bounds=(bundle.calibrator.lower, bundle.calibrator.upper),
            stages_ms=stages_ms,
            degraded_age_seconds=age,
        )


def _pick(texts: Sequence[str], places: IntArray) -> Sequence[str]:
    """Returns the texts at ascending places; usually all are wanted."""
    return texts if len(places) == len(texts) else [texts[place] for place in places.tolist()]


def score_leads(
    bundle: ModelBundle,
    leads: LeadColumns,
    as_of: float | FloatArray,
    policy: ScoringPolicy,
    lap: Lap = lambda _stage: None,
) -> ScoredLeads:
    """Scores `n` leads: features, safety, model, calibration. Pure; no lead's answer depends on the others.

    `lap` is told the name of each stage as it ends.
    """
    matrix = build_features(leads, bundle.feature_set, as_of)
    lap("features")
    checked = apply_rules(matrix, bundle.safety)
    verdict = build_verdicts(
        checked.weighted_coverage, checked.out_of_range, policy.min_coverage, bundle.abstain_below
    )
    lap("safety")
    raw = bundle.scorer(checked.values)
    lap("scoring")
    probability = answer_scores(raw, verdict, bundle.calibrator, bundle.manifest.base_rate)
    answers = np.empty(leads.n, ANSWER)
    answers["raw_score"] = raw
    answers["probability"] = probability
    answers["coverage"] = checked.coverage
    answers["prediction"] = probability >= bundle.manifest.threshold
    answers["verdict"] = verdict
    intervals = find_intervals(bundle, answers) if policy.confidence_method == "interval" else None
    answers["confidence"] = confidence(probability, policy.confidence_method, intervals)
    lap("calibration")
    return ScoredLeads(answers, checked.rejected, matrix.values)


def answer_scores(
    raw: FloatArray, verdict: CodeArray, calibrator: Calibrator, base_rate: float
) -> FloatArray:
    """Returns what leads (n,) with these raw scores and verdicts are answered.

    That is the calibrated probability, or where the verdict abstains the base rate, within the calibrator's
    bounds. Training measures a model by this function too, so its figures are those of what is answered.
    """
    probability = calibrate(raw, calibrator)
    probability[verdict == _ABSTAIN] = min(max(base_rate, calibrator.lower), calibrator.upper)
    return probability


def find_intervals(bundle: ModelBundle, answers: AnswerArray) -> FloatArray:
    """Returns the ends (n, 2) of the intervals of answers (n,), which hold all that is needed for it.

    So an answer out of the cache gets its interval without the lead being scored again.
    """
    return build_intervals(
        bundle.venn_abers,
        answers["raw_score"],
        answers["probability"],
        unknown=answers["verdict"] == _ABSTAIN,
        bounds=(bundle.calibrator.lower, bundle.calibrator.upper),
    )
