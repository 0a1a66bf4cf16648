"""Keeps a Python process, and what it starts on this machine: with this folder on PYTHONPATH it comes first.

Whatever would leave the machine is refused, and noted in the file that NETWORK_GUARD_NOTES names, so that it
is known of even where the refusal is caught. What is noted: `guarded` for each process, `program WORDS` for
each program it starts, `refused EVENT` for each way out. The driver of PostgreSQL is not watched: its sockets
are a C library's, and go where DATABASE_URL says.
"""

import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

# Its sockets belong to libuv, which Python cannot watch. uvicorn then takes the event loop of the library.
sys.modules["uvloop"] = None  # type: ignore[assignment]

_NOTES = os.open(os.environ["NETWORK_GUARD_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def _note(line: str) -> None:
    os.write(_NOTES, f"{line}\n".encode())


def _stays_here(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if not host or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _host_of(event: str, arguments: tuple[Any, ...]) -> object:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        return address[0] if isinstance(address, tuple) else None  # a path is on this machine
    return arguments[0] if event.startswith("socket.gethostby") or event == "socket.getaddrinfo" else None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
        _note(f"program {' '.join(Path(os.fsdecode(word)).name for word in arguments[1][:5])}")
    elif event == "os.system":
        _note("program of the shell")
    elif not _stays_here(_host_of(event, arguments)):
        _note(f"refused {event}")
        raise PermissionError(f"{event} leads out of this machine")


_note("guarded")
sys.addaudithook(_watch)
