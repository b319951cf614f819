"""What stage 1 makes of responses, environment variables and recipes, without a server."""

import json

import pytest
from pydantic import ValidationError

from twice_rec.errors import InputError
from twice_rec.rationales.answers import parse_annotation
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.completions import (
    NotACompletion,
    Request,
    join_chunks,
    read_completion,
    read_usage,
    server_words,
)
from twice_rec.rationales.connection import Secrets, address, filled, proxy_for
from twice_rec.rationales.recipe import ClientConfig, SamplingConfig

REQUEST = Request(b"", "0" * 64, prompt_chars=3000, max_tokens=600)
GOOD = {"rationale": "They liked the tea.", "verdict": "relevant", "evidence": [1], "confidence": 0.5}
ANSWER, DRAFT = json.dumps(GOOD), json.dumps({**GOOD, "rationale": "A draft."})


def response(content="hello", finish="stop", **more):
    return {"choices": [{"message": {"content": content}, "finish_reason": finish}], **more}


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 500, "completion_tokens": 60}, (500, 60)),
        ({"prompt_tokens": "500", "completion_tokens": 60.0}, (500, 60)),
        ({"input_tokens": 500, "output_tokens": 60}, (500, 60)),
        ({"prompt_tokens": 500, "completion_tokens": 60, "total_tokens": 900}, (500, 400)),  # thoughts in the total
        ({"prompt_tokens": 500, "total_tokens": 560}, (500, 60)),
        ({"prompt_tokens": 500}, (500, 2)),
        ({"prompt_tokens": "many", "completion_tokens": []}, (1000, 2)),
        ({"prompt_tokens": -5, "completion_tokens": True}, (1000, 2)),
        ({"prompt_tokens": 1e300, "completion_tokens": float("inf")}, (1000, 2)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (1000, 2)),
        ([500, 60], (1000, 2)),
        ("500", (1000, 2)),
        (None, (1000, 2)),
    ],
)
def test_usage_is_counted_or_estimated(usage, tokens):
    """Five characters are two tokens, 3,000 are 1,000."""
    assert read_usage(response(usage=usage)).estimated(REQUEST, 1 / 3) == tokens


@pytest.mark.parametrize(
    ("body", "text", "written"),
    [
        (None, "x" * 30, 10),
        (None, "x" * 30_000, 600),
        (response("", "length"), "", 600),
        (response(None), "", 0),
        ({"choices": [{"message": {"content": None, "reasoning_content": "x" * 30}}]}, "", 10),
        ({"choices": [{"message": {"content": "x" * 30}}, {"message": {"content": "x" * 30}}]}, "", 20),
        ({"choices": "none"}, "", 0),
        ([], "", 0),
    ],
)
def test_what_a_model_wrote_is_estimated_from_all_of_it(body, text, written):
    assert read_usage(body, text).estimated(REQUEST, 1 / 3) == (1000, written)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (response(), "hello"),
        ([response()], "hello"),
        (response([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]), "hello"),
        (response([{"type": "thinking", "thinking": "x"}, {"type": "output_text", "text": "hello"}]), "hello"),
        (response(["hel", "lo"]), "hello"),
        (response({"text": "hello"}), "hello"),
        (response(GOOD), ANSWER),
        (response("hello", error=None), "hello"),
        (response(""), ""),
    ],
)
def test_contents_of_all_forms(body, text):
    assert read_completion(body).text == text


@pytest.mark.parametrize(
    ("body", "words", "billed", "again"),
    [
        ({"error": {"message": "no credit", "code": 402}}, "no credit", False, True),
        ({"error": "no credit"}, "an error with status 200: no credit", True, True),
        ({"detail": [{"msg": "not allowed", "loc": ["body", "seed"]}]}, "not allowed seed", True, True),
        ({"message": "no credit"}, "no choice with a message in it: no credit", False, True),
        ({}, "no choice with a message in it", False, True),
        ({"error": {"code": "invalid_api_key", "message": "Incorrect key"}}, "Incorrect key", False, True),
        ({"choices": [], "usage": {"prompt_tokens": 5}}, "no choice", True, True),
        ({"choices": ["x"]}, "no choice with a message", True, True),
        ([1], "no choice", False, True),
        (response(None, "length"), "thought until max_tokens", True, False),
        (response("  ", "length"), "thought until max_tokens", True, False),
        ({"choices": [{"message": {"function_call": {"name": "search"}}}]}, "called a tool (search)", True, True),
        ({"choices": [{"message": {"reasoning": "Well ..."}}]}, "no content (Well ...)", True, True),
    ],
)
def test_what_is_no_completion_is_told(body, words, billed, again):
    with pytest.raises(NotACompletion) as caught:
        read_completion(body)
    assert words in str(caught.value)
    assert (caught.value.billed, caught.value.again) == (billed, again)


