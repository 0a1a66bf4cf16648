"""A TCP proxy in front of a PostgreSQL's Unix socket that can stall, as a network that loses packets does.

While it stalls it accepts connections and takes bytes, and delivers nothing in either direction; afterwards
it delivers what it kept, as TCP does once its retransmissions arrive. Used by proofs.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from psycopg.conninfo import conninfo_to_dict


class FaultProxy:
    """Forwards connections from a port of the loopback to the database of `url` (a Unix socket's)."""

    def __init__(self, url: str) -> None:
        parameters = conninfo_to_dict(url)
        self._socket = f"{parameters['host']}/.s.PGSQL.{parameters['port']}"
        self._passes = asyncio.Event()
        self._passes.set()
        self.port = 0

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Yields the URL that leads through the proxy."""
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        finally:
            server.close()

    def stall(self) -> None:
        """Delivers nothing from now on."""
        self._passes.clear()

    def flow(self) -> None:
        """Delivers again."""
        self._passes.set()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._passes.wait()
            server_reader, server_writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            writer.close()
            return
        # Cancelled when the proof is over, which asyncio's own server would report as an error.
        with suppress(asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, server_writer), self._pump(server_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        await self._passes.wait()
        writer.close()
