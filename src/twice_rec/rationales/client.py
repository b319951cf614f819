"""A client for any OpenAI-compatible chat API that loses nothing, pays for nothing twice, and stops cleanly.

The `openai` package's own client does the HTTP. Its retries are off: what happens after a fault differs by fault, see
`faults`. A request that failed `max_attempts` times gets no completion; after `max_failures_in_a_row` of them without a
completion in between, the run stops. Nothing that is stored, logged or raised contains the API key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from twice_rec.errors import InputError
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.completions import Completion, NotACompletion, Request, join_chunks, read_completion
from twice_rec.rationales.faults import Fault, NoCompletion, Stopped, status_fault
from twice_rec.rationales.recipe import ClientConfig

logger = logging.getLogger(__name__)

_USUAL_ADDRESS = "the address of an OpenAI-compatible API usually ends in /v1"


class _Pace:
    """Lets an amount pass so often that no minute sees more than `per_minute` plus the amount of one request."""

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


class ChatClient:
    """Gives the completion of a request: from the cache, or from the server and then through the cache.

    Args:
        cache: where every completion goes before it is used. The budget counts all that it holds.

    Raises:
        InputError: if the config names an environment variable for the API key and it is not set.
    """

    def __init__(self, config: ClientConfig, cache: CompletionCache):
        import httpx2
        import openai

        self._api_key = None if config.api_key_env is None else os.environ.get(config.api_key_env, "").strip()
        if self._api_key == "":
            raise InputError(
                f"the environment variable {config.api_key_env} is not set; export the API key in it, or set "
                "api_key_env to null for a server without keys"
            )
        self.config = config
        self.cache = cache
        self.sent = self.answered = 0
        self.faults = Counter[str]()
        self.stopped: Stopped | None = None
        self._requests, self._tokens = _Pace(config.requests_per_minute), _Pace(config.tokens_per_minute)
        self._resume_at = 0.0
        self._reserved = 0.0  # what the requests under way may cost
        self._tokens_per_char = 1 / 3  # until completions tell
        self._chars_seen = self._tokens_seen = 0
        self.failures_in_a_row = 0  # above 0, the server may be at fault, and not the requests
        self._under_way = WeakValueDictionary[str, asyncio.Lock]()  # by request key
        self._random = random.Random()  # noqa: S311 - jitter
        # One connection per request under way, all of them kept: the package keeps 100 and opens 1,000 at most.
        limits = httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._openai = openai.AsyncOpenAI(  # reads proxies and certificates from the environment
            api_key=self._api_key or "none",
            base_url=config.base_url,
            max_retries=0,
            timeout=config.timeout_seconds,
            http_client=openai.DefaultAsyncHttpx2Client(limits=limits),
        )

    @property
    def cost(self) -> float:
        """The cost of everything in the cache, in the currency of the prices."""
        return self.config.cost(self.cache.prompt_tokens, self.cache.completion_tokens)

    def figures(self) -> dict[str, Any]:
        """Return counts of this run and of the whole cache, for logs and the manifest."""
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

    async def preflight(self, model: str) -> None:
        """Check server, key and model, before the first request or when in doubt. It costs nothing.

        Raises:
            Stopped: if one of them is wrong; the message says which.
        """
        where = f"base_url {self.config.base_url}"
        for attempt in range(1, self.config.max_attempts + 1):
            try:
                listed = await self._guarded(self._openai.get("/models", cast_to=str))
                names = [str(entry["id"]) for entry in json.loads(listed)["data"]]
                break
            except (ValueError, TypeError, KeyError):
                found = repr(self._redacted(listed)[:80])
                raise Stopped(f"{where}: {found} is not a list of models; {_USUAL_ADDRESS}") from None
            except Fault as fault:
                if fault.again and attempt < self.config.max_attempts and fault.status:
                    await asyncio.sleep(self._wait(fault, attempt))
                    continue
                check_key = f"check the environment variable {self.config.api_key_env}"
                remedies: dict[int | None, str] = {401: check_key, 403: check_key, 404: _USUAL_ADDRESS}
                remedy = remedies.get(fault.status, "is the server running, and is this its address?")
                raise Stopped(f"{where}: {fault.message}; {remedy}") from None
        if model not in names:
            known = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
            raise Stopped(f"model {model!r} is not served at {self.config.base_url}; it has {known or 'no models'}")

    async def ask(self, request: Request) -> Completion:
        """Return the completion of a request.

        Raises:
            NoCompletion: if this request gets none.
            Stopped: if the run ends.
        """
        lock = self._under_way.setdefault(request.key, asyncio.Lock())
        async with lock:  # the same request may be under way for another example
            return self.cache.get(request.key) or await self._persist(request)

    async def _persist(self, request: Request) -> Completion:
        """Send the request until there is a completion, and store that."""
        attempt = 0
        while True:
            answered_before = self.answered
            try:
                completion = await self._attempt(request)
            except Fault as fault:
                self.faults[fault.message.partition(":")[0]] += 1
                logger.debug("attempt %d: %s", attempt + 1, fault.message)
                if fault.stops:
                    raise self._stop(f"{self.config.base_url}: {fault.message}") from None
                # Under a shared rate limit, a request may be turned away while others get through.
                attempt += not (fault.status == 429 and self.answered > answered_before)
                if not fault.again or attempt >= self.config.max_attempts:
                    self.failures_in_a_row += 1
                    if self.failures_in_a_row >= self.config.max_failures_in_a_row:
                        many = f"{self.failures_in_a_row} requests in a row got no completion"
                        raise self._stop(f"{many}; the last: {fault.message}") from None
                    raise NoCompletion(fault.message + (f", {attempt} times" if fault.again else "")) from None
                await asyncio.sleep(self._wait(fault, attempt))
            else:
                self.cache.put(request.key, completion)
                self.answered += 1
                self.failures_in_a_row = 0
                return completion

    def _stop(self, reason: str) -> Stopped:
        stored = f"{len(self.cache):,} completions are stored in {self.cache.path}"
        self.stopped = self.stopped or Stopped(f"{reason}. {stored}; the same command goes on from there")
        return self.stopped

    def _wait(self, fault: Fault, attempt: int) -> float:
        """Return the seconds before the next attempt: they double, are jittered, and are what the server asks for."""
        doubled = self.config.backoff_seconds * 2.0 ** min(max(attempt, 1) - 1, 30)
        jittered = min(doubled, self.config.backoff_max_seconds) * self._random.uniform(0.5, 1.0)
        if fault.wait is None:
            return jittered
        if fault.status == 429:
            self._resume_at = max(self._resume_at, time.monotonic() + fault.wait)
        if fault.wait > 60:
            logger.warning("the server asks to wait %.0f seconds", fault.wait)
        return fault.wait + jittered * 0.25

    async def _attempt(self, request: Request) -> Completion:
        """Send the request once, within the limits and the budget."""
        prompt_tokens = request.prompt_chars * self._tokens_per_char
        expected = prompt_tokens + request.max_tokens
        await self._requests.take(1)
        await self._tokens.take(expected)
        while (pause := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause * self._random.uniform(1.0, 1.1))
        if self.stopped:
            raise self.stopped
        worst = self._reserve(request)
        used = expected
        self.sent += 1
        try:
            completion = self._counted(request, await self._guarded(self._send(request)))
            used = completion.prompt_tokens + completion.completion_tokens
            return completion
        finally:
            self._reserved -= worst
            self._tokens.give_back(expected - used)

    def _reserve(self, request: Request) -> float:
        """Set the most that a request can cost aside, and return it; stop the run if the budget does not allow it."""
        worst = self.config.cost(request.prompt_chars * self._tokens_per_char, request.max_tokens)
        limit = self.config.max_cost
        if limit is not None and self.cost + self._reserved + worst > limit:
            raise self._stop(
                f"the budget is used up: {self.cost:.4f} of max_cost {limit:g} spent, and {self._reserved + worst:.4f} "
                "more could be needed for the requests at hand; raise max_cost, or lower max_rationales"
            )
        self._reserved += worst
        return worst

    def _counted(self, request: Request, completion: Completion) -> Completion:
        """Return the completion with token counts; if the server sent none, they are estimated from the lengths."""
        if not completion.prompt_tokens:
            lengths = (request.prompt_chars, len(completion.text))
            prompt, written = (math.ceil(chars * self._tokens_per_char) for chars in lengths)
            completion = replace(completion, prompt_tokens=prompt, completion_tokens=written)
        self._chars_seen += request.prompt_chars
        self._tokens_seen += completion.prompt_tokens
        if self._tokens_seen and self._chars_seen:
            self._tokens_per_char = self._tokens_seen / self._chars_seen
        return completion

    async def _send(self, request: Request) -> Completion:
        import openai

        # Not `chat.completions.create`: it walks through the type declarations of every message, which costs a
        # quarter of the rate (benchmarks/rationale_client.py).
        post = partial(self._openai.post, "/chat/completions")
        if not self.config.stream:
            return read_completion(await post(content=request.body, cast_to=str))
        body = {**json.loads(request.body), "stream": True, "stream_options": {"include_usage": True}}
        stream_cls = openai.AsyncStream[object]
        stream = await post(content=json.dumps(body).encode(), cast_to=object, stream=True, stream_cls=stream_cls)
        async with stream:
            return join_chunks([chunk async for chunk in stream])

    async def _guarded(self, call: Any) -> Any:
        """Await a call to the server; whatever goes wrong becomes a `Fault` without the API key in it."""
        import httpx2
        import openai

        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                return await call
        except (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException):
            raise Fault(f"no answer within {self.config.timeout_seconds:g} seconds") from None
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            said = self._redacted(str(body.get("message") or error.message))[:300]
            quota_is_exhausted = "insufficient_quota" in (error.code, error.type)
            raise status_fault(error.status_code, said, quota_is_exhausted, error.response.headers) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise Fault(self._redacted(f"connection failed: {type(cause).__name__} {cause}")) from None
        except (httpx2.HTTPError, httpx2.StreamError, openai.APIError) as error:
            raise Fault(self._redacted(f"connection cut: {type(error).__name__} {error}")[:300]) from None
        except NotACompletion as error:
            raise Fault(self._redacted(f"unusable response: {error}")) from None

    def _redacted(self, text: str) -> str:
        return text.replace(self._api_key, "[API key]") if self._api_key else text