def test_a_stream_becomes_what_would_have_come_without():
    delta = lambda finish=None, **parts: {"choices": [{"index": 0, "delta": parts, "finish_reason": finish}]}
    usage = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    body = join_chunks([delta(content="hel"), {**delta(content=[{"text": "lo"}]), **usage}, delta("stop"), "odd"])
    assert read_completion(body).text == "hello"
    assert read_usage(body).estimated(REQUEST, 1) == (5, 2)
    cut = join_chunks([delta(content="hel"), usage])
    with pytest.raises(NotACompletion, match="the stream ended before"):
        read_completion(cut)
    assert read_usage(cut).estimated(REQUEST, 1) == (5, 2)
    with pytest.raises(NotACompletion, match="upstream died"):
        read_completion(join_chunks([delta(content="hel"), {"error": {"message": "upstream died"}}]))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"message": {"detail": [{"msg": "not permitted", "loc": ["body", "seed"]}]}}, "not permitted seed"),
        ("two\n lines", "two lines"),
        ([{"error": {"message": "listed"}}], "listed"),
        ({"code": 7}, '{"code": 7}'),
        ("x" * 1000, "x" * 297 + "..."),
    ],
)
def test_the_servers_words_are_one_line(said, words):
    assert server_words(said) == words


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{DRAFT}</think>{ANSWER}",
        f"<think>{DRAFT}</think>\n<think>{DRAFT}</think> {ANSWER}",
        f"<thinking>\n{'{' * 80}</thinking>{ANSWER}",
        f"[THINK]{DRAFT}[/THINK]{ANSWER}",
        f"{DRAFT} is too short.\n</think>\n{ANSWER}",
        f"Let me see: <think> {DRAFT} </think> {ANSWER}",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|channel|>final<|message|>{ANSWER}",
        f"plan </think> Sure:\n```json\n{ANSWER}\n```",
    ],
)
def test_drafts_in_thoughts_are_no_answers(text):
    assert parse_annotation(text, 1).rationale == "They liked the tea."


@pytest.mark.parametrize("text", [f"<think>{DRAFT}", f"Well. <think> {DRAFT} is", f"{DRAFT} no </think>"])
def test_thoughts_without_an_end_hold_no_answer(text):
    with pytest.raises(Exception, match="no complete JSON object"):
        parse_annotation(text, 1)


def test_tags_inside_of_an_answer_end_nothing():
    text = json.dumps({**GOOD, "rationale": "They </think> liked <think> the tea."})
    assert parse_annotation(text, 1).rationale == "They liked the tea."


# ---------------------------------------------------------------------------------------------------------------------
# Keys of requests


def body_of(**changes):
    request = Request.of([{"role": "user", "content": "q"}], SamplingConfig(model="m", **changes), {}, "s")
    return json.loads(request.body), request


def test_keys_have_other_names_or_none():
    names = {"max_completion_tokens": "max_tokens", "temperature": None, "stream_options": None}
    body, request = body_of(request_keys=names, structured_outputs=False, extra_body={"seed": 1})
    assert body == {"model": "m", "messages": [{"role": "user", "content": "q"}], "max_tokens": 600, "seed": 1}
    assert request.stream_options_key is None
    assert body_of()[1].stream_options_key == "stream_options"
    assert "response_format" not in body_of(request_keys={"response_format": None})[0]
    json_mode = {"response_format": {"type": "json_object"}}
    assert body_of(structured_outputs=False, extra_body=json_mode)[0]["response_format"] == {"type": "json_object"}


def test_the_most_that_a_request_can_write():
    assert body_of(extra_body={"n": 3, "max_tokens": 1000})[1].max_tokens == 3000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_keys": {"max_tokens": None}}, "request_keys holds max_tokens; it can rename temperature"),
        ({"request_keys": {"temperature": "model"}}, "the name model to a second key"),
        ({"request_keys": {"temperature": "response_format"}}, "the name response_format to a second key"),
        ({"request_keys": {"temperature": "t"}, "extra_body": {"t": 1}}, "the name t to a second key"),
        ({"request_keys": {"temperature": "t", "max_completion_tokens": "t"}}, "the name t to a second key"),
        ({"extra_body": {"response_format": {}}}, "extra_body may not hold"),
    ],
)
def test_names_that_cannot_be(changes, message):
    with pytest.raises(ValidationError, match=message):
        SamplingConfig(model="m", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "it needs http:// or https://"),
        ({"base_url": "http://h/v1 "}, "no blanks"),
        ({"base_url": "\u201chttp://h/v1\u201d"}, "no quotes"),
        ({"base_url": "http://h:80a/v1"}, "is no address"),
        ({"base_url": "http://h/v1/chat/completions"}, "ends in the path of a request"),
        ({"extra_headers": {"X Y": "1"}}, "a name that no header can have"),
        ({"extra_headers": {"X": "1\n2"}}, "the value of X holds a line break"),
    ],
)
def test_addresses_and_headers_that_cannot_be(changes, message):
    with pytest.raises(ValidationError, match=message):
        ClientConfig(**changes)


