"""A client for any OpenAI-compatible chat API that loses nothing, pays for nothing twice, and stops cleanly.

The `openai` package's own client does the HTTP. Its retries are off: what happens after a fault differs by fault, see
`faults`. A request that failed `max_attempts` times gets no completion; after `max_failures_in_a_row` of them without a
completion in between, the run stops. What every response with status 200 cost is counted before anything else is looked
at. Nothing that is stored, logged or raised contains the API key or another secret.
"""

from __future__ import annotations

import asyncio
import contextvars
import fnmatch
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit
from weakref import WeakValueDictionary

from twice_rec.masking import KNOWN
from twice_rec.rationales import completions, connection
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.completions import Completion, NotACompletion, Request, Usage, server_words
from twice_rec.rationales.faults import Fault, NoCompletion, Stopped, status_fault
from twice_rec.rationales.recipe import REQUEST_KEYS, ClientConfig

logger = logging.getLogger(__name__)

_USUAL_ADDRESS = "the address of an OpenAI-compatible API usually ends in /v1"
_NO_LIST = (403, 404, 405, 501)  # servers, and keys, that have no list of models say so by these
_LONGEST_WAIT = 3600  # seconds that a server may ask for; a run that is to wait longer stops instead
_MOST_BILLED = 2  # times that one request is paid for without a completion
_MOST_UNUSABLE = 10  # responses with status 200 and no completion in a row, after which the run stops


@dataclass(slots=True)
class _Response:
    """What has come for one attempt."""

    begun: bool = False  # with status 200, and what it cost is not counted yet
    chunks: list[Any] = field(default_factory=list)  # of a stream


