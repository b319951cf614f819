"""Stage 1 against chat APIs of other kinds: each works, or ends in one line, and nothing is paid for three times."""

import json
import random
from collections import Counter

import pytest

from servers import moods
from servers.fault_server import good
from servers.processes import free_port

pytestmark = pytest.mark.server

FEW = ("--max_rationales", "12", "--concurrency", "1", "--backoff_seconds", "0.01", "--max_attempts", "4")
FEW = (*FEW, "--min_words", "5", "--max_words", "100", "--max_similarity", "null")
PRICES = ("--price_per_million_input", "1000", "--price_per_million_output", "1000")  # a response costs 0.5


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def errors_of(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]


def written_in(run):
    """All that a run wrote, as text."""
    return "".join(path.read_bytes().decode(errors="replace") for path in run.files())


def finished_rows(run):
    return [row for name in ("accepted", "rejected") for row in rows(run.path / "rationales" / f"{name}.jsonl")]


WORK = ["parts", "think", "think opened by the template", "fence", "listed", "moved", "no usage", "usage as text"]


@pytest.mark.parametrize("mood", [*WORK, "usage of another kind", *sorted(moods.LISTS.keys() - {"other names"})])
def test_what_works(new_run, fault_server, mood):
    run = new_run(fault_server(mood=mood).url, *FEW)
    assert run.stage() == 0
    found = finished_rows(run)
    assert len(found) == 12
    assert all(row.get("text") for row in found)
    assert "only a draft" not in json.dumps(found)
    assert run.stored() == 12
    figures = json.loads((run.path / "rationales" / "manifest.json").read_text())["figures"]
    if mood == "usage as text":
        assert (figures["prompt_tokens"], figures["completion_tokens"]) == (12 * 400, 12 * 100)
    assert (figures["responses_estimated"] == 12) == (mood in ("no usage", "usage of another kind"))


@pytest.mark.parametrize(
    ("mood", "status", "words"),
    [
        ("thoughts", 2, "thoughts and no content (still thinking about the teas)"),
        ("thoughts cut off", 2, "still thinking about the teas); raise max_tokens"),
        ("tool", 2, "called a tool (search_web)"),
        ("error object", 2, "is confused"),
        ("error text", 2, "the upstream is confused"),
        ("error in a choice", 2, "the upstream is confused"),
        ("error 402", 2, "out of credit for this key (the account has no credit left)"),
        ("paid for nothing", 2, "no choice with a message in it"),
        ("page", 2, "Please log in to the hotel's network"),
        ("few keys", 2, "Extra inputs are not permitted temperature; rename or leave out the key by request_keys"),
        ("long wait", 2, "the server asks to wait 99,999,999 seconds: "),
        ("error code", 2, "no such key"),
        ("moved away", 2, "redirects to http://other.example/v1/chat/completions; if you trust it, set base_url"),
    ],
)
def test_what_does_not_work_is_said_in_the_servers_words(new_run, fault_server, capfd, mood, status, words):
    server = fault_server(mood=mood)
    run = new_run(server.url, *FEW)
    assert run.stage() == status
    (error,) = errors_of(capfd)
    assert words in error
    assert "never-shown-at-all" not in error
    assert 1 <= len(server.answered()) <= 10
    assert mood == "page" or max(Counter(server.answered()).values()) <= 2
    assert not (run.path / "rationales" / "rejected.jsonl").exists()


def test_models_that_never_answer_as_asked_stop_the_run(new_run, fault_server, capfd):
    server = fault_server(mood="prose")
    run = new_run(server.url, *FEW, "--max_failures_in_a_row", "3", "--max_reasks", "1")
    assert run.stage() == 2
    (error,) = errors_of(capfd)
    assert "3 rows in a row got no answer that can be used; the last: malformed answer: there is no complete" in error
    assert len(server.answered()) == 6


def test_keys_can_be_renamed_and_left_out(new_run, fault_server):
    server = fault_server(mood="few keys")
    names = "{max_completion_tokens: max_tokens, temperature: null, response_format: null}"
    run = new_run(server.url, *FEW, "--request_keys", names)
    assert run.stage() == 0
    assert len(finished_rows(run)) == 12


def test_the_list_of_models_need_not_be_believed(new_run, fault_server, capfd):
    run = new_run(fault_server(mood="other names").url, *FEW)
    assert run.stage() == 2
    (error,) = errors_of(capfd)
    assert "it has deployment-7; correct model, or set preflight to false" in error
    assert run.stage("--preflight", "false") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Failed is not rejected


