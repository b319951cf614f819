"""Stage 1 against a server that misbehaves: nothing lost, nothing asked twice, nothing given away."""

import json
import random
import threading
import time
from collections import Counter

import pytest

from servers.processes import free_port

pytestmark = pytest.mark.server

# Answers come at once, so that waits can be short; 20 attempts are enough for 20 % faults in any luck.
HASTY = ("--concurrency", "64", "--timeout_seconds", "3", "--backoff_seconds", "0.02", "--max_attempts", "20")
SMALL = (*HASTY, "--max_rationales", "60", "--max_words", "100", "--min_words", "5")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reasons(run):
    return Counter(row["reason"].partition(":")[0] for row in rows(run.path / "rationales" / "rejected.jsonl"))


def assert_every_row_once(run, count):
    users = [row["user_id"] for name in ("accepted", "rejected") for row in rows(run.path / f"rationales/{name}.jsonl")]
    assert len(users) == len(set(users)) == count
    order = {row["user_id"]: n for n, row in enumerate(rows(run.path / "data" / "sequences.jsonl"))}
    for name in ("accepted", "rejected"):
        positions = [order[row["user_id"]] for row in rows(run.path / "rationales" / f"{name}.jsonl")]
        assert positions == sorted(positions)


@pytest.mark.slow
def test_two_thousand_requests_with_faults_killed_five_times(new_run, fault_server, api_key):
    """30 % of requests go wrong: a fifth on the way, a tenth in what is answered."""
    many = ("--max_rationales", "null", "--self_check", "true", "--max_similarity", "0.8", *HASTY)
    faults = {"transport": 0.2, "content": 0.125, "key": api_key}
    server = fault_server(**faults)
    whole = new_run(server.url, *many, name="whole")
    assert whole.stage() == 0
    assert_every_row_once(whole, 2000)
    undisturbed = Counter(server.answered())
    assert len(undisturbed) > 3000
    # A request is answered once; a second time only where the first answer came after the client's patience.
    assert undisturbed.total() - len(undisturbed) <= 5
    found = reasons(whole)
    assert {"verdict weak", "verdict irrelevant", "self-check", "refused by the model"} <= found.keys()
    assert "no answer" not in found

    server = fault_server(**faults)
    killed = new_run(server.url, *many, name="killed")
    draw = random.Random(5)
    for _ in range(5):
        status, output = killed.killed_after(draw.randint(20, 900))
        assert status == -9, output
    assert killed.stage() == 0
    assert killed.results() == whole.results()
    assert len(server.answered()) <= undisturbed.total() + 5 * 64

    for path in [*whole.files(), *killed.files()]:
        assert api_key.encode() not in path.read_bytes(), path
    log = (whole.path / "logs" / "rationales.log").read_text()
    assert "HTTP 503" in log
    assert "[API key]" in log


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("structured", ["false", "true"])
def test_streams_and_schemas_make_no_difference_to_the_rows(new_run, fault_server, stream, structured):
    server = fault_server(transport=0.2, content=0.2)
    flags = (*SMALL, "--stream", stream, "--structured_outputs", structured, "--price_per_million_input", "1")
    run = new_run(server.url, *flags)
    assert run.stage() == 0
    assert_every_row_once(run, 60)
    assert len(server.answered()) == len(set(server.answered())) == run.stored()
    manifest = json.loads((run.path / "rationales" / "manifest.json").read_text())["figures"]
    assert manifest["requests_answered"] == run.stored()
    assert manifest["requests_sent"] == run.stored() + sum(manifest["faults"].values())
    assert manifest["cost"] == pytest.approx(manifest["prompt_tokens"] / 1e6, abs=1e-4)
    # Other curation costs nothing: every answer is there.
    before = server.answered()
    assert run.stage("--min_words", "6", "--overwrite") == 0
    assert server.answered() == before


