"""Tells by its exit status whether the service of this environment is alive: `python -m app.probe`.

The image's health check. It runs every few seconds, also where the service leaves no time: so it imports
next to nothing, and reads the two settings that it needs by itself (a test holds them to `app.settings`).
What `.env` says does not count: the image sets both.
"""

import http.client
import os
import socket
import sys

TIMEOUT_SECONDS = 2.0

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound


def is_alive(host: str, port: str) -> bool:
    """Tells whether `/livez` answers 200 where a service with this HOST and PORT listens; empty: not set."""
    host = host or "127.0.0.1"
    connection = http.client.HTTPConnection(
        _LOOPBACK.get(host, host), int(port or 8000), timeout=TIMEOUT_SECONDS
    )
    try:
        if host.startswith("unix:"):
            connection.host = "localhost"
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(TIMEOUT_SECONDS)
            connection.sock.connect(host.removeprefix("unix:"))
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if is_alive(os.environ.get("HOST", ""), os.environ.get("PORT", "")) else 1)
