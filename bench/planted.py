"""Starts the service with one part replaced by what it guards against, so that a proof can show it notices.

python -m bench.planted NAME
"""

import sys
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import app.http_protocol
from app.serve import serve
from app.settings import load_settings


def stock_protocol() -> None:
    """Uvicorn's own protocol: no client has a deadline."""
    app.http_protocol.ProblemProtocol = HttpToolsProtocol  # type: ignore[assignment,misc]


PLANTS: dict[str, Callable[[], None]] = {"stock-protocol": stock_protocol}


if __name__ == "__main__":
    PLANTS[sys.argv[1]]()
    serve(load_settings())
