"""A client for any OpenAI-compatible chat API that loses nothing, pays for nothing twice, and stops cleanly.

The `openai` package's async client does the HTTP; its own retries are off, because what to do about a fault differs:

| fault | reaction |
|---|---|
| 429 | wait at least Retry-After, everybody; then again |
| 5xx, 408, 409, timeout, connection refused or cut, body that is no completion | again after a growing, jittered wait |
| exhausted quota (429 `insufficient_quota`, 402), 401, 403, 404 | stop |
| other 4xx | this request has no answer; not stored, so that another run asks again |
| content refusal, length cut-off, malformed answer | an answer, paid for and stored; `generate` judges it |

A request that failed `max_attempts` times has no answer either; `max_failures_in_a_row` of them, none answered between,
stop the run. Nothing that is stored, logged or raised contains the API key.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import logging
import math
import os
import random
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from twice_rec.errors import InputError
from twice_rec.prompts import Message
from twice_rec.rationales.cache import Answer, AnswerCache

logger = logging.getLogger(__name__)

_STOPS = {
    401: "the server does not accept the API key",
    402: "the account has no credit left",
    403: "the API key may not do this",
    404: "the server does not know this path or model",
}
_AGAIN = (408, 409, 429)


class Stopped(InputError):
    """The run cannot go on, or must not; everything answered so far is stored."""


class NoAnswer(Exception):
    """One request gets no answer; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion: the JSON that is sent, and its SHA-256, by which its answer is found again."""

    body: bytes
    key: str
    prompt_chars: int
    max_tokens: int

    @classmethod
    def of(
        cls, messages: Sequence[Message], settings: Sampling, schema: Mapping[str, Any], schema_name: str
    ) -> Request:
        """The request for these messages; `schema` is left out where structured outputs are off."""
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": messages,
            "temperature": settings.temperature,
            "max_completion_tokens": settings.max_tokens,
        }
        if settings.structured_outputs:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": schema_name, "strict": True, "schema": schema},
            }
        written = json.dumps({**body, **settings.extra_body}, separators=(",", ":")).encode()
        chars = sum(len(message["content"]) for message in messages)
        return cls(written, hashlib.sha256(written).hexdigest(), chars, settings.max_tokens)

    def readable(self) -> str:
        """The messages as a person reads them."""
        messages = json.loads(self.body)["messages"]
        return "\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request says besides its messages; see the keys of `config.RationalesRecipe`."""

    model: str
    temperature: float
    max_tokens: int
    structured_outputs: bool
    extra_body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How requests are sent; see the keys of `config.RationalesRecipe`. None means no limit."""

    base_url: str
    api_key_env: str | None
    stream: bool
    concurrency: int
    timeout_seconds: float
    max_attempts: int
    max_failures_in_a_row: int
    backoff_seconds: float
    backoff_max_seconds: float
    requests_per_minute: float | None
    tokens_per_minute: float | None
    price_per_million_input: float
    price_per_million_output: float
    max_cost: float | None

    @classmethod
    def of(cls, recipe: Any) -> ClientSettings:
        """The keys of the same names."""
        return cls(**{f.name: getattr(recipe, f.name) for f in fields(cls)})

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """In the currency of the prices."""
        return (prompt_tokens * self.price_per_million_input + completion_tokens * self.price_per_million_output) / 1e6


class _Pace:
    """Lets an amount pass so often that no minute sees more than `per_minute` plus one request's amount."""

    def __init__(self, per_minute: float | None):
        self._seconds = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0

    async def take(self, amount: float) -> None:
        now = time.monotonic()
        wait = self._next - now
        self._next = max(self._next, now) + amount * self._seconds
        if wait > 0:
            await asyncio.sleep(wait)

    def give_back(self, amount: float) -> None:
        self._next -= amount * self._seconds


@dataclass(eq=False)
class _Fault(Exception):
    """One attempt failed. `stops` ends the run, `again` allows another attempt, `wait` is the server's Retry-After."""

    message: str
    stops: bool = False
    again: bool = True
    wait: float | None = None
    rate_limited: bool = False