def test_a_server_that_dies_and_returns(new_run, fault_server):
    server = fault_server(delay=0.1)
    run = new_run(server.url, *SMALL, "--max_rationales", "300", "--backoff_max_seconds", "1")

    def die_and_return():
        while run.stored() < 100:
            time.sleep(0.02)
        server.kill()
        time.sleep(2)
        server.start()

    thread = threading.Thread(target=die_and_return)
    thread.start()
    assert run.stage() == 0
    thread.join()
    assert_every_row_once(run, 300)
    assert "no answer" not in reasons(run)


def test_a_server_that_dies_for_good_stops_the_run_which_goes_on_later(new_run, fault_server, capfd):
    server = fault_server(delay=0.1)
    flags = (*SMALL, "--max_attempts", "3", "--max_rationales", "200", "--concurrency", "8")
    run = new_run(server.url, *flags)

    def die():
        while run.stored() < 50:
            time.sleep(0.02)
        server.kill()

    thread = threading.Thread(target=die)
    thread.start()
    assert run.stage() == 2
    thread.join()
    said = capfd.readouterr().err
    assert "requests in a row got no completion" in said or "is the server running" in said
    assert "Traceback" not in said
    assert not (run.path / "rationales" / "accepted.jsonl").exists()
    stored = run.stored()
    server.start()
    assert run.stage() == 0
    assert_every_row_once(run, 200)
    assert len(server.answered()) <= run.stored() + 8  # in flight when it died
    assert run.stored() > stored


def test_a_request_the_server_refuses_rejects_its_row_alone(new_run, fault_server):
    """The server's limit is between the lengths of a first request and of one that was asked again."""
    undisturbed = new_run(fault_server().url, *SMALL, name="undisturbed")
    assert undisturbed.stage() == 0
    answers = rows(undisturbed.path / "answers" / "rationales.jsonl")
    longest = 4 * max(row["answer"]["prompt_tokens"] for row in answers) + 3  # the server says a token is 4 characters
    server = fault_server(content=0.3, limit=longest)
    run = new_run(server.url, *SMALL)
    assert run.stage() == 0
    assert_every_row_once(run, 60)
    assert reasons(run)["no answer"] > 0
    assert any("HTTP 400: too long" in row["reason"] for row in rows(run.path / "rationales" / "rejected.jsonl"))


def test_budget_stops_cleanly_and_is_never_exceeded(new_run, fault_server, capfd):
    server = fault_server()
    prices = ("--price_per_million_input", "10", "--price_per_million_output", "10", "--max_cost", "0.5")
    run = new_run(server.url, *SMALL, *prices)
    assert run.stage() == 2
    said = capfd.readouterr().err
    assert "the budget is used up" in said
    assert "raise max_cost, or lower max_rationales" in said
    cached = rows(run.path / "answers" / "rationales.jsonl")
    cost = sum(row["answer"]["prompt_tokens"] + row["answer"]["completion_tokens"] for row in cached) * 10 / 1e6
    assert 0.1 < cost <= 0.5
    assert len(server.answered()) == len(cached)
    assert run.stage("--max_cost", "50") == 0
    assert_every_row_once(run, 60)
    assert len(server.answered()) == len(set(server.answered()))


def test_an_exhausted_quota_stops(new_run, fault_server, capfd):
    server = fault_server(quota=30)
    run = new_run(server.url, *SMALL, "--concurrency", "4")
    assert run.stage() == 2
    assert "You exceeded your current quota (the quota is exhausted)" in capfd.readouterr().err
    assert run.stored() == 30


def test_rate_limits_are_kept(new_run, fault_server):
    server = fault_server()
    run = new_run(server.url, *SMALL, "--max_rationales", "40", "--requests_per_minute", "600")
    started = time.monotonic()
    assert run.stage() == 0
    assert time.monotonic() - started > (run.stored() - 1) * 0.1


