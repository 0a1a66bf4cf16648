"""What the service is timed against, each an application of its own that a stranger can read in a minute.

- `echo`: reads the body and answers a constant, on the framework the service uses: no answer can beat it.
- `floor`: the leanest pipeline we can write: one columnar SELECT, hand-written features, the compiled model,
  a fast encoder for the fields the frontend reads, and a row for each answer, inserted in groups some time
  later and lost if the process ends before. No guarantee: no validation beyond the JSON, nothing durable, no
  deadline, no rules of safety, no limits.
- `durable_echo`, `durable_floor`: the same with one thing more, the one that costs most for a single lead: an
  event is on the disk before its answer leaves. They tell what a machine's disk leaves to be reached.
- `textbook`: what a tutorial builds: ORM rows, a dictionary of features a lead, `predict_proba`, pydantic.
- `row_by_row`: a query, a data frame and a `predict_proba` call for each lead.

All but the echo score with the artifact and the calibrator of the service, and answer the same probabilities.

python -m bench.contenders NAME DATABASE_URL MODEL_DIR
"""

import asyncio
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import psycopg
import uvicorn
from fastapi import FastAPI, Request, Response
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format
from pydantic import BaseModel
from sqlalchemy import MetaData, Table, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Session

from app.ai.artifact_loading import load_estimator
from app.ai.calibration import calibrate
from app.ai.domain import FloatArray
from app.ai.model_bundle import ModelBundle
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.db.array_parameters import join_uuids, pack_uuids
from bench.data import RELATION
from bench.durable_write import EVENT, prepare_overwrite

PATH = "/ai/advanced-ml/predict-batch"
_DAY = 86_400.0
_RECORD_SECONDS = 0.25
_CONNECTIONS = 16  # to the database, of each contender: more than two cores can make use of

Row = Mapping[str, Any]


def start_of_day() -> datetime:
    """The moment features are true for, as the service takes it: 0:00 UTC today."""
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _prepare_disk() -> Callable[[], object]:
    """Returns what puts an event on the disk, into space that was written before."""
    body = msgspec.json.encode(EVENT)
    with tempfile.TemporaryDirectory() as directory:  # leaves no name behind; the file stays while it is open
        write = prepare_overwrite(Path(directory))
    return lambda: write(body)


def build_echo(_url: str, _model_dir: Path, write_event: Callable[[], object] | None = None) -> Any:
    """Answers every body with the same few bytes."""
    app = FastAPI()
    answer = b'{"predictions":[]}'

    @app.post(PATH)
    async def echo(request: Request) -> Response:
        await request.body()
        if write_event is not None:
            write_event()
        return Response(answer, media_type="application/json")

    return app


class _Packed(bytes):
    """A parameter that is ready to be sent, where the driver would build an object for each ID first."""


class _PackedDumper(Dumper):
    format, oid = Format.BINARY, 2951  # uuid[]

    def dump(self, obj: _Packed) -> Buffer:
        return obj


psycopg.adapters.register_dumper(_Packed, _PackedDumper)


_INSERT = """
    WITH recorded AS (
        INSERT INTO ai_events (id, action, meta, created_at)
        SELECT gen_random_uuid(), 'bench.floor', unnest(%b::text[])::jsonb, now()
        RETURNING 1
    ) SELECT count(*) FROM recorded
"""


class _Answer(msgspec.Struct):
    lead_id: str
    probability: float
    confidence: float
    calibrated_probability: float
    features_present_ratio: float
    prediction: bool


