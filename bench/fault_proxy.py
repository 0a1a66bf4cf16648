"""A TCP proxy in front of a PostgreSQL's Unix socket that can stall, as a network that loses packets does.

While it stalls it accepts connections and takes bytes, and delivers nothing in either direction; afterwards
it delivers what it kept, as TCP does once its retransmissions arrive. It can also forget its connections
without a word, as a host that lost its power does. Used by proofs and tests.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

from psycopg.conninfo import conninfo_to_dict


class FaultProxy:
    """Forwards connections from a port of the loopback to the database of `url` (a Unix socket's)."""

    def __init__(self, url: str) -> None:
        parameters = conninfo_to_dict(url)
        self._socket = f"{parameters['host']}/.s.PGSQL.{parameters['port']}"
        self._passes = asyncio.Event()
        self._passes.set()
        self.port = 0
        self._life = 0
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Yields the URL that leads through the proxy."""
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def stall(self) -> None:
        """Delivers nothing from now on."""
        self._passes.clear()

    def flow(self) -> None:
        """Delivers again."""
        self._passes.set()

    def come_up_again(self) -> None:
        """Forgets the connections there are: whatever comes over one of them is answered with a reset."""
        self._life += 1

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        # Cancelled when the proof is over, which asyncio's own server would report as an error.
        with suppress(asyncio.CancelledError, OSError), closing(writer):
            await self._passes.wait()
            server_reader, server_writer = await asyncio.open_unix_connection(self._socket)
            with closing(server_writer):
                await asyncio.gather(
                    self._pump(reader, server_writer, writer), self._pump(server_reader, writer, writer)
                )
        self._connections.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        life = self._life
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._passes.wait()
                if life != self._life:
                    reset = struct.pack("ii", 1, 0)
                    client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                    client.transport.abort()
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()
        await self._passes.wait()
        writer.close()