class ChatClient:
    """Answers requests: from the cache, or from the server and then through the cache.

    Args:
        cache: where every answer goes before it is used. The budget counts all that it holds.

    Raises:
        InputError: where the recipe names an environment variable for the API key and it is not set.
    """

    def __init__(self, settings: ClientSettings, cache: AnswerCache):
        self.settings = settings
        self.cache = cache
        self.sent = self.answered = 0
        self.faults: dict[str, int] = {}
        self.stopped: Stopped | None = None
        self._api_key = _api_key(settings.api_key_env)
        self._requests, self._tokens = _Pace(settings.requests_per_minute), _Pace(settings.tokens_per_minute)
        self._resume_at = 0.0
        self._reserved = 0.0
        self._tokens_per_char = 1 / 3  # until answers tell
        self._chars_seen = self._tokens_seen = 0
        self._failures_in_a_row = 0
        self._under_way: dict[str, asyncio.Future[None]] = {}
        self._random = random.Random()  # noqa: S311 - jitter
        self._openai = self._connect()

    def _connect(self) -> Any:
        import httpx2
        from openai import AsyncOpenAI

        from twice_rec.rationales.transport import DirectTransport

        url = urllib.parse.urlsplit(self.settings.base_url)
        proxy = None if urllib.request.proxy_bypass(url.hostname or "") else urllib.request.getproxies().get(url.scheme)
        transport = httpx2.AsyncHTTPTransport(proxy=proxy) if proxy else DirectTransport()
        return AsyncOpenAI(
            api_key=self._api_key or "none",
            base_url=self.settings.base_url,
            max_retries=0,
            timeout=self.settings.timeout_seconds,
            http_client=httpx2.AsyncClient(transport=transport),
        )

    @property
    def cost(self) -> float:
        """Of everything in the cache."""
        return self.settings.cost(self.cache.prompt_tokens, self.cache.completion_tokens)

    def figures(self) -> dict[str, Any]:
        """Of this run, and of the whole cache; for logs and the manifest."""
        return {
            "requests_sent": self.sent,
            "requests_answered": self.answered,
            "faults": dict(sorted(self.faults.items())),
            "answers_stored": len(self.cache),
            "prompt_tokens": self.cache.prompt_tokens,
            "completion_tokens": self.cache.completion_tokens,
            "cost": round(self.cost, 4),
        }

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    @property
    def in_doubt(self) -> bool:
        """Whether the latest requests got no answer, so that the server and not they may be at fault."""
        return self._failures_in_a_row > 0

    async def preflight(self, model: str) -> None:
        """Check server, key and model, before the first request or when in doubt; costs nothing.

        Raises:
            Stopped: saying which of them is wrong.
        """
        where = f"base_url {self.settings.base_url}"
        for attempt in range(1, self.settings.max_attempts + 1):
            try:
                listed = await self._guarded(self._openai.get("/models", cast_to=str))
                names = [str(entry["id"]) for entry in json.loads(listed)["data"]]
                break
            except (ValueError, TypeError, KeyError):
                raise Stopped(
                    f"{where}: {self._redacted(listed)[:80]!r} is not a list of models; the address of an "
                    "OpenAI-compatible API usually ends in /v1"
                ) from None
            except _Fault as fault:
                if fault.again and attempt < self.settings.max_attempts and "HTTP" in fault.message:
                    await asyncio.sleep(self._wait(fault, attempt))
                    continue
                raise Stopped(f"{where}: {fault.message}{self._remedy(fault)}") from None
        if model not in names:
            known = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
            raise Stopped(f"model {model!r} is not served at {self.settings.base_url}; it has {known or 'no models'}")

    def _remedy(self, fault: _Fault) -> str:
        if "HTTP 401" in fault.message or "HTTP 403" in fault.message:
            return f"; check the environment variable {self.settings.api_key_env}"
        if "HTTP 404" in fault.message:
            return "; the address of an OpenAI-compatible API usually ends in /v1"
        return "; is the server running, and is this its address?"

    async def ask(self, request: Request) -> Answer:
        """The answer to a request.

        Raises:
            NoAnswer: where this request gets none.
            Stopped: where the run ends.
        """
        while (under_way := self._under_way.get(request.key)) is not None:
            await asyncio.wait([under_way])  # the same request, asked for another row
        if (known := self.cache.get(request.key)) is not None:
            return known
        done = self._under_way[request.key] = asyncio.get_running_loop().create_future()
        try:
            answer = await self._persist(request)
        finally:
            del self._under_way[request.key]
            done.set_result(None)
        return answer

    async def _persist(self, request: Request) -> Answer:
        """Attempt until there is an answer, and store it."""
        attempt = 0
        while True:
            answered_before = self.answered
            try:
                answer = await self._attempt(request)
                break
            except _Fault as fault:
                kind = fault.message.partition(":")[0]
                self.faults[kind] = self.faults.get(kind, 0) + 1
                logger.debug("attempt %d: %s", attempt + 1, fault.message)
                if fault.stops:
                    raise self._stop(f"{self.settings.base_url}: {fault.message}") from None
                # Under a shared rate limit, a request may be turned away while others get through.
                attempt += not (fault.rate_limited and self.answered > answered_before)
                if not fault.again or attempt >= self.settings.max_attempts:
                    raise self._give_up(fault, attempt) from None
                await asyncio.sleep(self._wait(fault, attempt))
        self.cache.put(request.key, answer)
        self.answered += 1
        self._failures_in_a_row = 0
        return answer

    def _give_up(self, fault: _Fault, attempts: int) -> Exception:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.settings.max_failures_in_a_row:
            return self._stop(f"{self._failures_in_a_row} requests in a row got no answer; the last: {fault.message}")
        return NoAnswer(fault.message if not fault.again else f"{fault.message}, {attempts} times")

    def _stop(self, reason: str) -> Stopped:
        stored = f"{len(self.cache):,} answers are stored in {self.cache.path}"
        self.stopped = self.stopped or Stopped(f"{reason}. {stored}; the same command goes on from there")
        return self.stopped

    def _wait(self, fault: _Fault, attempt: int) -> float:
        """Seconds before the next attempt: exponential, jittered, never less than the server asks for."""
        doubled = self.settings.backoff_seconds * 2.0 ** min(max(attempt, 1) - 1, 30)
        jittered = min(doubled, self.settings.backoff_max_seconds) * self._random.uniform(0.5, 1.0)
        if fault.wait is None:
            return jittered
        if fault.rate_limited:
            self._resume_at = max(self._resume_at, time.monotonic() + fault.wait)
        if fault.wait > 60:
            logger.warning("the server asks to wait %.0f seconds", fault.wait)
        return fault.wait + jittered * 0.25

    async def _attempt(self, request: Request) -> Answer:
        """Send once, within the limits and the budget."""
        expected = request.prompt_chars * self._tokens_per_char + request.max_tokens
        await self._requests.take(1)
        await self._tokens.take(expected)
        while (pause := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause * self._random.uniform(1.0, 1.1))
        if self.stopped:
            raise self.stopped
        worst = self.settings.cost(request.prompt_chars * self._tokens_per_char, request.max_tokens)
        limit = self.settings.max_cost
        if limit is not None and self.cost + self._reserved + worst > limit:
            raise self._stop(
                f"the budget is used up: {self.cost:.4f} of max_cost {limit:g} spent, and {self._reserved + worst:.4f} "
                "more could be needed for the requests at hand; raise max_cost, or lower max_rationales"
            )
        self._reserved += worst
        used = expected
        self.sent += 1
        try:
            send = self._streamed if self.settings.stream else self._whole
            answer = self._counted(request, await self._guarded(send(request)))
            used = answer.prompt_tokens + answer.completion_tokens
            self._learn(request, answer)
            return answer
        finally:
            self._reserved -= worst
            self._tokens.give_back(expected - used)

    def _counted(self, request: Request, answer: Answer) -> Answer:
        """With token counts, estimated from the lengths where the server sends none."""
        if answer.prompt_tokens:
            return answer
        prompt, completion = request.prompt_chars * self._tokens_per_char, len(answer.text) * self._tokens_per_char
        return replace(answer, prompt_tokens=math.ceil(prompt), completion_tokens=math.ceil(completion))

    def _learn(self, request: Request, answer: Answer) -> None:
        self._chars_seen += request.prompt_chars
        self._tokens_seen += answer.prompt_tokens
        if self._tokens_seen and self._chars_seen:
            self._tokens_per_char = self._tokens_seen / self._chars_seen

    async def _whole(self, request: Request) -> Answer:
        # Not `chat.completions.create`: it walks through every message's type declarations, which at 64 requests a
        # fifth of a second costs more than everything else together.
        text = await self._openai.post(
            "/chat/completions", content=request.body, cast_to=str, options={"headers": _JSON_HEADERS}
        )
        return read_completion(text)

    async def _streamed(self, request: Request) -> Answer:
        from openai import AsyncStream

        body = {**json.loads(request.body), "stream": True, "stream_options": {"include_usage": True}}
        stream = await self._openai.post(
            "/chat/completions",
            content=json.dumps(body).encode(),
            cast_to=object,
            stream=True,
            stream_cls=AsyncStream[object],
            options={"headers": _JSON_HEADERS},
        )
        async with stream:
            return _join_chunks([chunk async for chunk in stream])

    async def _guarded(self, call: Any) -> Any:
        """Await a call to the server; whatever goes wrong becomes a `_Fault` without the API key in it."""
        import httpx2
        import openai

        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                return await call
        except (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException):
            raise _Fault(f"no answer within {self.settings.timeout_seconds:g} seconds") from None
        except openai.APIStatusError as error:
            raise self._status_fault(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _Fault(self._redacted(f"connection failed: {type(cause).__name__} {cause}")) from None
        except (httpx2.HTTPError, httpx2.StreamError, openai.APIError) as error:
            raise _Fault(self._redacted(f"connection cut: {type(error).__name__} {error}")[:300]) from None
        except NotACompletion as error:
            raise _Fault(self._redacted(f"unusable response: {error}")) from None

    def _status_fault(self, error: Any) -> _Fault:
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        said = self._redacted(str(body.get("message") or error.message))[:300]
        message = f"HTTP {status}: {said}"
        if status == 429 and "insufficient_quota" in (error.code, error.type):
            return _Fault(f"{message} (the quota is exhausted)", stops=True, again=False)
        if status in _STOPS:
            return _Fault(f"{message} ({_STOPS[status]})", stops=True, again=False)
        again = status in _AGAIN or status >= 500
        return _Fault(message, again=again, wait=_retry_after(error.response.headers), rate_limited=status == 429)

    def _redacted(self, text: str) -> str:
        return text.replace(self._api_key, "[API key]") if self._api_key else text


_JSON_HEADERS = {"content-type": "application/json"}


class NotACompletion(Exception):
    """A response with status 200 that holds no completion."""


def read_completion(text: str) -> Answer:
    """Read a `chat.completion` object; of several choices the first counts."""
    try:
        body = json.loads(text)
    except ValueError:
        raise NotACompletion("the body is not JSON") from None
    try:
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        answer = Answer(
            text=message.get("content") or "",
            finish=choice.get("finish_reason") or "",
            refusal=message.get("refusal") or "",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        raise NotACompletion("no choice with a message in it") from None
    if not isinstance(answer.text, str) or not isinstance(answer.refusal, str) or not isinstance(answer.finish, str):
        raise NotACompletion("content, refusal and finish_reason must be text")
    return answer


def _join_chunks(chunks: Sequence[Any]) -> Answer:
    """Put a stream together; one without a finish reason was cut."""
    content, refusal, finish = [], [], ""
    usage: dict[str, Any] = {}
    try:
        for chunk in chunks:
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                if choice.get("index", 0) == 0:
                    delta = choice.get("delta") or {}
                    content.append(delta.get("content") or "")
                    refusal.append(delta.get("refusal") or "")
                    finish = choice.get("finish_reason") or finish
        answer = Answer(
            "".join(content),
            finish,
            "".join(refusal),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
    except (TypeError, ValueError, AttributeError):
        raise NotACompletion("a chunk of the stream is not one of a completion") from None
    if not finish:
        raise NotACompletion("the stream ended before the answer did")
    return answer


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After` (a number or a date); None where neither is there or sound."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} is not set; export the API key in it, or set api_key_env to null for "
            "a server without keys"
        )
    return key