@pytest.mark.parametrize("stream", ["false", "true"])
def test_rows_without_an_answer_stay_open_until_they_have_one(new_run, fault_server, capfd, stream):
    server = fault_server(mood="some")
    run = new_run(server.url, *FEW, "--stream", stream)
    assert run.stage() == 1
    (error,) = errors_of(capfd)
    stored = run.stored()
    assert 0 < stored < 12
    assert f"{12 - stored} of 12 rows have no usable answer of the API" in error
    assert "the same command asks for them again" in error
    assert not (run.path / "rationales" / "manifest.json").exists()
    healthy = new_run(fault_server().url, *FEW, name="healthy")
    run.url = healthy.url
    assert run.stage() == 0
    assert len(finished_rows(run)) == 12
    assert "no answer" not in json.dumps(finished_rows(run))
    assert run.stored() - stored == 12 - stored


def test_rows_that_never_get_one_can_be_given_up(new_run, fault_server):
    run = new_run(fault_server(mood="some").url, *FEW, "--max_unanswered", "11")
    assert run.stage() == 0
    without = [row for row in finished_rows(run) if row.get("reason", "").startswith("no answer: ")]
    assert len(without) == 12 - run.stored() > 0


# ---------------------------------------------------------------------------------------------------------------------
# The budget


@pytest.mark.parametrize("mood", ["paid for nothing", "error object", "tool", "thoughts"])
def test_every_response_with_status_200_counts(new_run, fault_server, capfd, mood):
    server = fault_server(mood=mood)
    run = new_run(server.url, *FEW, *PRICES, "--max_tokens", "100", "--max_cost", "12")
    assert run.stage() == 2
    while "the budget is used up" not in errors_of(capfd)[0]:
        assert run.stage() == 2  # what an earlier run spent counts as well
    spent = rows(run.path / "answers" / "rationales.unusable.jsonl")
    assert len(spent) == len(server.answered())
    assert 9 < sum(row["prompt_tokens"] + row["completion_tokens"] for row in spent) / 1000 <= 12


def test_a_body_that_is_cut_counts_by_an_estimate(new_run, fault_server, capfd):
    run = new_run(fault_server(mood="page").url, *FEW, *PRICES, "--max_cost", "10000")
    assert run.stage() == 2
    assert "the server does not say in numbers how many tokens" in capfd.readouterr().err
    spent = rows(run.path / "answers" / "rationales.unusable.jsonl")
    assert len(spent) == 10
    assert min(row["prompt_tokens"] for row in spent) > 100


# ---------------------------------------------------------------------------------------------------------------------
# Secrets

SECRETS = {
    "TWICE_HEADER": "planted-in-a-header-81",
    "TWICE_QUERY": "planted-in-a-query-82",
    "HTTP_PROXY_PASSWORD": "planted-in-a-proxy-83",
}


@pytest.mark.parametrize("mood", ["error object", "fence", "few keys"])
def test_secrets_appear_nowhere(new_run, fault_server, api_key, monkeypatch, capfd, mood):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    server = fault_server(mood=mood, key=api_key, transport=0.3)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{SECRETS['HTTP_PROXY_PASSWORD']}@127.0.0.1:{server.port}")
    monkeypatch.setenv("NO_PROXY", "")
    run = new_run("http://api.example/v1?api-key=${TWICE_QUERY}&api-version=1", *FEW)
    assert run.stage("--extra_headers", "{X-Api-Key: '${TWICE_HEADER}'}") == (0 if mood == "fence" else 2)
    everything = "".join(capfd.readouterr()) + written_in(run)
    assert "api.example" in everything
    for secret in (api_key, *SECRETS.values()):
        assert secret not in everything


