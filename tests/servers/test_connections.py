"""What stage 1's client makes of raw HTTP: bodies of every kind, connections kept and dropped, TLS, proxies, faults."""

import asyncio
import contextlib
import json
import ssl

import pytest
import trustme

from twice_rec.errors import InputError
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.client import ChatClient
from twice_rec.rationales.completions import Request
from twice_rec.rationales.faults import NoCompletion
from twice_rec.rationales.recipe import ClientConfig, SamplingConfig

pytestmark = pytest.mark.server

BODY = json.dumps({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\n"
LENGTH = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n" + BODY[:2] + b"\r\n%x\r\n" % (len(BODY) - 2)
CHUNKED += BODY[2:] + b"\r\n0\r\n\r\n"
UNTIL_CLOSED = HEAD + b"connection: close\r\n\r\n" + BODY
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": %s}]}\n\n'
EVENTS = [EVENT % (b"hel", b"null"), EVENT % (b"lo", b'"stop"') + b"data: [DONE]\n\n"]
CLOSE = object()  # the server closes the connection


def request(number=0):
    messages = [{"role": "user", "content": f"question {number}"}]
    return Request.of(messages, SamplingConfig(model="m", structured_outputs=False), {}, "")


class RawServer:
    """Sends these responses one after the other, on whatever connection; notes what is asked, and the connections.

    Args:
        responses: bytes, or a list of bytes sent with pauses between, CLOSE among them.
        together: answer only when so many requests have come.
    """

    def __init__(self, responses, together=1):
        self.responses, self.together = responses, together
        self.asked, self.writers = [], []
        self.enough = asyncio.Event()

    async def handle(self, reader, writer):
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
                self.asked.append((head, await reader.readexactly(int(length or 0))))
                response = self.responses[len(self.asked) - 1]
                if len(self.asked) % self.together == 0:
                    self.enough.set()
                    self.enough = asyncio.Event()
                elif self.together > 1:
                    await self.enough.wait()
                for part in response if isinstance(response, list) else [response]:
                    if part is CLOSE:
                        writer.close()
                        return
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if b"connection: close" in part:
                    break
        writer.close()


def talk(folder, responses, ask, tls=None, together=1, **changes):
    """Run `ask(client)` against a server of its own; returns (its result, the server, the client)."""

    async def main():
        server = RawServer(responses, together)
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=tls, backlog=512)
        port = listening.sockets[0].getsockname()[1]
        config = {"base_url": f"{'https' if tls else 'http'}://localhost:{port}/v1", "api_key_env": None}
        config = ClientConfig(
            **{**config, "backoff_seconds": 0.0, "timeout_seconds": 2.0, "max_attempts": 2, **changes}
        )
        with CompletionCache(folder / "cache.jsonl") as cache:
            client = ChatClient(config, cache)
            try:
                result = await asyncio.wait_for(ask(client), 20)
            finally:
                await client.close()
                for writer in server.writers:
                    writer.close()
                listening.close()
        return result, server, client

    return asyncio.run(main())


async def once(client):
    return (await client.ask(request())).text


async def four_times(client):
    return [(await client.ask(request(number))).text for number in range(4)]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "response", [LENGTH, CHUNKED, UNTIL_CLOSED, [LENGTH[:20], LENGTH[20:]], [CHUNKED[:50], CHUNKED[50:]]]
)
def test_bodies(tmp_path, response):
    result, server, client = talk(tmp_path, [response], once)
    ((head, body),) = server.asked
    assert result == "hello"
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"content-type: application/json\r\n" in head.lower()
    assert body == request().body  # byte by byte, so that its hash is the key
    assert client.faults == {}


def test_connections_are_used_again_until_the_server_closes(tmp_path):
    result, server, _ = talk(tmp_path, [LENGTH, CHUNKED, UNTIL_CLOSED, LENGTH], four_times)
    assert result == ["hello"] * 4
    assert len(server.writers) == 2


def test_a_connection_the_server_closed_while_idle_is_not_used(tmp_path):
    async def ask(client):
        first = await client.ask(request(0))
        await asyncio.sleep(0.05)
        return first.text, (await client.ask(request(1))).text

    result, server, client = talk(tmp_path, [[LENGTH, CLOSE], LENGTH], ask)
    assert result == ("hello", "hello")
    assert client.faults == {}
    assert len(server.writers) == 2


