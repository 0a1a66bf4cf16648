"""What route functions may ask for: FastAPI aliases for what the lifespan put into the request's state.

All of them are coroutines, because FastAPI would run a plain function in a thread. The route that every lead
is asked by calls `record_of` and `predictor_of` itself: having them resolved costs more than a look into the
cache. Called by the routers and `health` only.
"""

from typing import Annotated

from fastapi import Depends, Request

from app.ai.circuit_breaker import CircuitBreaker
from app.ai.events import RequestRecord
from app.ai.predictor import Predictor


def record_of(request: Request) -> RequestRecord:
    """Returns what is known of the request."""
    record: RequestRecord = request.state.record
    return record


def predictor_of(request: Request) -> Predictor:
    """Returns the predictor of this worker."""
    predictor: Predictor = request.state.predictor
    return predictor


async def _get_record(request: Request) -> RequestRecord:
    return record_of(request)


async def _get_predictor(request: Request) -> Predictor:
    return predictor_of(request)


async def _get_breaker(request: Request) -> CircuitBreaker:
    breaker: CircuitBreaker = request.state.breaker
    return breaker


CurrentRecord = Annotated[RequestRecord, Depends(_get_record)]
LeadPredictor = Annotated[Predictor, Depends(_get_predictor)]
LegacyBreaker = Annotated[CircuitBreaker, Depends(_get_breaker)]
