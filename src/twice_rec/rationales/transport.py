"""HTTP/1.1 for the `openai` client over asyncio's own streams, at half the cost of the client's usual transport.

At 64 requests a fifth of a second the usual one spends most of a core on locks and look-ups, and since it gives way to
other requests many times within one, all of a burst end together and keep doing so. Here a request is written at once
and only then waited for. Connections are kept and used again, the most recent first; the parser is h11, as there.
There is no proxy support, no HTTP/2 and no timeout: the caller has one around each request.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import h11
import httpx2


class DirectTransport(httpx2.AsyncBaseTransport):
    """Connections to any host, as many as there are requests at a time."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str, int], list[_Connection]] = {}
        self._ssl: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and wait for the head of the response; its body is a stream.

        Raises:
            httpx2.ConnectError: where there is no connection to be had.
            httpx2.RemoteProtocolError: where the server closes it early or does not speak HTTP.
        """
        body = await request.aread()
        connection = await self._connection(request)
        try:
            status, headers = await connection.exchange(request, body)
        except BaseException:
            connection.abort()
            raise
        return httpx2.Response(status, headers=headers, stream=_Body(connection, self._idle[_origin(request)]))

    async def _connection(self, request: httpx2.Request) -> _Connection:
        scheme, host, port = _origin(request)
        if scheme not in ("http", "https"):
            raise httpx2.UnsupportedProtocol(f"{scheme}:// is not http:// or https://", request=request)
        idle = self._idle.setdefault((scheme, host, port), [])
        while idle:
            connection = idle.pop()
            if connection.is_open:
                return connection
        if scheme == "https" and self._ssl is None:
            self._ssl = httpx2.create_ssl_context()
        encryption = self._ssl if scheme == "https" else None
        try:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port, ssl=encryption)
        except OSError as error:
            raise httpx2.ConnectError(str(error), request=request) from error
        return connection

    async def aclose(self) -> None:
        """Close what is idle."""
        for connections in self._idle.values():
            while connections:
                connections.pop().abort()


def _origin(request: httpx2.Request) -> tuple[str, str, int]:
    url = request.url
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._parser = h11.Connection(h11.CLIENT)
        self._transport: Any = None
        self._events: deque[Any] = deque()  # h11 events, or the error that ended the connection
        self._waiting: asyncio.Future[None] | None = None
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._take(data)

    def eof_received(self) -> None:
        self._take(b"")

    def connection_lost(self, error: Exception | None) -> None:
        if self.is_open:
            self._take(b"")
        self._end(f"the server closed the connection ({error or 'no error'})")

    def _take(self, data: bytes) -> None:
        try:
            self._parser.receive_data(data)
            while (event := self._parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.ConnectionClosed):
                    self._end("the server closed the connection")
                    return
                self._events.append(event)
                if isinstance(event, h11.EndOfMessage):
                    break
        except h11.RemoteProtocolError as error:
            self._end(str(error))
        self._wake()

    def _end(self, why: str) -> None:
        self.is_open = False
        self._events.append(httpx2.RemoteProtocolError(why))
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def exchange(self, request: httpx2.Request, body: bytes) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Write a request; status and headers of the response."""
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        parts = [self._parser.send(head), self._parser.send(h11.Data(data=body)), self._parser.send(h11.EndOfMessage())]
        self._transport.write(b"".join(part for part in parts if part))
        while not isinstance(event := await self.next_event(), h11.Response):  # 1xx come before it
            pass
        return event.status_code, list(event.headers.raw_items())

    async def next_event(self) -> Any:
        """The next h11 event; raises what ended the connection."""
        while not self._events:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        event = self._events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def reuse(self) -> bool:
        """After a whole response: whether the connection can take another request."""
        if not self.is_open or self._parser.our_state is not h11.DONE or self._parser.their_state is not h11.DONE:
            self.abort()
            return False
        self._parser.start_next_cycle()
        return True

    def abort(self) -> None:
        """Drop the connection."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()


class _Body(httpx2.AsyncByteStream):
    """The body as it comes; read to its end, it hands its connection back."""

    def __init__(self, connection: _Connection, idle: list[_Connection]):
        self._connection: _Connection | None = connection
        self._idle = idle

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        assert connection is not None
        while isinstance(event := await connection.next_event(), h11.Data):
            yield bytes(event.data)
        self._connection = None
        if connection.reuse():
            self._idle.append(connection)

    async def aclose(self) -> None:
        """Drop a connection whose response was not read to its end."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