def test_harmless_keys_are_no_secrets():
    body = {"prompt_cache_key": "a", "user": "me", "stop": ["x"], "logit_bias": {"key": 1}, "max_tokens": 3}
    assert SamplingConfig(model="m", extra_body=body).extra_body == body
    headers = {"HTTP-Referer": "https://example.org", "X-Title": "x", "Authorization": "Bearer ${KEY}"}
    assert ClientConfig(extra_headers=headers).extra_headers == headers
    assert ClientConfig(base_url="https://h/v1?api-version=preview&key=${KEY}").base_url.startswith("https://h")


# ---------------------------------------------------------------------------------------------------------------------
# The environment


def test_names_are_filled_in_and_hidden(monkeypatch):
    monkeypatch.setenv("MY_KEY", "a secret/value")
    secrets = Secrets()
    url, query = address(ClientConfig(base_url="https://h/v1?a=1&a=2&key=${MY_KEY}"), secrets)
    assert (url, query) == ("https://h/v1", {"a": ["1", "2"], "key": "a secret/value"})
    for written in ("a secret/value", "a%20secret%2Fvalue", "a%20secret/value", "YSBzZWNyZXQvdmFsdWU="):
        assert secrets.hide(f"<{written}>") == "<[MY_KEY]>"
    with pytest.raises(InputError, match="extra_headers names the environment variable NO_SUCH, which is not set"):
        filled("${NO_SUCH}", "extra_headers", secrets)
    monkeypatch.setenv("MY_KEY", "planted\nkey")
    with pytest.raises(InputError, match="MY_KEY, named by base_url, holds a line break") as caught:
        filled("${MY_KEY}", "base_url", secrets)
    assert "planted" not in str(caught.value)


PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture
def environment(monkeypatch):
    def set_to(**variables):
        for name in PROXIES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "url", "shown"),
    [
        ({}, "http://h/v1", None),
        ({"HTTP_PROXY": "p:3128"}, "http://h/v1", "http://p:3128 HTTP_PROXY"),
        ({"http_proxy": "http://p:3128"}, "http://h/v1", "http://p:3128 http_proxy"),
        ({"HTTP_PROXY": "p:3128"}, "https://h/v1", None),
        ({"HTTPS_PROXY": "p:1", "ALL_PROXY": "socks5://p:2"}, "https://h/v1", "http://p:1 HTTPS_PROXY"),
        ({"ALL_PROXY": "u:pass-4711@p:2"}, "https://h/v1", "http://p:2 ALL_PROXY"),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "*"}, "https://h/v1", None),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "10.0.0.0/8, 192.168.1.7"}, "http://10.1.2.3:8000/v1", None),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "10.0.0.0/8, 192.168.1.7"}, "http://192.168.1.7/v1", None),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3/v1", "http://p:2 ALL_PROXY"),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "fe80::/10,[::1]"}, "http://[fe80::1]:80/v1", None),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "fe80::/10,[::1]"}, "http://[::1]:80/v1", None),
        ({"ALL_PROXY": "p:2", "NO_PROXY": ".example.com"}, "http://a.example.com/v1", None),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "example.com"}, "http://notexample.com/v1", "http://p:2 ALL_PROXY"),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "h:8000"}, "http://h:8000/v1", None),
        ({"ALL_PROXY": "p:2", "NO_PROXY": "h:8000"}, "http://h:9000/v1", "http://p:2 ALL_PROXY"),
        ({"ALL_PROXY": "socks5://p:2", "NO_PROXY": "h"}, "http://h/v1", None),
    ],
)
def test_the_proxy_of_an_address(environment, variables, url, shown):
    environment(**variables)
    found = proxy_for(url, Secrets())
    assert (found and f"{found.shown} {found.variable}") == shown


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("socks5://u:pass-4711@p:1080", "ALL_PROXY names a SOCKS proxy at p:1080, which needs the package socksio"),
        ("socks4://u:pass-4711@p:1080", "ALL_PROXY does not hold the address of a proxy: expected one of http://"),
        ("http://u:pass-4711@p:port", "ALL_PROXY does not hold the address of a proxy"),
        ("http://", "ALL_PROXY does not hold the address of a proxy"),
        ("p:1 pass-4711", "ALL_PROXY does not hold the address of a proxy"),
        ("[pass-4711", "ALL_PROXY does not hold the address of a proxy"),
    ],
)
def test_proxies_that_cannot_be_used_are_named(environment, monkeypatch, value, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    environment(ALL_PROXY=value)
    with pytest.raises(InputError, match=message) as caught:
        proxy_for("http://h/v1", Secrets())
    assert "put h into NO_PROXY" in str(caught.value)
    assert "pass-4711" not in str(caught.value)


def test_what_was_spent_outlives_the_process_and_counts_once_per_origin(tmp_path):
    with CompletionCache(tmp_path / "c.jsonl") as cache:
        cache.spend(10, 5, "a page")
        cache.spend(10, 5, "a page")
        cache.spend(1, 1, "no choice", origin="results-0001.jsonl k")
    with CompletionCache(tmp_path / "c.jsonl") as cache:
        cache.spend(1, 1, "no choice", origin="results-0001.jsonl k")
        assert (cache.prompt_tokens, cache.completion_tokens, cache.unusable, len(cache)) == (21, 11, 3, 0)