@pytest.mark.parametrize(
    "words",
    [
        ("--base_url", "http://user:planted-secret-4711@127.0.0.1:9/v1"),
        ("--base_url", "http://planted-secret-4711@127.0.0.1:9/v1"),
        ("--base_url", "http://127.0.0.1:9/v1?api-key=planted-secret-4711"),
        ("--base_url", "http://127.0.0.1:9/v1?key=planted-secret-4711&alt=json"),
        ("--base_url", "planted-secret-4711"),
        ("--extra_headers", "{Authorization: Bearer planted-secret-4711}"),
        ("--extra_headers", "{api-key: planted-secret-4711}"),
        ("--extra_headers", "{Ocp-Apim-Subscription-Key: planted-secret-4711}"),
        ("--extra_headers", "api-key:", "planted-secret-4711"),
        ("--extra_body", "{api_key: planted-secret-4711}"),
        ("--extra_body", "{nested: {list: [{token: planted-secret-4711}]}}"),
        ("--extra_body", "{user: sk-planted-secret-4711}"),
        ("--extra_body", "planted-secret-4711"),
        ("--api_key_env", "planted-secret-4711"),
        ("--api_key_env", "sk_planted_secret_4711"),
        ("--api_key", "planted-secret-4711"),
    ],
)
def test_secrets_in_a_recipe_are_refused_and_not_repeated(new_run, capfd, words):
    run = new_run("http://127.0.0.1:9/v1", *FEW)
    assert run.stage(*words) == 2
    everything = "".join(capfd.readouterr()) + written_in(run)
    assert words[0].removeprefix("--") in everything
    assert "planted" not in everything
    assert not (run.path / "rationales").exists()


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("{key}\n", "holds a line break"),
        ("{key}\r\nX-Other: 1", "holds a line break"),
        ('"{key}"', "holds quotation marks"),
        ("'{key}", "holds quotation marks"),
        ("\u201c{key}\u201d", "holds quotation marks"),
        ("\u201e{key}\u201c", "holds quotation marks"),
        (" {key}", "holds a blank"),
        ("{key}\u00a0", "holds a blank"),
        ("\u200b{key}", "holds a blank"),
        ("{key} {key}", "holds a blank"),
        ("Bearer {key}", "begins with Bearer"),
        ("Authorization: Bearer {key}", "begins with Bearer"),
        ("\u043a\u043b\u044e\u0447{key}", "holds characters that are no latin letters"),
        ("{key}\x07", "holds characters that are no latin letters"),
        ("OPENAI_API_KEY={key}", "holds a name and ="),
        ("", "is empty"),
        ("  \t", "is empty"),
    ],
)
def test_keys_as_people_paste_them(new_run, fault_server, api_key, monkeypatch, capfd, value, fault):
    monkeypatch.setenv("TWICE_TEST_KEY", value.format(key=api_key))
    server = fault_server()
    run = new_run(server.url, *FEW)
    assert run.stage() == 2
    said = capfd.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"the environment variable TWICE_TEST_KEY {fault}" in error
    everything = said + written_in(run)
    assert api_key not in everything
    assert "Traceback" not in everything
    assert server.answered() == []