def test_as_many_connections_as_requests_at_a_time_and_all_are_kept(tmp_path):
    """The openai package by itself keeps 100."""
    many = 150

    async def ask(client):
        for wave in range(2):
            await asyncio.gather(*(client.ask(request(many * wave + number)) for number in range(many)))

    _, server, client = talk(tmp_path, [LENGTH] * 2 * many, ask, together=many, concurrency=many, timeout_seconds=15.0)
    assert client.faults == {}
    assert len(server.writers) == many


def test_streams_come_piece_by_piece_and_their_connection_is_used_again(tmp_path):
    stream = [HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"]
    stream += [b"%x\r\n" % len(event) + event + b"\r\n" for event in EVENTS] + [b"0\r\n\r\n"]
    result, server, client = talk(tmp_path, [stream] * 4, four_times, stream=True)
    assert result == ["hello"] * 4
    assert json.loads(server.asked[0][1])["stream"] is True
    assert client.faults == {}
    assert len(server.writers) == 1


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        ([CLOSE], "connection failed"),
        (HEAD + b"content-length: 50\r\nconnection: close\r\n\r\nhalf", "connection "),
        (b"nonsense\r\n\r\n", "connection failed"),
        (HEAD + b"content-length: 4\r\n\r\nnone", "unusable response"),
    ],
)
def test_what_goes_wrong_has_a_name_and_is_tried_again(tmp_path, response, kind):
    result, _, client = talk(tmp_path, [response, LENGTH], once)
    assert result == "hello"
    ((name, count),) = client.faults.items()
    assert name.startswith(kind)
    assert count == 1


@pytest.mark.parametrize("end", [[CLOSE], [b"0\r\n\r\n"]])
def test_a_stream_that_is_cut_is_tried_again(tmp_path, end):
    head = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [b"%x\r\n" % len(event) + event + b"\r\n" for event in EVENTS]
    responses = [[head, pieces[0], *end], [head, *pieces, b"0\r\n\r\n"]]
    result, _, client = talk(tmp_path, responses, once, stream=True)
    assert result == "hello"
    assert sum(client.faults.values()) == 1


def test_no_connection_and_no_scheme(tmp_path):
    for url, message in (("http://127.0.0.1:9/v1", "connection failed"), ("ftp://127.0.0.1/v1", "UnsupportedProtocol")):
        with pytest.raises(NoCompletion, match=message):
            talk(tmp_path, [], once, base_url=url)


def test_a_request_out_of_time_takes_its_connection_with_it(tmp_path):
    result, server, client = talk(tmp_path, [b"", LENGTH], once, timeout_seconds=0.3)
    assert result == "hello"
    assert client.faults == {"no answer within 0.3 seconds": 1}
    assert len(server.writers) == 2


def test_tls_is_checked(tmp_path, monkeypatch):
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    with pytest.raises(NoCompletion, match="CERTIFICATE_VERIFY_FAILED"):
        talk(tmp_path, [LENGTH], once, tls)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    assert talk(tmp_path, [CHUNKED], once, tls)[0] == "hello"


def test_the_proxy_of_the_environment_is_used(tmp_path, monkeypatch):
    async def through_a_proxy(client):
        port = client.config.base_url.rpartition(":")[2].partition("/")[0]
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        config = client.config.model_copy(update={"base_url": "http://api.example/v1"})
        behind = ChatClient(config, client.cache)
        found = await behind.ask(request())
        monkeypatch.setenv("NO_PROXY", "api.example")
        direct = ChatClient(config, client.cache)
        with pytest.raises(NoCompletion, match="connection failed"):
            await direct.ask(request(1))
        await asyncio.gather(behind.close(), direct.close())
        return found.text

    result, server, _ = talk(tmp_path, [LENGTH], through_a_proxy)
    assert result == "hello"
    assert server.asked[0][0].startswith(b"POST http://api.example/v1/chat/completions HTTP/1.1\r\n")


def test_certificates_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(InputError, match="certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read"):
        talk(tmp_path, [LENGTH], once)


def test_a_stream_of_something_else_is_paid_for_twice_at_most(tmp_path):
    head = HEAD + b"content-type: text/event-stream\r\nconnection: close\r\n\r\n"
    with pytest.raises(NoCompletion, match="a chunk is not JSON"):
        talk(tmp_path, [head + b"data: {hello\n\n"] * 4, once, stream=True, max_attempts=4)
    spent = (tmp_path / "cache.unusable.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion_tokens"] for line in spent] == [600, 600]
