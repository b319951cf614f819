"""The client's own HTTP/1.1: bodies of every kind, connections kept and dropped, TLS, and what goes wrong by name."""

import asyncio
import contextlib
import ssl

import httpx2
import pytest
import trustme

from twice_rec.rationales.transport import DirectTransport

pytestmark = pytest.mark.server

HEAD = b"HTTP/1.1 200 OK\r\n"
LENGTH = HEAD + b"content-length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
UNTIL_CLOSED = HEAD + b"connection: close\r\n\r\nhello"


def talk(responses, ask, tls=None):
    """Serve these raw responses one after the other (None closes) and run `ask(client, url, transport)`."""
    asked, connections = [], []

    async def handle(reader, writer):
        connections.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
                asked.append((head, await reader.readexactly(int(length or 0))))
                response = responses[len(asked) - 1] or b""
                for part in response if isinstance(response, list) else [response]:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if responses[len(asked) - 1] is None or b"connection: close" in part:
                    break
        writer.close()

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
        url = f"{'https' if tls else 'http'}://localhost:{server.sockets[0].getsockname()[1]}/v1/x?y=1"
        transport = DirectTransport()
        async with httpx2.AsyncClient(transport=transport) as client:
            result = await asyncio.wait_for(ask(client, url, transport), 20)
        for writer in connections:
            writer.close()
        server.close()
        return result

    return asyncio.run(main()), asked, len(connections)


async def post(client, url, transport):
    response = await client.post(url, content=b"body", headers={"x-own": "1"})
    return response.status_code, response.text


@pytest.mark.parametrize(
    "response", [LENGTH, CHUNKED, UNTIL_CLOSED, [LENGTH[:20], LENGTH[20:]], [CHUNKED[:50], CHUNKED[50:]]]
)
def test_bodies(response):
    result, ((head, body),), _ = talk([response], post)
    assert result == (200, "hello")
    assert head.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\n")
    assert b"x-own: 1" in head.lower()
    assert body == b"body"


def test_connections_are_used_again_until_the_server_closes():
    async def thrice(client, url, transport):
        return [(await post(client, url, transport))[1] for _ in range(4)]

    result, _, connections = talk([LENGTH, CHUNKED, UNTIL_CLOSED, LENGTH], thrice)
    assert result == ["hello"] * 4
    assert connections == 2


def test_a_connection_the_server_closed_while_idle_is_not_used():
    async def twice(client, url, transport):
        first = await post(client, url, transport)
        (connections,) = transport._idle.values()
        connections[0]._transport.close()
        await asyncio.sleep(0.05)
        return first, await post(client, url, transport)

    result, _, connections = talk([LENGTH, LENGTH], twice)
    assert result == ((200, "hello"), (200, "hello"))
    assert connections == 2


def test_streams_come_piece_by_piece_and_may_be_left():
    async def pieces(client, url, transport):
        async with client.stream("POST", url, content=b"x") as response:
            whole = [piece async for piece in response.aiter_bytes()]
        async with client.stream("POST", url, content=b"x") as response:
            async for _ in response.aiter_bytes():
                break
        return whole, (await post(client, url, transport))[1]

    result, _, connections = talk([[CHUNKED[:50], CHUNKED[50:]]] * 2 + [LENGTH], pieces)
    assert b"".join(result[0]) == b"hello"
    assert result[1] == "hello"
    assert connections == 2


@pytest.mark.parametrize(
    "response", [None, HEAD + b"content-length: 50\r\nconnection: close\r\n\r\nhalf", b"nonsense\r\n\r\n"]
)
def test_what_goes_wrong_has_a_name(response):
    async def ask(client, url, transport):
        with pytest.raises(httpx2.RemoteProtocolError):
            await post(client, url, transport)
        return (await post(client, url, transport))[1]

    assert talk([response, LENGTH], ask)[0] == "hello"


def test_no_connection_and_no_scheme():
    async def ask(client, url, transport):
        with pytest.raises(httpx2.ConnectError):
            await client.get("http://127.0.0.1:9/")
        with pytest.raises(httpx2.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")

    talk([], ask)


def test_a_cancelled_request_takes_its_connection_with_it():
    async def ask(client, url, transport):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await post(client, url, transport)
        return (await post(client, url, transport))[1]

    result, _, connections = talk([b"", LENGTH], ask)
    assert result == "hello"
    assert connections == 2


def test_tls_is_checked(tmp_path, monkeypatch):
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))

    async def refused(client, url, transport):
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await post(client, url, transport)

    talk([LENGTH], refused, tls)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    assert talk([CHUNKED], post, tls)[0] == (200, "hello")
