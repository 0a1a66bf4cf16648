"""What route functions may ask for, and the route that hands its function the request and nothing else.

FastAPI can resolve what a function asks for (`CurrentRecord`, by a coroutine because it would run a plain
function in a thread). For the routes that score that costs more than a look into the cache, so each is a
`DirectRoute`, whose function asks by itself. Called by the routers and `health` only.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from app.ai.circuit_breaker import CircuitBreaker
from app.ai.events import RequestRecord
from app.ai.predictor import Predictor


class DirectRoute(APIRoute):
    """A route that FastAPI documents and finds, and whose function is called without its help.

    The function takes the request and returns the answer; what it depends on takes the request, and is called
    before it, in order.
    """

    def __init__(
        self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **described: Any
    ) -> None:
        super().__init__(path, endpoint, **described)
        dependencies = [depends.dependency for depends in self.dependencies if depends.dependency is not None]

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            for dependency in dependencies:
                await dependency(request)
            response = await endpoint(request)
            await response(scope, receive, send)

        self.app = answer


def record_of(request: Request) -> RequestRecord:
    """Returns what is known of the request."""
    record: RequestRecord = request.scope["state"]["record"]
    return record


def predictor_of(request: Request) -> Predictor:
    """Returns the predictor of this worker."""
    predictor: Predictor = request.scope["state"]["predictor"]
    return predictor


def breaker_of(request: Request) -> CircuitBreaker:
    """Returns the circuit breaker of this worker's legacy route."""
    breaker: CircuitBreaker = request.scope["state"]["breaker"]
    return breaker


async def _get_record(request: Request) -> RequestRecord:
    return record_of(request)


CurrentRecord = Annotated[RequestRecord, Depends(_get_record)]
