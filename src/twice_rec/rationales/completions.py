"""Requests for completions, and the completions that servers send back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twice_rec.prompts import Message
from twice_rec.rationales.recipe import SamplingConfig


class NotACompletion(Exception):
    """A response with status 200 holds no completion; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request for a completion.

    Args:
        body: the JSON that is sent.
        key: SHA-256 of the body, by which the completion is found again.
        prompt_chars: length of all messages in characters.
        max_tokens: longest completion in tokens.
    """

    body: bytes
    key: str
    prompt_chars: int
    max_tokens: int

    @classmethod
    def of(
        cls, messages: Sequence[Message], config: SamplingConfig, schema: Mapping[str, Any], schema_name: str
    ) -> Request:
        """Make the request for these messages; `schema` is left out if structured outputs are off.

        The bytes decide the key, and users have paid for completions under these keys: change nothing here.
        """
        body: dict[str, Any] = {
            "model": config.model,
            "messages": messages,
            "temperature": config.temperature,
            "max_completion_tokens": config.max_tokens,
        }
        if config.structured_outputs:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": schema_name, "strict": True, "schema": schema},
            }
        written = json.dumps({**body, **config.extra_body}, separators=(",", ":")).encode()
        chars = sum(len(message["content"]) for message in messages)
        return cls(written, hashlib.sha256(written).hexdigest(), chars, config.max_tokens)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote.

    Args:
        finish: why it ended, as the server says: `stop`, `length`, `content_filter`, ...
        refusal: the model's refusal; empty if it did not refuse.
        prompt_tokens, completion_tokens: as the server counted them; 0 if it did not.
    """

    text: str
    finish: str
    refusal: str
    prompt_tokens: int
    completion_tokens: int


def read_completion(text: str) -> Completion:
    """Read a `chat.completion` object; of several choices the first counts.

    Raises:
        NotACompletion: if the text is something else.
    """
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message = choice["message"]
        parts = (message.get("content") or "", choice.get("finish_reason") or "", message.get("refusal") or "")
        return _completion(*parts, body.get("usage") or {})
    except json.JSONDecodeError:
        raise NotACompletion("the body is not JSON") from None
    except (LookupError, TypeError, ValueError, AttributeError):
        raise NotACompletion("no choice with a message in it") from None


def join_chunks(chunks: Iterable[Any]) -> Completion:
    """Put the chunks of a stream together.

    Raises:
        NotACompletion: if a chunk is something else, or if there is no finish reason: then the stream was cut.
    """
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
        completion = _completion("".join(content), finish, "".join(refusal), usage)
    except (TypeError, ValueError, AttributeError):
        raise NotACompletion("a chunk of the stream is not one of a completion") from None
    if not finish:
        raise NotACompletion("the stream ended before the completion did")
    return completion


def _completion(text: Any, finish: Any, refusal: Any, usage: Mapping[str, Any]) -> Completion:
    if not all(isinstance(part, str) for part in (text, finish, refusal)):
        raise NotACompletion("content, refusal and finish_reason must be text")
    tokens = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    return Completion(text, finish, refusal, *tokens)