_RESPONSE: contextvars.ContextVar[_Response | None] = contextvars.ContextVar("response", default=None)


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
        limited_by: the key by which there are fewer requests, for errors.

    Raises:
        InputError: if the config names an environment variable for the API key and it is not set.
    """

    def __init__(self, config: ClientConfig, cache: CompletionCache, limited_by: str = "max_rationales"):
        import openai

        self.secrets = KNOWN
        self._api_key = None if config.api_key_env is None else connection.read_api_key(config.api_key_env)
        if self._api_key:
            self.secrets.add(self._api_key, "API key")
        self.config = config
        self.cache = cache
        self._limited_by = limited_by
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
        self._unusable_in_a_row = self._estimated = 0
        url, query = connection.address(config, self.secrets)
        self._proxy = connection.proxy_for(url, self.secrets)
        filled = partial(connection.filled, key="extra_headers", secrets=self.secrets)
        self._openai = openai.AsyncOpenAI(  # reads certificates from the environment
            api_key=self._api_key or "none",
            base_url=url,
            default_query=query,
            default_headers={name: filled(value) for name, value in config.extra_headers.items()},
            max_retries=0,
            timeout=config.timeout_seconds,
            http_client=openai.DefaultAsyncHttpx2Client(
                transport=connection.open_transport(self._proxy, config.concurrency),
                event_hooks={"response": [self._on_response]},
            ),
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
            "unusable_responses": self.cache.unusable,
            "responses_estimated": self._estimated,
            "prompt_tokens": self.cache.prompt_tokens,
            "completion_tokens": self.cache.completion_tokens,
            "cost": round(self.cost, 4),
        }

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    async def preflight(self, model: str) -> None:
        """Check server, key and model, before the first request. It costs nothing.

        Raises:
            Stopped: if one of them is wrong; the message says which.
        """
        where, way_out = f"base_url {self.config.base_url}", "set preflight to false to ask it all the same"
        for attempt in range(1, self.config.max_attempts + 1):
            try:
                listed = await self._guarded(self._openai.get("/models", cast_to=str))
                names = _model_names(json.loads(listed))
                break
            except (ValueError, TypeError, LookupError, AttributeError):
                found = repr(self.secrets.hide(" ".join(listed.split()))[:80])
                raise Stopped(f"{where}: {found} is not a list of models; {_USUAL_ADDRESS}, or {way_out}") from None
            except Fault as fault:
                if fault.status in _NO_LIST:
                    logger.warning("%s has no list of models to check (%s)", where, fault.message)
                    return
                if fault.again and attempt < self.config.max_attempts and fault.status:
                    await asyncio.sleep(self._wait(fault, attempt))
                    continue
                raise Stopped(f"{where}: {fault.message}; {self._remedy(fault)}") from None
        if not _is_served(model, names):
            known = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
            raise Stopped(
                f"model {model!r} is not served at {self.config.base_url}; it has {known or 'no models'}; correct "
                f"model, or {way_out}"
            )

    def _remedy(self, fault: Fault) -> str:
        if fault.status == 401:
            return f"check the environment variable {self.config.api_key_env}"
        if fault.stops or fault.status:
            return f"correct base_url ({_USUAL_ADDRESS}), or set preflight to false"
        return "is the server running, and is this its address?"

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
        attempt = billed = 0
        while True:
            answered_before = self.answered
            try:
                completion = await self._attempt(request)
            except Fault as fault:
                self.faults[fault.message.partition(":")[0]] += 1
                logger.debug("attempt %d: %s", attempt + 1, fault.message)
                self._stop_if_hopeless(fault)
                # Under a shared rate limit, a request may be turned away while others get through.
                attempt += not (fault.status == 429 and self.answered > answered_before)
                billed += fault.billed
                if not fault.again or attempt >= self.config.max_attempts or billed >= _MOST_BILLED:
                    raise self._given_up(fault, attempt) from None
                await asyncio.sleep(self._wait(fault, attempt))
            else:
                self.cache.put(request.key, completion)
                self.answered += 1
                self.failures_in_a_row = self._unusable_in_a_row = 0
                return completion

    def _stop_if_hopeless(self, fault: Fault) -> None:
        """Raise Stopped if every other request would fail in the same way."""
        if fault.stops:
            raise self.stop(f"{self.config.base_url}: {fault.message}") from None
        refused = [name for name in (*REQUEST_KEYS, "json_schema") if name in fault.message]
        if fault.refuses and not self.answered and not len(self.cache) and refused:
            raise self.stop(
                f"{self.config.base_url}: {fault.message}; rename or leave out the key by request_keys, such as "
                "{max_completion_tokens: max_tokens, temperature: null}, or set structured_outputs to false"
            ) from None
        self._unusable_in_a_row += fault.unusable
        if self._unusable_in_a_row >= _MOST_UNUSABLE:
            many = f"{self._unusable_in_a_row} responses in a row held no completion"
            raise self.stop(f"{self.config.base_url}: {many}; the last: {fault.message}") from None

    def _given_up(self, fault: Fault, attempt: int) -> Exception:
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= self.config.max_failures_in_a_row:
            return self.stop(f"{self.failures_in_a_row} requests in a row got no completion; the last: {fault.message}")
        return NoCompletion(fault.message + (f", {attempt} times" if attempt > 1 else ""), fault.refuses)

    def stop(self, reason: str) -> Stopped:
        """Let no further request out, and return the error that says why."""
        stored = f"{len(self.cache):,} completions are stored in {self.cache.path}"
        self.stopped = self.stopped or Stopped(f"{reason}. {stored}; the same command goes on from there")
        return self.stopped

    def _wait(self, fault: Fault, attempt: int) -> float:
        """Return the seconds before the next attempt: they double, are jittered, and are what the server asks for."""
        doubled = self.config.backoff_seconds * 2.0 ** min(max(attempt, 1) - 1, 30)
        jittered = min(doubled, self.config.backoff_max_seconds) * self._random.uniform(0.5, 1.0)
        if fault.wait is None:
            return jittered
        if fault.wait > _LONGEST_WAIT:
            raise self.stop(f"the server asks to wait {fault.wait:,.0f} seconds: {fault.message}")
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
        used, response = float(expected), _Response()
        _RESPONSE.set(response)
        self.sent += 1
        try:
            body, text = await self._guarded(self._send(request, response))
            response.begun = False
            completion = self._read(request, body, text)
            used = completion.prompt_tokens + completion.completion_tokens
            return completion
        except Fault as fault:
            if response.begun:  # cut on the way: how much is billed, only the server knows
                self._spend(request, Usage(None, None, 0, is_cut=True), fault)
            raise
        finally:
            self._reserved -= worst
            self._tokens.give_back(expected - used)

    def _reserve(self, request: Request) -> float:
        """Set the most that a request can cost aside, and return it; stop the run if the budget does not allow it."""
        worst = self.config.cost(request.prompt_chars * self._tokens_per_char, request.max_tokens)
        limit = self.config.max_cost
        if limit is not None and self.cost + self._reserved + worst > limit:
            raise self.stop(
                f"the budget is used up: {self.cost:.4f} of max_cost {limit:g} spent, and {self._reserved + worst:.4f} "
                "more could be needed for the requests at hand, which are estimated by their lengths (no more than "
                f"they can exceed it); raise max_cost, or lower {self._limited_by}"
            )
        self._reserved += worst
        return worst

    def _read(self, request: Request, body: Any, text: str) -> Completion:
        """Count what a response cost, and then read it."""
        usage = completions.read_usage(body, text)
        try:
            completion = completions.read_completion(body, text)
        except NotACompletion as error:
            words = self.secrets.hide(str(error))
            fault = Fault(f"unusable response: {words}", again=error.again, unusable=True)
            if error.code is not None:
                fault = status_fault(error.code, words, False, {})
                fault.message = f"status 200 with an error {fault.message.removeprefix('HTTP ')}"
            fault.billed = error.billed
            self._spend(request, usage, fault)
            raise fault from None
        prompt, written = self._tokens_of(request, usage)
        texts = (completion.text, completion.finish, completion.refusal)
        return Completion(*map(self.secrets.hide, texts), prompt, written)

    def _spend(self, request: Request, usage: Usage, fault: Fault) -> None:
        self.cache.spend(*self._tokens_of(request, usage), fault.message)

    def _tokens_of(self, request: Request, usage: Usage) -> tuple[int, int]:
        """Return tokens in and out of a response; if the server sent none, they are estimated, which is said once."""
        if usage.prompt_tokens is None or usage.completion_tokens is None:
            if not self._estimated:
                logger.warning(
                    "the server does not say in numbers how many tokens a response used (usage); tokens and cost are "
                    "estimated from the lengths"
                )
            self._estimated += 1
        if usage.prompt_tokens is not None:
            self._chars_seen += request.prompt_chars
            self._tokens_seen += usage.prompt_tokens
            self._tokens_per_char = self._tokens_seen / max(self._chars_seen, 1)
        return usage.estimated(request, self._tokens_per_char)

    async def _send(self, request: Request, response: _Response) -> tuple[Any, str]:
        """Return the body of the response, parsed (None if it is not JSON), and as it came."""
        import openai

        # Not `chat.completions.create`: it walks through the type declarations of every message, which costs a
        # quarter of the rate (benchmarks/rationale_client.py).
        post = partial(self._openai.post, "/chat/completions")
        if not self.config.stream:
            text = await post(content=request.body, cast_to=str)
            return completions.parsed(text), text
        body = json.loads(request.body)
        stream_options = request.stream_options_key
        body = {**body, "stream": True, **({stream_options: {"include_usage": True}} if stream_options else {})}
        stream_cls = openai.AsyncStream[object]
        stream = await post(content=json.dumps(body).encode(), cast_to=object, stream=True, stream_cls=stream_cls)
        async with stream:
            async for chunk in stream:
                response.chunks.append(chunk)
        return completions.join_chunks(response.chunks), ""

    async def _on_response(self, response: Any) -> None:
        """Note that a response with status 200 begins; refuse a redirect that would lose the request or the key."""
        under_way = _RESPONSE.get()
        if under_way is not None and response.is_success:
            under_way.begun = True
        if not response.has_redirect_location:
            return
        here = urlsplit(str(response.url))
        there = urlsplit(urljoin(str(response.url), response.headers["location"]))
        same = (here.scheme, here.hostname, here.port) == (there.scheme, there.hostname, there.port)
        if not same or (response.request.method != "GET" and response.status_code not in (307, 308)):
            host = f"{there.hostname}:{there.port}" if there.port else there.hostname
            to = self.secrets.hide(f"{there.scheme}://{host}{there.path}")
            says = f"HTTP {response.status_code}: the server redirects to {to}"
            raise Fault(f"{says}; if you trust it, set base_url to the part of that before /chat/completions", True)

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
            said = self.secrets.hide(server_words(error.body or error.response.text or "no words"))
            quota_is_exhausted = "insufficient_quota" in (error.code, error.type)
            raise status_fault(error.status_code, said, quota_is_exhausted, error.response.headers) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, Fault):
                raise cause from None
            through = f" through the proxy {self._proxy.shown} of {self._proxy.variable}" if self._proxy else ""
            said = " ".join(f"{type(cause).__name__} {cause}".split())[:300]
            raise Fault(self.secrets.hide(f"connection failed{through}: {said}")) from None
        except openai.APIError as error:  # an error in the middle of a stream
            response = _RESPONSE.get()
            if response is None or not response.begun:
                raise Fault(self.secrets.hide(f"connection cut: {server_words(str(error))}")) from None
            said = {"message": error.message, "code": error.code, "error": error.body}
            return completions.join_chunks([*response.chunks, {"error": said}]), ""
        except ValueError as error:  # a chunk of a stream
            said = self.secrets.hide(f"unusable response: a chunk is not JSON: {error}")[:300]
            raise Fault(said, unusable=True, billed=True) from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise Fault(self.secrets.hide(f"connection cut: {type(error).__name__} {error}")[:300]) from None


def _model_names(listed: Any) -> list[str]:
    """Return the names in a list of models, in any of the forms that servers give it."""
    entries = listed if isinstance(listed, list) else listed["data"] if "data" in listed else listed["models"]
    return [str(entry if isinstance(entry, str) else entry.get("id") or entry["name"]) for entry in entries]


def _is_served(model: str, names: Iterable[str]) -> bool:
    """Return whether a model is in a list: by its name, with or without prefix and tag, or by a wildcard."""
    bare = lambda name: name.removeprefix("models/").removesuffix(":latest")
    return any(bare(name) == bare(model) or ("*" in name and fnmatch.fnmatchcase(model, name)) for name in names)
