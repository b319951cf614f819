"""Requests for completions, and the completions that servers send back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twice_rec.prompts import Message
from twice_rec.rationales.recipe import SamplingConfig

_MOST_TOKENS = 10**9  # of one response; what is above is no count
# Codes of error objects -> the HTTP status that goes with them.
_CODES = {"invalid_api_key": 401, "insufficient_quota": 402, "permission_denied": 403, "model_not_found": 404}
_SHOWN = 300  # characters of a server's words


@dataclass(eq=False)
class NotACompletion(Exception):
    """A response with status 200 holds no completion.

    Args:
        why: what is wrong with it, in the server's own words if it has some.
        code: HTTP status that an error object names or means.
        billed: it looks as if a model wrote something, or as if the server has decided.
        again: the same request may get another response.
    """

    why: str
    code: int | None = None
    billed: bool = False
    again: bool = True

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, slots=True)
class Request:
    """One request for a completion.

    Args:
        body: the JSON that is sent.
        key: SHA-256 of the body, by which the completion is found again.
        prompt_chars: length of all messages in characters.
        max_tokens: longest completion in tokens, of all choices together.
        stream_options_key: what the server calls `stream_options`; None if it does not know them.
    """

    body: bytes
    key: str
    prompt_chars: int
    max_tokens: int
    stream_options_key: str | None = "stream_options"

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
        body = {**config.under_their_names(body), **config.extra_body}
        written = json.dumps(body, separators=(",", ":")).encode()
        chars = sum(len(message["content"]) for message in messages)
        key, options = hashlib.sha256(written).hexdigest(), config.under_their_names({"stream_options": None})
        return cls(written, key, chars, config.most_tokens(), next(iter(options), None))


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote.

    Args:
        finish: why it ended, as the server says: `stop`, `length`, `content_filter`, ...
        refusal: the model's refusal; empty if it did not refuse.
        prompt_tokens, completion_tokens: as the server counted them; estimated from the lengths if it did not.
    """

    text: str
    finish: str
    refusal: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a response says that it cost: tokens, None if it does not say so in numbers.

    Args:
        chars: length of what the model wrote, to estimate from.
        is_cut: it was cut off at its longest.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    chars: int
    is_cut: bool

    def estimated(self, request: Request, tokens_per_char: float) -> tuple[int, int]:
        """Return tokens in and out; what the server does not say is estimated from the lengths."""
        prompt, written = self.prompt_tokens, self.completion_tokens
        if prompt is None:
            prompt = math.ceil(request.prompt_chars * tokens_per_char)
        if written is None:
            written = request.max_tokens if self.is_cut else math.ceil(self.chars * tokens_per_char)
            written = min(written, request.max_tokens)
        return prompt, written


