"""What chat APIs of other kinds answer, well-formed or not: a mood makes the response of a request."""

import json
import random

MODELS = {"object": "list", "data": [{"id": "annotator"}]}
LISTS = {
    "no list": (404, {"error": {"message": "Not Found"}}),
    "list not allowed": (405, {"detail": "Method Not Allowed"}),
    "list forbidden": (403, {"error": {"message": "Missing scopes: api.model.read"}}),
    "prefix": (200, {"object": "list", "data": [{"id": "models/annotator"}]}),
    "tag": (200, {"object": "list", "data": [{"id": "annotator:latest"}]}),
    "wildcard": (200, {"object": "list", "data": [{"id": "anno*"}]}),
    "bare list": (200, [{"id": "annotator"}]),
    "list of names": (200, {"models": [{"name": "annotator"}]}),
    "other names": (200, {"object": "list", "data": [{"id": "deployment-7"}]}),
}
USAGE = {"prompt_tokens": 400, "completion_tokens": 100, "total_tokens": 500}


def answer(mood, head, asked, good, key):
    """The status, body and headers of the response; None for a usual one."""
    text = good(asked, random.Random(1))
    draft = json.dumps({**json.loads(text), "rationale": "only a draft", "confidence": 0.0}) if "{" in text else ""
    tool = {"id": "t", "type": "function", "function": {"name": "search_web", "arguments": "{}"}}
    thoughts = {"content": None, "reasoning_content": "still thinking about the teas"}
    at_home = head.startswith("POST /v1/chat/completions")
    responses = {
        "parts": message([{"type": "thinking", "thinking": [{"type": "text", "text": draft}]}, part(text)]),
        "think": message(f"<think>First: {draft}. Better be {{strict}}.</think>\n\n{text}"),
        "think opened by the template": message(f"First: {draft}. Better be strict.\n</think>\n{text}"),
        "fence": message(f"```json\n{text}\n```"),
        "listed": [message(text)],
        "thoughts": message(**thoughts),
        "thoughts cut off": message(**thoughts, finish="length"),
        "tool": message(None, finish="tool_calls", tool_calls=[tool]),
        "error object": {"id": "g", "error": {"message": f"the upstream of {key} is confused"}, "usage": USAGE},
        "error text": {"error": "the upstream is confused"},
        "error in a choice": {"choices": [{"error": {"message": "the upstream is confused"}, "message": None}]},
        "error 402": {"error": {"message": "out of credit for this key", "code": 402}},
        "error code": {"error": {"message": "no such key", "code": "invalid_api_key"}},
        "paid for nothing": {"id": "x", "choices": [], "usage": USAGE},
        "no usage": message(text, usage=None),
        "usage as text": message(text, usage={"prompt_tokens": "400", "completion_tokens": "100"}),
        "usage of another kind": message(text, usage={"prompt_tokens": "many", "completion_tokens": [1]}),
        "prose": message("The shopper likes tea, so honey follows."),
        "page": b"<html>Please log in to the hotel's network</html>",
    }
    if mood in responses:
        return 200, responses[mood]
    if mood == "some" and random.Random(json.dumps(asked["messages"])).random() < 1 / 3:
        return 200, responses["paid for nothing"]
    unknown = [name for name in ("temperature", "max_completion_tokens", "response_format") if name in asked]
    if mood == "few keys" and unknown:
        loc = [{"type": "extra_forbidden", "loc": ["body", unknown[0]], "msg": "Extra inputs are not permitted"}]
        return 422, {"object": "error", "message": {"detail": loc}}
    if mood == "moved" and at_home and "moved=1" not in head:
        return 307, {}, "Location: /v1/chat/completions?moved=1\r\n"
    if mood == "long wait":
        return 429, {"error": {"message": "come back later"}}, "Retry-After: 99999999\r\n"
    if mood == "moved away":
        return 308, {}, "Location: http://other.example/v1/chat/completions?api-key=never-shown-at-all\r\n"
    return None


def part(text):
    return {"type": "text", "text": text}


def message(content=None, finish="stop", usage=USAGE, **more):
    """A `chat.completion` with this message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 1, "choices": [choice], "usage": usage}