class Floor:
    """Bare ASGI; its SELECT returns one value a column, which NumPy reads in place."""

    _NUMBERS = (
        "date_part('epoch', created_at)", "date_part('epoch', last_touch_at)",
        "date_part('epoch', intake_at)", "tuition_fee", "gpa", "first_response_minutes",
        "has_phone::int", "newsletter_opt_in::int",
        "touchpoint_count", "inbound_count", "emails_opened", "calls_answered", "events_attended",
        "minutes_on_site", "prior_applications",
    )  # fmt: skip
    _TEXTS = ("source", "programme", "study_mode", "country", "education_level")

    def __init__(self, url: str, model_dir: Path, write_event: Callable[[], object] | None = None) -> None:
        self._url = url
        self._write_event = write_event
        self._idle: list[psycopg.AsyncConnection[Any]] = []
        self._slots = asyncio.Semaphore(_CONNECTIONS)
        self._events: list[str] = []
        self._recording: asyncio.Task[None] | None = None
        self._bundle = ModelRegistry(ModelCatalogue(model_dir)).load()
        names = self._bundle.feature_set.names
        self._texts = [self._bundle.feature_set.specs[names.index(text)].params for text in self._TEXTS]
        self._impute = np.array([entry.impute for entry in self._bundle.statistics])[:, None]
        self._lower = np.array([entry.lower for entry in self._bundle.statistics])[:, None]
        self._upper = np.array([entry.upper for entry in self._bundle.statistics])[:, None]
        numbers = ", ".join(
            f"string_agg(float8send(coalesce(({number})::float8, 'NaN')), '')" for number in self._NUMBERS
        )
        texts = ", ".join(f"string_agg(coalesce({text}, ''), E'\\n')" for text in self._TEXTS)
        self.columns = f"string_agg(uuid_send(lead_id), ''), {numbers}, {texts}"
        self._statement = f"SELECT {self.columns} FROM {RELATION} WHERE lead_id = ANY(%b)"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        began = time.perf_counter()
        answer = await self._answer(msgspec.json.decode(body, type=list[str]))
        self._events.append(f'{{"seconds": {time.perf_counter() - began}}}')
        self._recording = self._recording or asyncio.create_task(self._record())
        if self._write_event is not None:
            self._write_event()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _answer(self, lead_ids: list[str]) -> bytes:
        asked = join_uuids(lead_ids)
        row: Any = await self._ask(self._statement, [_Packed(pack_uuids(asked))])
        probability, present = self.score(row[1:])
        wanted, found = (np.frombuffer(ids, np.uint64)[1::2] for ids in (asked, row[0]))  # the random halves
        places = found.argsort()
        order = places[found[places].searchsorted(wanted)]
        chosen = probability[order]
        numbers = chosen.tolist()
        answers = map(
            _Answer, lead_ids, numbers, np.maximum(chosen, 1 - chosen).tolist(), numbers,
            present[order].tolist(), (chosen >= self._bundle.manifest.threshold).tolist(),
        )  # fmt: skip
        return msgspec.json.encode({"predictions": list(answers)})

    async def _ask(self, statement: str, parameters: list[Any]) -> Any:
        async with self._slots:
            connection = self._idle.pop() if self._idle else await self._connect()
            async with connection.cursor(binary=True) as cursor:
                await cursor.execute(statement, parameters, prepare=True)
                row = await cursor.fetchone()
            self._idle.append(connection)
        return row

    async def _record(self) -> None:
        while True:
            await asyncio.sleep(_RECORD_SECONDS)
            if self._events:
                events, self._events = self._events, []
                await self._ask(_INSERT, [events])

    def score(self, cells: Any) -> tuple[FloatArray, FloatArray]:
        """Scores the values of `columns` after the first, one value a column.

        Returns the probabilities (n,), and of each lead the share of features that are there (n,).
        """
        numbers = [np.frombuffer(cell, ">f8").astype(np.float64) for cell in cells[: len(self._NUMBERS)]]
        (created, touched, intake, fee, gpa, response, phone, newsletter,
         touches, inbound, opened, calls, events, minutes, prior) = numbers  # fmt: skip
        levels = [
            _find_levels(cell.split("\n"), params["levels"], params.get("missing"), params.get("unseen"))
            for cell, params in zip(cells[len(self._NUMBERS) :], self._texts, strict=True)
        ]
        now = start_of_day().timestamp()
        with np.errstate(all="ignore"):
            share = np.where((inbound == 0) & (touches == 0), 0.0, inbound / touches)
            values = np.array([
                np.maximum((now - created) / _DAY, 0.0), np.maximum((now - touched) / _DAY, 0.0),
                (intake - now) / _DAY, *levels, fee, gpa, np.log1p(response), phone, newsletter,
                np.log1p(touches), share, np.log1p(opened), np.log1p(calls), events, np.log1p(minutes), prior,
            ])  # fmt: skip
        gaps = np.isnan(values)
        values = np.where(gaps, self._impute, np.minimum(np.maximum(values, self._lower), self._upper))
        raw = self._bundle.scorer(np.ascontiguousarray(values.T))
        return calibrate(raw, self._bundle.calibrator), 1 - gaps.mean(axis=0)

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
        await connection.execute("SET jit = off; SET plan_cache_mode = force_generic_plan")
        return connection


def _find_levels(
    texts: list[str], levels: Mapping[str, float], missing: float | None, unseen: float | None
) -> FloatArray:
    known = {text: levels.get(text.casefold(), unseen) if text else missing for text in set(texts)}
    return np.array([known[text] for text in texts], dtype=np.float64)


class _Prediction(BaseModel):
    lead_id: str
    probability: float
    prediction: bool


class _Predictions(BaseModel):
    predictions: list[_Prediction]