def parsed(text: str) -> Any:
    """Return the JSON of a response; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_usage(body: Any, text: str = "") -> Usage:
    """Read what a response cost, whatever else is in it; `text` is the response if `body` is None."""
    body = _unlisted(body)
    usage, choices = _dict(body.get("usage")), _list(body.get("choices"))
    prompt, written, total = (
        next((count for name in names if (count := _count(usage.get(name)))), None)
        for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"), ("total_tokens",))
    )
    if prompt and total and total > prompt + (written or 0):
        written = total - prompt  # some servers count thoughts, which they bill, in the total alone
    chars = sum(_chars(_dict(choice).get("message")) for choice in choices) if body else len(text)
    if written is None and not chars and prompt:
        written = 0
    return Usage(prompt, written, chars, any(_dict(choice).get("finish_reason") == "length" for choice in choices))


def read_completion(body: Any, text: str = "") -> Completion:
    """Read a `chat.completion` object; of several choices the first counts. Tokens are left at 0.

    Args:
        body: the response, parsed; None if it is not JSON.
        text: the response as it came, for errors.

    Raises:
        NotACompletion: if there is no completion in it.
    """
    if body is None:
        raise NotACompletion(f"the body is not JSON: {_excerpt(text)}")
    body = _unlisted(body)
    choices = _list(body.get("choices"))
    choice = _dict(choices[0]) if choices else {}
    counted = any(map(_count, _dict(body.get("usage")).values()))
    billed = bool(choices) or counted
    for error in (choice.get("error"), body.get("error"), None if choices else body.get("detail")):
        if error:
            code = _dict(error).get("code")
            code = int(code) if str(code).isdigit() and 400 <= int(code) < 600 else _CODES.get(str(code))
            why = server_words(error) if code else f"an error with status 200: {server_words(error)}"
            raise NotACompletion(why, code, counted or not code)
    if "message" not in choice or not isinstance(choice["message"], dict):
        said = f": {server_words(body)}" if "message" in body else ""
        raise NotACompletion(f"no choice with a message in it{said or ': ' + _excerpt(json.dumps(body))}", None, billed)
    message = choice["message"]
    content, refusal = _content(message.get("content")), message.get("refusal")
    finish = choice.get("finish_reason")
    finish, refusal = (value if isinstance(value, str) else "" for value in (finish, refusal))
    if not content.strip() and not refusal and finish != "content_filter":
        _require_content(message, finish)
    return Completion(content, finish, refusal, 0, 0)


def _require_content(message: Mapping[str, Any], finish: str) -> None:
    """Raise NotACompletion if the model did something else than write, and that says what."""
    thoughts = _content(message.get("reasoning_content") or message.get("reasoning"))
    calls = _list(message.get("tool_calls")) or [message.get("function_call")]
    called = [_dict(_dict(call).get("function") or call).get("name") for call in calls if call]
    if called:
        why = f"the model called a tool ({', '.join(map(str, called))[:80]}) and wrote nothing"
        raise NotACompletion(f"{why}; take tools out of extra_body, or the tool parser out of the server", billed=True)
    if finish == "length":
        why = f"the model thought until max_tokens and wrote nothing ({_excerpt(thoughts) or 'no thoughts shown'})"
        raise NotACompletion(f"{why}; raise max_tokens, or lower the effort of reasoning", billed=True, again=False)
    if thoughts:
        why = f"the model wrote thoughts and no content ({_excerpt(thoughts)})"
        raise NotACompletion(f"{why}; finish_reason {finish or 'missing'}; turn the reasoning off", billed=True)


def join_chunks(chunks: Iterable[Any]) -> dict[str, Any]:
    """Put the chunks of a stream together, to what the server would have sent without streaming.

    A stream that was cut, or that holds something else, becomes an error in it, beside what had come.
    """
    content, refusal, thoughts, finish = [], [], [], None
    body: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    calls: list[Any] = []
    for chunk in map(_dict, chunks):
        if chunk.get("error"):
            body["error"] = chunk["error"]
        for name, value in _dict(chunk.get("usage")).items():  # some servers send it with every chunk
            usage[name] = max(_count(usage.get(name)) or 0, _count(value) or 0) or value
        for choice in map(_dict, _list(chunk.get("choices"))):
            if choice.get("index", 0) == 0:
                delta = _dict(choice.get("delta"))
                content.append(_content(delta.get("content")))
                refusal.append(_content(delta.get("refusal")))
                thoughts.append(_content(delta.get("reasoning_content") or delta.get("reasoning")))
                calls += _list(delta.get("tool_calls"))
                finish = choice.get("finish_reason") or finish
    message = {"content": "".join(content), "refusal": "".join(refusal), "reasoning_content": "".join(thoughts)}
    body["choices"] = [{"message": {**message, "tool_calls": calls[:1]}, "finish_reason": finish}]
    if not finish:
        body.setdefault("error", {"message": "the stream ended before the completion did"})
    return {**body, "usage": usage}


def server_words(value: Any) -> str:
    """Return what a server says in an error of whatever form, in one line."""
    if isinstance(value, list):
        return "; ".join(server_words(entry) for entry in value[:3])[:_SHOWN]
    if isinstance(value, dict):
        for name in ("message", "error", "detail", "msg", "reason"):
            if value.get(name):
                named = f" {value['loc'][-1]}" if name == "msg" and _list(value.get("loc")) else ""
                return (server_words(value[name]) + named)[:_SHOWN]
        return _excerpt(json.dumps(value), _SHOWN)
    return _excerpt(str(value), _SHOWN)


def _content(value: Any) -> str:
    """Return the text of a message's content: text, or a list of parts, of which thoughts are left out."""
    if isinstance(value, list):
        return "".join(map(_content, value))
    if isinstance(value, dict):
        if value.get("type") in ("thinking", "reasoning", "redacted_thinking"):
            return ""
        return value["text"] if isinstance(value.get("text"), str) else "" if "type" in value else json.dumps(value)
    return value if isinstance(value, str) else ""


def _unlisted(body: Any) -> dict[str, Any]:
    """Return the object of a response; some servers put it into a list."""
    return _dict(body[0]) if isinstance(body, list) and body else _dict(body)


def _chars(value: Any) -> int:
    if isinstance(value, (dict, list)):
        return sum(map(_chars, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _count(value: Any) -> int | None:
    """Return a positive number of tokens, which some servers write as text; None if it is none."""
    try:
        count = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(count) if not isinstance(value, bool) and 0 < count <= _MOST_TOKENS else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _excerpt(text: str, most: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
