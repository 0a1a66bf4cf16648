"""What route functions may ask for: FastAPI aliases for what the lifespan put into the request's state.

All of them are coroutines, because FastAPI would run a plain function in a thread. Called by the routers and
`health` only.
"""

from typing import Annotated

from fastapi import Depends, Request

from app.ai.circuit_breaker import CircuitBreaker
from app.ai.events import RequestRecord
from app.ai.predictor import Predictor


async def _get_record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


async def _get_predictor(request: Request) -> Predictor:
    predictor: Predictor = request.state.predictor
    return predictor


async def _get_breaker(request: Request) -> CircuitBreaker:
    breaker: CircuitBreaker = request.state.breaker
    return breaker


CurrentRecord = Annotated[RequestRecord, Depends(_get_record)]
LeadPredictor = Annotated[Predictor, Depends(_get_predictor)]
LegacyBreaker = Annotated[CircuitBreaker, Depends(_get_breaker)]