def build_textbook(url: str, model_dir: Path) -> Any:
    """FastAPI, ORM objects, `predict_proba`, pydantic."""
    app = FastAPI()
    lead, session = _open_orm(url)
    bundle, estimator = load_model(model_dir)

    @app.post(PATH)
    def predict(lead_ids: list[str]) -> _Predictions:
        with session() as current:
            found = current.scalars(select(lead).where(lead.lead_id.in_(lead_ids))).all()
        features = np.array([list(_build_row(bundle, vars(one)).values()) for one in found])
        probability = calibrate(estimator.predict_proba(features)[:, 1], bundle.calibrator)
        by_id = {str(one.lead_id): float(p) for one, p in zip(found, probability, strict=True)}
        return _Predictions(
            predictions=[_predict_one(bundle, lead_id, by_id[lead_id]) for lead_id in lead_ids]
        )

    return app


def build_row_by_row(url: str, model_dir: Path) -> Any:
    """The same with a query, a data frame and a call of the model for each lead."""
    app = FastAPI()
    lead, session = _open_orm(url)
    bundle, estimator = load_model(model_dir)

    @app.post(PATH)
    def predict(lead_ids: list[str]) -> _Predictions:
        predictions = []
        with session() as current:
            for lead_id in lead_ids:
                found = current.scalars(select(lead).where(lead.lead_id == lead_id)).one()
                frame = pl.DataFrame([_build_row(bundle, vars(found))])
                raw = estimator.predict_proba(frame.to_numpy())[:, 1]
                probability = float(calibrate(raw, bundle.calibrator)[0])
                predictions.append(_predict_one(bundle, lead_id, probability))
        return _Predictions(predictions=predictions)

    return app


def _open_orm(url: str) -> tuple[Any, Callable[[], Session]]:
    address = url.replace("postgresql://", "postgresql+psycopg://", 1)
    table = Table(RELATION, MetaData(), autoload_with=create_engine(address))

    class Base(DeclarativeBase):
        pass

    class Lead(Base):
        __table__ = table

    engine = create_engine(address, pool_size=_CONNECTIONS, max_overflow=0, pool_timeout=60)
    return Lead, lambda: Session(engine)


def load_model(model_dir: Path) -> tuple[ModelBundle, Any]:
    """Returns the active bundle, and its estimator as scikit-learn has it."""
    bundle = ModelRegistry(ModelCatalogue(model_dir)).load()
    data = (model_dir / bundle.manifest.file_name).read_bytes()
    return bundle, load_estimator(data, bundle.manifest.format)


def _predict_one(bundle: ModelBundle, lead_id: str, probability: float) -> _Prediction:
    return _Prediction(
        lead_id=lead_id, probability=probability, prediction=probability >= bundle.manifest.threshold
    )


def _build_row(bundle: ModelBundle, lead: Row) -> dict[str, float]:
    row = {}
    for spec, statistics in zip(bundle.feature_set.specs, bundle.statistics, strict=True):
        value = _build_value(spec.transform, spec.params, [lead[column.name] for column in spec.inputs])
        row[spec.name] = (
            statistics.impute if value is None else min(max(value, statistics.lower), statistics.upper)
        )
    return row


def _build_value(transform: str, params: Row, cells: list[Any]) -> float | None:
    first = cells[0]
    if None in cells:
        value = params.get("missing")
    elif transform == "level":
        value = params["levels"].get(first.casefold(), params.get("unseen"))
    elif transform == "age_days":
        value = max((start_of_day() - first).total_seconds() / _DAY, 0.0)
    elif transform == "days_until":
        value = (first - start_of_day()).total_seconds() / _DAY
    elif transform == "log1p":
        value = math.log1p(float(first))
    elif transform == "ratio":
        value = float(first) / float(cells[1]) if cells[1] else params["zero_over_zero"]
    else:
        value = float(first)
    return value


CONTENDERS: Mapping[str, Callable[[str, Path], Any]] = {
    "echo": build_echo,
    "floor": Floor,
    "durable_echo": lambda url, model_dir: build_echo(url, model_dir, _prepare_disk()),
    "durable_floor": lambda url, model_dir: Floor(url, model_dir, _prepare_disk()),
    "textbook": build_textbook,
    "row_by_row": build_row_by_row,
}


def main() -> None:
    """Serves one of them on a free port of the loopback, and says which."""
    name, url, model_dir = sys.argv[1:]
    config = uvicorn.Config(
        CONTENDERS[name](url, Path(model_dir)), port=0, log_level="error", access_log=False,
        loop="uvloop", http="httptools", lifespan="off",
    )  # fmt: skip
    listener = config.bind_socket()
    listener.listen()  # whoever reads the line below may connect at once
    print(f"listens on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