def test_a_dead_proxy_is_named_without_its_password(new_run, monkeypatch, capfd):
    port = free_port()
    monkeypatch.setenv("ALL_PROXY", f"user:planted-in-a-proxy-83@127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    run = new_run("http://api.example/v1", *FEW)
    assert run.stage() == 2
    (error,) = errors_of(capfd)
    assert f"connection failed through the proxy http://127.0.0.1:{port} of ALL_PROXY" in error
    assert "planted" not in error + written_in(run)


# ---------------------------------------------------------------------------------------------------------------------
# Result files that were paid for


def result(row, status=200, body=None):
    body = moods.message(good(row["body"], random.Random(1))) if body is None else body
    return {"id": "b", "custom_id": row["custom_id"], "response": {"status_code": status, "body": body}, "error": None}


def written(lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


DAMAGES = {  # name -> (what becomes of the good result lines, lines lost, what is said)
    "blank": (lambda lines: b"\n" + written(lines).replace(b"\n", b"\n \n"), 0, ""),
    "bom": (lambda lines: b"\xef\xbb\xbf" + written(lines), 0, ""),
    "crlf": (lambda lines: written(lines).replace(b"\n", b"\r\n"), 0, ""),
    "utf-16": (lambda lines: written(lines).decode().encode("utf-16"), 0, ""),
    "one list": (lambda lines: json.dumps(lines).encode(), 0, ""),
    "text body": (lambda lines: written([{**lines[0], "response": text_body(500)}, *lines[1:]]), 1, "HTTP 500: Oops"),
    "list body": (lambda lines: written([{**lines[0], "response": text_body(400, [1])}, *lines[1:]]), 1, "HTTP 400"),
    "text of json": (lambda lines: written([as_text(line) for line in lines]), 0, ""),
    "text for 200": (
        lambda lines: written([{**lines[0], "response": text_body(200)}, *lines[1:]]),
        1,
        "not JSON: Oops",
    ),
    "null response": (
        lambda lines: written([{**lines[0], "response": None, "error": {"message": "expired"}}, *lines[1:]]),
        1,
        "batch: expired",
    ),
    "null body": (lambda lines: written([{**lines[0], "response": text_body(200, None)}, *lines[1:]]), 1, "unusable"),
    "cut": (lambda lines: written(lines)[:-40], 1, "1 lines that are not whole JSON"),
    "cut in a letter": (lambda lines: written(lines)[:-40] + b"\xc3", 1, "1 lines that are not whole JSON"),
    "foreign": (lambda lines: written([*lines[1:], {**lines[0], "custom_id": "row-1"}]), 1, "in no request file"),
    "no id": (lambda lines: written([*lines[1:], {"response": {}}]), 1, "1 lines without a custom_id"),
    "numbers": (lambda lines: b"17\nnull\n" + written(lines), 0, "lines "),
}


def text_body(status, body="Oops"):
    return {"status_code": status, "body": body}


def as_text(line):
    return {**line, "response": {"status_code": "200", "body": json.dumps(line["response"]["body"])}}


@pytest.mark.parametrize("damage", DAMAGES)
def test_result_files_are_read_as_far_as_they_are_whole(new_run, capfd, damage):
    change, lost, said = DAMAGES[damage]
    run = new_run("http://127.0.0.1:9/v1", *FEW, "--annotator", "batch")
    assert run.stage() == 2
    folder = run.path / "answers" / "batch"
    asked = rows(folder / "requests-0001.jsonl")
    (folder / "results-0001.jsonl").write_bytes(change([result(row) for row in asked]))
    capfd.readouterr()
    status = run.stage()
    told = capfd.readouterr().err
    assert said in told
    assert "delete" not in told
    assert "Traceback" not in told
    assert run.stored() == 12 - lost
    if damage == "list body":  # the server refuses this request for good
        assert status == 0
        return
    assert status == (2 if lost else 0)
    if lost:
        assert [row["custom_id"] for row in rows(folder / "requests-0002.jsonl")] == [
            row["custom_id"] for row in asked if row["custom_id"] in (asked[0]["custom_id"], asked[-1]["custom_id"])
        ][: 1 if "cut" not in damage else None][-1:]
        (folder / "results-0001.jsonl").write_bytes(written([result(row) for row in asked]))  # the whole file came
        assert run.stage() == 0
    assert len(finished_rows(run)) == 12


@pytest.mark.parametrize("content", [b"", b"\n \n", b"<html>not yours</html>", b"{"])
def test_result_files_with_nothing_in_them_still_wait(new_run, capfd, content):
    run = new_run("http://127.0.0.1:9/v1", *FEW, "--annotator", "batch")
    assert run.stage() == 2
    folder = run.path / "answers" / "batch"
    (folder / "results-0001.jsonl").write_bytes(content)
    assert run.stage() == 2
    said = capfd.readouterr().err
    assert "results-0001.jsonl: there is no result in it; its request file still waits" in said
    assert "delete" not in said
    assert not (folder / "requests-0002.jsonl").exists()


def test_a_batch_whose_requests_are_all_refused_rejects_no_row(new_run, capfd):
    run = new_run("http://127.0.0.1:9/v1", *FEW, "--annotator", "batch")
    assert run.stage() == 2
    folder = run.path / "answers" / "batch"
    refused = {"error": {"message": "Unsupported parameter: temperature"}}
    lines = [result(row, 400, refused) for row in rows(folder / "requests-0001.jsonl")]
    (folder / "results-0001.jsonl").write_bytes(written(lines))
    assert run.stage() == 2
    assert "12 requests without a completion: HTTP 400: Unsupported parameter" in capfd.readouterr().err
    assert not (run.path / "rationales" / "rejected.jsonl").exists()


def test_a_batch_keeps_to_the_budget(new_run, capfd):
    run = new_run("http://127.0.0.1:9/v1", *FEW, *PRICES, "--annotator", "batch", "--max_cost", "9")
    assert run.stage() == 2
    assert "the budget is used up: 0.0000 of max_cost 9 spent, and the next request files may" in capfd.readouterr().err
    assert not (run.path / "answers" / "batch").exists()
    assert run.stage("--max_cost", "900") == 2
    assert (run.path / "answers" / "batch" / "requests-0001.jsonl").exists()


def test_what_a_batch_paid_for_nothing_counts_once(new_run):
    run = new_run("http://127.0.0.1:9/v1", *FEW, "--annotator", "batch")
    assert run.stage() == 2
    folder = run.path / "answers" / "batch"
    nothing = {"choices": [], "usage": moods.USAGE}
    lines = [result(row, 200, nothing) for row in rows(folder / "requests-0001.jsonl")]
    (folder / "results-0001.jsonl").write_bytes(written(lines))
    for _ in range(3):
        assert run.stage() == 2
    spent = rows(run.path / "answers" / "rationales.unusable.jsonl")
    assert [row["prompt_tokens"] for row in spent] == [400] * 12
