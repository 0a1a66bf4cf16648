"""uvicorn's HTTP protocol, except that what it cannot parse is refused in the shape of every other error.

Such bytes never become a request, so they reach no middleware: no event is recorded (they are counted
instead) and no origin is known that CORS headers could name. Handed to uvicorn by `serve`.
"""

import time

from uuid_utils import uuid7
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.ai.events import UNMATCHED_ROUTE, RequestRecord
from app.error_handlers import Problems
from app.errors import MalformedRequestError
from app.metrics import observe_request


class ProblemProtocol(HttpToolsProtocol):
    """Answers unparsable bytes with 400 MALFORMED_REQUEST and closes the connection."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words, which are plain text
        """Called by uvicorn when its parser gives up."""
        record = RequestRecord(request_id=str(uuid7()), started=0.0, as_of=time.time())
        error = MalformedRequestError("What was sent is not an HTTP request.")
        answer = Problems({})({"path": "/", "state": {"record": record}}, error)
        headers = [
            *answer.raw_headers,
            (b"x-request-id", record.request_id.encode()),
            (b"connection", b"close"),
        ]
        observe_request(UNMATCHED_ROUTE, answer.status_code, error.code, 0.0)
        head = b"".join(b"%s: %s\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[answer.status_code] + head + b"\r\n" + bytes(answer.body))
        self.transport.close()
