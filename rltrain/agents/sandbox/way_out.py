"""The one way out of a sandbox without a network: connections to its own loopback go on to one address outside."""

from __future__ import annotations

import asyncio
import contextlib
import socket

_MOST = 64  # connections at a time; more wait inside
_CHUNK = 1 << 16


class WayOut:
    """Forwards what a socket accepts that was made inside the sandbox, and so listens in its network."""

    def __init__(self, listener: socket.socket, target: tuple[str, int], port: int) -> None:
        """`port`: that of `listener`; `target`: where connections lead to."""
        self.port = port
        self._listener, self._target = listener, target
        listener.setblocking(False)
        self._slots = asyncio.Semaphore(_MOST)
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Close all connections."""
        tasks = [self._accepting, *self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._slots.acquire()
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # it was gone again, or no descriptor is free
                self._slots.release()
                await asyncio.sleep(0.05)
                continue
            task = asyncio.create_task(self._serve(connection))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket) -> None:
        writers = []
        try:
            inner, to_inner = await asyncio.open_connection(sock=connection)
            writers.append(to_inner)
            outer, to_outer = await asyncio.open_connection(*self._target)
            writers.append(to_outer)
            await asyncio.gather(_pump(inner, to_outer), _pump(outer, to_inner))
        except OSError:
            pass  # either end closed it
        finally:
            self._slots.release()
            for writer in writers:
                writer.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        target.write(data)
        await target.drain()
    with contextlib.suppress(OSError):
        target.write_eof()