def test_token_limits_are_kept(new_run, fault_server):
    server = fault_server()
    run = new_run(server.url, *SMALL, "--max_rationales", "20", "--tokens_per_minute", "600000")
    started = time.monotonic()
    assert run.stage() == 0
    tokens = sum(
        row["answer"]["prompt_tokens"] + row["answer"]["completion_tokens"]
        for row in rows(run.path / "answers" / "rationales.jsonl")
    )
    assert time.monotonic() - started > 0.8 * tokens / 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "gpt-5-mega"}, "model 'gpt-5-mega' is not served at http://.*; it has annotator"),
        ({"--base_url": "{root}"}, "HTTP 404: no such path .*usually ends in /v1"),
        ({"--base_url": "http://127.0.0.1:{free}/v1"}, "connection failed: .* is the server running"),
        ({"--base_url": "ftp://x/v1"}, "connection failed: .*UnsupportedProtocol"),
        ({"--api_key_env": "TWICE_NO_KEY"}, "the environment variable TWICE_NO_KEY is not set"),
        ({"--api_key_env": "TWICE_WRONG_KEY"}, "HTTP 401: .*check the environment variable TWICE_WRONG_KEY"),
        ({"--exemplars": "none.json"}, "none.json: no such file"),
    ],
)
def test_what_is_wrong_is_said_once_before_the_first_row(
    new_run, fault_server, api_key, monkeypatch, capfd, changes, message
):
    monkeypatch.setenv("TWICE_WRONG_KEY", "another-secret-0815")
    server = fault_server(key=api_key)
    run = new_run(server.url, *SMALL)
    filled = {"root": server.url.removesuffix("/v1"), "free": free_port()}
    words = [word.format(**filled) for pair in changes.items() for word in pair]
    started = time.monotonic()
    assert run.stage(*words) == 2
    assert time.monotonic() - started < 15
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(errors[0]))
    assert server.answered() == []
    assert "another-secret-0815" not in errors[0] + (run.path / "logs" / "rationales.log").read_text()


def test_dry_run_asks_nothing_and_leaves_nothing(new_run, fault_server, capfd):
    server = fault_server()
    run = new_run(server.url, *SMALL, "--price_per_million_input", "1", "--self_check", "true")
    assert run.stage("--dry_run") == 0
    said = capfd.readouterr().err
    assert "calls to make: 60, and up to as many self-checks" in said
    assert "[system]" in said
    assert "Next product:" in said
    assert server.answered() == []
    assert not (run.path / "rationales").exists()


def answer_batch(run, number, server_answers):
    """Answer a request file as a batch service would, in another order."""
    folder = run.path / "answers" / "batch"
    lines = []
    for row in rows(folder / f"requests-{number:04d}.jsonl"):
        assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
        status, body = server_answers(row["body"])
        response = {"status_code": status, "request_id": "r", "body": body}
        lines.append(json.dumps({"id": "b", "custom_id": row["custom_id"], "response": response, "error": None}))
    random.Random(0).shuffle(lines)
    (folder / f"results-{number:04d}.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def test_batch_files_end_with_the_same_rows_as_the_server(new_run, fault_server, capfd):
    from servers.fault_server import completion

    flags = (*SMALL, "--self_check", "true")
    live = new_run(fault_server(content=0.3).url, *flags, name="live")
    assert live.stage() == 0
    run = new_run("http://127.0.0.1:9/v1", *flags, "--annotator", "batch", name="batch")
    failed_once = set()

    def answers(body):
        name = json.dumps(body, separators=(",", ":"))
        if len(name) % 7 == 0 and name not in failed_once:
            failed_once.add(name)
            return 500, {"error": {"message": "try again"}}
        import hashlib

        return 200, completion(body, random.Random(f"0 {hashlib.sha256(name.encode()).hexdigest()}"), 0.3)

    sent = 0
    for number in range(1, 12):
        if (status := run.stage()) == 0:
            break
        assert status == 2
        said = capfd.readouterr().err
        assert f"requests-{number:04d}.jsonl" in said
        assert "vllm run-batch -i REQUESTS -o RESULTS --model annotator" in said
        assert run.stage() == 2  # asked again, it still waits and writes nothing new
        sent += answer_batch(run, number, answers)
    assert number > 2
    assert run.results() == live.results()
    assert sent == run.stored() + len(failed_once)
